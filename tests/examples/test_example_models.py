import pytest
import torch
from models import ARCHITECTURES, create_model, default_width
from models.blocks import scaled
from models.mobilevit import fold, unfold
from torch.utils.flop_counter import FlopCounterMode

import quantize

# Parameters in millions: He et al. 2015 (CIFAR models, ResNet-18 and -50), and for preact_resnet20, which no paper lists, 0.27. Mobile
# models have theirs below.
PUBLISHED = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "preact_resnet20": 0.27,
    "preact_resnet56": 0.86,
    "preact_resnet110": 1.73,
    "resnet18": 11.69,
    "resnet50": 25.56,
}
# Classes and parameters. At 1000: those of the papers' 4.2 M, 1.3 M and 2.3 M, to the last one as timm has them. At 10: less a row of the
# last layer for each class.
MOBILE = {
    "mobilenet": (10, 4_231_976 - 990 * 1025),
    "mobilenet_imagenet": (1000, 4_231_976),
    "mobilevit": (10, 1_272_024 - 990 * 321),
    "mobilevit_xxs": (10, 1_272_024 - 990 * 321),
    "mobilevit_xs": (10, 2_317_848 - 990 * 385),
    "mobilevit_xxs_imagenet": (1000, 1_272_024),
    "mobilevit_xs_imagenet": (1000, 2_317_848),
}
# Side of the image, multiply-adds. The first is published, as 569 M; no paper counts the others.
MULTIPLY_ADDS = {
    "mobilenet_imagenet": (224, 568_740_352),
    "mobilenet": (32, 46_354_432),
    "mobilevit_xxs": (32, 26_252_928),
    "mobilevit_xs": (32, 67_414_784),
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_architecture_has_a_published_count():
    assert {*PUBLISHED, *MOBILE} == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameter_count(arch):
    model = create_model(arch, num_classes=1000 if default_width(arch) == 64 else 10)
    assert round(count(model) / 1e6, 2) == PUBLISHED[arch]


@pytest.mark.parametrize("arch", MOBILE)
def test_parameter_count_of_mobile_models(arch):
    classes, parameters = MOBILE[arch]
    assert count(create_model(arch, classes)) == parameters


@pytest.mark.parametrize("arch", MULTIPLY_ADDS)
def test_multiply_adds(arch):
    side, expected = MULTIPLY_ADDS[arch]
    with torch.device("meta"):
        model, image = create_model(arch, MOBILE[arch][0]), torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_width_classes_and_channels(arch):
    model = create_model(arch, num_classes=7, in_channels=1, width=4)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert count(model) < count(create_model(arch, num_classes=7, in_channels=1)) / 10


@pytest.mark.parametrize("arch", MOBILE)
def test_width_of_mobile_models(arch):
    width = default_width(arch)
    model, wider = create_model(arch, 10, width=width), create_model(arch, 10, width=2 * width)
    assert count(model) == count(create_model(arch, 10))
    layers = [(ours, theirs) for ours, theirs in zip(model.modules(), wider.modules(), strict=True) if isinstance(ours, torch.nn.Conv2d)]
    assert layers[0][0].out_channels == width
    assert all(theirs.out_channels == 2 * ours.out_channels for ours, theirs in layers)


@pytest.mark.parametrize(
    ("channels", "scale", "rounded"), [(64, 1.0, 64), (64, 0.75, 48), (80, 0.25, 24), (24, 0.8, 24), (96, 0.18, 16), (24, 0.1, 8)]
)
def test_channels_are_multiples_of_8(channels, scale, rounded):
    assert scaled(channels, scale) == rounded


@pytest.mark.parametrize("arch", MOBILE)
@pytest.mark.parametrize("compress", [False, True])
def test_gradient_reaches_every_parameter(arch, compress):
    model = create_model(arch, num_classes=7, in_channels=1, width=4)
    if compress:
        model = quantize.QModule(model, quantize.ActivationConfig(bits=2, use_gradient=True))
        model.set_sample_indices(torch.arange(4))
    model(torch.randn(4, 1, 32, 32)).square().sum().backward()
    lost = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    assert not lost


@pytest.mark.parametrize("arch", MOBILE)
@pytest.mark.parametrize("size", [(32, 32), (33, 57)])
def test_channels_last(arch, size):
    model, images = create_model(arch, num_classes=7, width=8).eval(), torch.randn(2, 3, *size)
    expected = model(images)
    output = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("arch", "sides"), [("mobilevit_xxs", [8, 4, 4]), ("mobilevit_xs_imagenet", [32, 16, 8])])
def test_maps_that_transformers_see(arch, sides):
    model, seen = create_model(arch, 10, width=4), []
    for block in model.blocks:
        if hasattr(block, "transformer"):
            block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    side = 256 if "imagenet" in arch else 32
    model(torch.randn(2, 3, side, side))
    assert seen == [(side, side) for side in sides]


def test_patches():
    # Pixels numbered row by row; a row here is a place in the 2x2 patches, taken over the six patches.
    image = torch.arange(24.0).view(1, 1, 4, 6)
    assert unfold(image)[0, :, :, 0].tolist() == [
        [0, 2, 4, 12, 14, 16],
        [1, 3, 5, 13, 15, 17],
        [6, 8, 10, 18, 20, 22],
        [7, 9, 11, 19, 21, 23],
    ]
    images = torch.randn(3, 5, 4, 6)
    assert torch.equal(fold(unfold(images), [4, 6]), images)


@pytest.mark.third_party
@pytest.mark.parametrize(("arch", "name"), [("mobilevit_xxs_imagenet", "mobilevit_xxs"), ("mobilevit_xs_imagenet", "mobilevit_xs")])
@pytest.mark.parametrize("side", [128, 136])  # the last maps are 4x4, and 17x17, 9x9 and 5x5
def test_mobilevit_computes_what_timms_does(arch, name, side):
    import timm

    theirs, ours, images = timm.create_model(name).eval(), create_model(arch, 1000).eval(), torch.randn(2, 3, side, side)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # Other names, the same order.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.third_party
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_names_are_torchvisions(arch):
    import torchvision

    shapes = {name: value.shape for name, value in create_model(arch, 1000).state_dict().items()}
    assert shapes == {name: value.shape for name, value in getattr(torchvision.models, arch)().state_dict().items()}


def test_preact_shortcut_shares_the_activated_input():
    block = create_model("preact_resnet20", 10, width=4).layer2[0]
    inputs = []
    block.conv1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.shortcut.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block(torch.randn(1, 4, 8, 8))
    assert inputs[0].data_ptr() == inputs[1].data_ptr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet21", 10), "arch must be one of resnet20, .*got 'resnet21'"),
        (("resnet20", 0), "num_classes must be at least 1; got 0"),
        (("resnet20", 10, 0), "in_channels must be at least 1; got 0"),
        (("resnet20", 10, 3, -4), "width must be at least 1; got -4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(*arguments)
