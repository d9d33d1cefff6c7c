"""Other people's models, unchanged: what test_third_party.py checks and benchmarks/other_models.py measures."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Model(NamedTuple):
    """`name` is the library's own. `below`: why 2 bits save less than ten times; empty where they must save that much."""

    library: str
    name: str
    below: str = ""
    tested: bool = True  # False: in the benchmark only
    small: int = 64  # pixels in tests
    batch: int = 4  # samples in tests
    large: int = 224  # pixels in the benchmark
    size_argument: str = ""  # of models made for one size
    transformer: bool = False

    @property
    def key(self) -> str:
        """What ids and tables call it."""
        return f"{self.library}/{self.name}"

    def build(self, size: int) -> nn.Module:
        """The model for images of `size` pixels with random weights, in training mode."""
        options = {self.size_argument: size} if self.size_argument else {}
        if self.library == "torchvision":
            from torchvision.models import get_model

            if self.name in ("googlenet", "inception_v3"):
                options["init_weights"] = False  # theirs takes a minute
            return get_model(self.name, weights=None, **options).train()
        if self.library == "timm":
            from timm import create_model

            return create_model(self.name, pretrained=False, **options).train()
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(192, 4, 768, activation="gelu", batch_first=True), 4).train()

    def inputs(self, batch: int, size: int) -> Tensor:
        """Noise in the shape of images, or of their 16x16 patches' embeddings."""
        if self.library == "torch":
            return torch.randn(batch, (size // 16) ** 2, 192)
        return torch.randn(batch, 3, size, size)


STANDARDIZED = "the standardized weights are tensors of their own"

MODELS = [
    Model("torchvision", "alexnet", tested=False),
    Model("torchvision", "vgg11", tested=False),
    Model("torchvision", "vgg11_bn"),
    Model("torchvision", "resnet18"),
    Model("torchvision", "resnet50"),
    Model("torchvision", "resnext50_32x4d"),
    Model("torchvision", "wide_resnet50_2"),
    Model("torchvision", "densenet121"),
    Model("torchvision", "googlenet"),
    Model("torchvision", "inception_v3", tested=False, large=299),  # its second classifier wants 299 pixels: timm's stands in
    Model("torchvision", "squeezenet1_1"),
    Model("torchvision", "mobilenet_v2"),
    Model("torchvision", "mobilenet_v3_large"),
    Model("torchvision", "mnasnet1_0"),
    Model("torchvision", "shufflenet_v2_x1_0"),
    Model("torchvision", "efficientnet_b0"),
    Model("torchvision", "efficientnet_v2_s", tested=False),
    Model("torchvision", "regnet_x_400mf"),
    Model("torchvision", "regnet_y_400mf"),
    Model("torchvision", "convnext_tiny"),
    Model("timm", "resnet18"),
    Model("timm", "resnet50d", tested=False),
    Model("timm", "resnext50_32x4d"),
    Model("timm", "seresnet50"),
    Model("timm", "ecaresnet50d", tested=False),
    Model("timm", "skresnet18", batch=8),  # normalizes one value a sample, which over four of them is ill-conditioned
    Model("timm", "resnest14d"),
    Model("timm", "resnetblur50"),
    Model("timm", "tresnet_m", tested=False),
    Model("timm", "res2net50_26w_4s"),
    Model("timm", "resnetv2_50"),
    Model("timm", "resnetv2_50x1_bit", below=STANDARDIZED),
    Model("timm", "dm_nfnet_f0", below=STANDARDIZED, tested=False),
    Model("timm", "regnetx_004"),
    Model("timm", "regnety_004"),
    Model("timm", "repvgg_a0"),
    Model("timm", "gernet_s", tested=False),
    Model("timm", "dla34"),
    Model("timm", "hrnet_w18_small"),
    Model("timm", "dpn68"),
    Model("timm", "densenet121", tested=False),
    Model("timm", "ese_vovnet19b_dw"),
    Model("timm", "selecsls42b"),
    Model("timm", "cspresnet50"),
    Model("timm", "cspdarknet53", tested=False),
    Model("timm", "darknet53", tested=False),
    Model("timm", "xception41", tested=False, large=299),
    Model("timm", "legacy_xception", large=299),
    Model("timm", "inception_v3", small=96, large=299),
    Model("timm", "inception_v4", tested=False, large=299),
    Model("timm", "inception_resnet_v2", tested=False, large=299),
    Model("timm", "mobilenetv2_100"),
    Model("timm", "mobilenetv3_large_100"),
    Model("timm", "hardcorenas_a", tested=False),
    Model("timm", "fbnetc_100", tested=False),
    Model("timm", "spnasnet_100", tested=False),
    Model("timm", "ghostnet_100"),
    Model("timm", "mixnet_s"),
    Model("timm", "rexnet_100", tested=False),
    Model("timm", "efficientnet_b0"),
    Model("timm", "convnext_atto", tested=False),
    Model("torchvision", "vit_b_16", transformer=True, tested=False, size_argument="image_size"),
    Model("timm", "vit_tiny_patch16_224", transformer=True, size_argument="img_size"),
    Model("timm", "deit_tiny_patch16_224", transformer=True, tested=False, size_argument="img_size"),
    Model("timm", "swin_tiny_patch4_window7_224", transformer=True, size_argument="img_size"),
    Model("torch", "TransformerEncoder", transformer=True),
]


def models(*keys: str) -> list[Model]:
    """Those of MODELS with these keys; KeyError for one that is not there."""
    by_key = {model.key: model for model in MODELS}
    return [by_key[key] for key in keys]
