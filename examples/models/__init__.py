"""Models of the examples, by name: `create_model("resnet20", num_classes=10)`."""

from torch import nn

from .cifar_resnet import CifarResNet, PreActResNet
from .imagenet_resnet import BasicBlock, Bottleneck, ImageNetResNet
from .mobilenet import MobileNet
from .mobilevit import IMAGENET_STRIDES, MobileViT

# arch: (constructor taking num_classes, in_channels and width, the default width: channels of the first stage)
ARCHITECTURES = {
    **{f"resnet{depth}": (lambda depth=depth, **k: CifarResNet(depth, **k), 16) for depth in (20, 32, 44, 56)},
    **{f"preact_resnet{depth}": (lambda depth=depth, **k: PreActResNet(depth, **k), 16) for depth in (20, 56, 110)},
    "resnet18": (lambda **k: ImageNetResNet(BasicBlock, (2, 2, 2, 2), **k), 64),
    "resnet50": (lambda **k: ImageNetResNet(Bottleneck, (3, 4, 6, 3), **k), 64),
    # By their plain names the mobile ones are for 32x32 images.
    "mobilenet": (MobileNet, 32),
    "mobilenet_imagenet": (lambda **k: MobileNet(stem_stride=2, **k), 32),
    "mobilevit": (lambda **k: MobileViT("xxs", **k), 16),
    **{f"mobilevit_{size}": (lambda size=size, **k: MobileViT(size, **k), 16) for size in ("xxs", "xs")},
    **{f"mobilevit_{size}_imagenet": (lambda size=size, **k: MobileViT(size, strides=IMAGENET_STRIDES, **k), 16) for size in ("xxs", "xs")},
}


def default_width(arch: str) -> int:
    """Channels of the first stage of `arch` as published."""
    return _find(arch)[1]


def create_model(arch: str, num_classes: int, in_channels: int = 3, width: int | None = None) -> nn.Module:
    """A freshly initialized model; `width` is the number of channels of its first stage (as published when None). All others are in
    proportion, in mobile architectures rounded to multiples of 8.

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
