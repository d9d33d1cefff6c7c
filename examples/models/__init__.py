"""Models of the examples, by name: `create_model("resnet20", num_classes=10)`."""

from torch import nn

from . import mobilenetv2, mobilevit
from .binary import BinaryNIN, BinaryResNet, BinaryVGG
from .cifar_resnet import CifarResNet, PreActResNet
from .densenet import DenseNet
from .dla import DLA
from .efficientnet import EfficientNetB0
from .imagenet_resnet import BasicBlock, Bottleneck, ImageNetResNet
from .lenet import LeNet
from .mobilenet import MobileNet
from .mobilenetv2 import MobileNetV2
from .mobilevit import MobileViT
from .nin import NIN
from .senet import SEBasicBlock
from .vgg import DEPTHS, VGG

RESNETS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)), "resnet50": (Bottleneck, (3, 4, 6, 3))}

# arch: (constructor taking num_classes, in_channels and width, the default width: channels of the first stage)
ARCHITECTURES = {
    **{f"resnet{depth}": (lambda depth=depth, **k: CifarResNet(depth, **k), 16) for depth in (20, 32, 44, 56)},
    **{f"preact_resnet{depth}": (lambda depth=depth, **k: PreActResNet(depth, **k), 16) for depth in (20, 56, 110)},
    "wide_resnet": (lambda **k: PreActResNet(28, wide=True, **k), 160),
    "wide_resnet16_4": (lambda **k: PreActResNet(16, wide=True, **k), 64),
    # These are for ImageNet; any other name that does not say so is for 32x32 images.
    **{arch: (lambda form=form, **k: ImageNetResNet(*form, **k), 64) for arch, form in RESNETS.items()},
    **{f"{arch}_cifar": (lambda form=form, **k: ImageNetResNet(*form, small_images=True, **k), 64) for arch, form in RESNETS.items()},
    "senet": (lambda **k: ImageNetResNet(SEBasicBlock, (2, 2, 2, 2), small_images=True, **k), 64),
    "lenet": (LeNet, 6),
    "nin": (NIN, 192),
    "vgg": (lambda **k: VGG(16, **k), 64),
    **{f"vgg{depth}": (lambda depth=depth, **k: VGG(depth, **k), 64) for depth in DEPTHS},
    "densenet": (lambda **k: DenseNet((16, 16, 16), **k), 24),
    "densenet121": (lambda **k: DenseNet((6, 12, 24, 16), **k), 64),
    "dla": (DLA, 16),
    "dla_simple": (lambda **k: DLA(simple=True, **k), 16),
    "mobilenet": (MobileNet, 32),
    "mobilenet_imagenet": (lambda **k: MobileNet(stem_stride=2, **k), 32),
    "mobilenetv2": (MobileNetV2, 32),
    "mobilenetv2_imagenet": (lambda **k: MobileNetV2(strides=mobilenetv2.IMAGENET_STRIDES, **k), 32),
    "mobilevit": (lambda **k: MobileViT("xxs", **k), 16),
    **{f"mobilevit_{size}": (lambda size=size, **k: MobileViT(size, **k), 16) for size in ("xxs", "xs")},
    **{
        f"mobilevit_{size}_imagenet": (lambda size=size, **k: MobileViT(size, strides=mobilevit.IMAGENET_STRIDES, **k), 16)
        for size in ("xxs", "xs")
    },
    "efficientnet_b0": (EfficientNetB0, 32),
    "efficientnet_b0_imagenet": (lambda **k: EfficientNetB0(strides=mobilenetv2.IMAGENET_STRIDES, **k), 32),
    # For binary weights and activations.
    "nin_q": (BinaryNIN, 192),
    **{f"resnet{depth}_q": (lambda n=depth // 6, **k: BinaryResNet((n, n, n), False, True, **k), 16) for depth in (20, 32, 44, 56)},
    "resnet18_q": (lambda **k: BinaryResNet((2, 2, 2, 2), True, False, **k), 64),
    "resnet18_q_cifar": (lambda **k: BinaryResNet((2, 2, 2, 2), True, True, **k), 64),
    "vgg_small_q": (BinaryVGG, 128),
}


def default_width(arch: str) -> int:
    """Channels of the first stage of `arch` as published."""
    return _find(arch)[1]


def create_model(arch: str, num_classes: int, in_channels: int = 3, width: int | None = None) -> nn.Module:
    """A freshly initialized model; `width` is the number of channels of its first stage (as published when None). All others are in
    proportion, in mobile architectures rounded to multiples of 8; only wide ResNets' first convolution has 16 at most.

    Raises ValueError for a name that does not exist and for sizes below 1.
    """
    make, published = _find(arch)
    width = published if width is None else width
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
        if value < 1:
            raise ValueError(f"create_model: {name} must be at least 1; got {value}")
    return make(num_classes=num_classes, in_channels=in_channels, width=width)


def _find(arch):
    if arch not in ARCHITECTURES:
        raise ValueError(f"create_model: arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    return ARCHITECTURES[arch]
