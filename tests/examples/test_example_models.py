from functools import cache

import pytest
import torch
from models import ARCHITECTURES, create_model, default_width
from models.blocks import scaled
from models.mobilevit import fold, unfold
from torch.utils.flop_counter import FlopCounterMode

import quantize
from quantize.packed.fold import find_pairs

# Parameters in millions: He et al. 2015 (CIFAR models, ResNet-18 and -50), and for preact_resnet20, which no paper lists, 0.27. Others have
# theirs below.
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
# Classes and parameters. At 1000: those of the papers' 4.2 M, 3.4 M, 1.3 M, 2.3 M and 5.3 M, to the last one as timm has them. At 10: less
# a row of the last layer for each class.
MOBILE = {
    "mobilenet": (10, 4_231_976 - 990 * 1025),
    "mobilenet_imagenet": (1000, 4_231_976),
    "mobilenetv2": (10, 3_504_872 - 990 * 1281),
    "mobilenetv2_imagenet": (1000, 3_504_872),
    "mobilevit": (10, 1_272_024 - 990 * 321),
    "mobilevit_xxs": (10, 1_272_024 - 990 * 321),
    "mobilevit_xs": (10, 2_317_848 - 990 * 385),
    "mobilevit_xxs_imagenet": (1000, 1_272_024),
    "mobilevit_xs_imagenet": (1000, 2_317_848),
    "efficientnet_b0": (10, 5_288_548 - 990 * 1281),
    "efficientnet_b0_imagenet": (1000, 5_288_548),
}
# Torchvision's, less what ImageNet's larger first convolutions and last layers have more.
STEM = 3 * 64 * (7 * 7 - 3 * 3)
LESS = {
    "resnet18": STEM + 990 * 513,
    "resnet34": STEM + 990 * 513,
    "resnet50": STEM + 990 * 2049,
    "densenet121": STEM + 990 * 1025 + 2 * 64,  # and a batch norm
}
LINEAR = 513 * 10
OTHERS = {
    "wide_resnet": (10, 36_479_194),  # the paper's 36.5 M and 2.7 M
    "wide_resnet16_4": (10, 2_748_890),
    "resnet34": (1000, 21_797_672),
    "resnet18_cifar": (10, 11_689_512 - LESS["resnet18"]),
    "resnet34_cifar": (10, 21_797_672 - LESS["resnet34"]),
    "resnet50_cifar": (10, 25_557_032 - LESS["resnet50"]),
    "senet": (10, 11_778_592 - LESS["resnet18"]),  # timm's legacy_seresnet18
    "lenet": (10, 61_706 + 2 * 6 * 25),  # with 1 input channel, and for 2 more
    "nin": (10, 966_986),
    # Torchvision's features, less the biases in front of batch norms.
    "vgg": (10, 14_723_136 - 4224 + LINEAR),
    "vgg11": (10, 9_225_984 - 2752 + LINEAR),
    "vgg13": (10, 9_410_880 - 2944 + LINEAR),
    "vgg16": (10, 14_723_136 - 4224 + LINEAR),
    "vgg19": (10, 20_035_392 - 5504 + LINEAR),
    "densenet": (10, 769_162),  # the paper's 0.8 M
    "densenet121": (10, 7_978_856 - LESS["densenet121"]),
    "dla": (10, 16_291_386),  # of github.com/kuangliu/pytorch-cifar, both
    "dla_simple": (10, 15_142_970),
}
# Of binary networks the literature counts VGG-Small, 4.66 M with the batch norms'; the residual ones have what their plain forms have, less
# or more a batch norm and option A's nothing or a 1x1 convolution.
BINARY = {
    "nin_q": (10, 968_394),
    "resnet20_q": (10, 269_722),
    "resnet32_q": (10, 464_154),
    "resnet44_q": (10, 658_586),
    "resnet56_q": (10, 853_018),
    "resnet18_q": (1000, 11_687_720),
    "resnet18_q_cifar": (10, 11_172_170),
    "vgg_small_q": (10, 4_660_106),
}
# Side of the image, multiply-adds. Those of ImageNet are published, as 569 M, 300 M, 0.39 and 3.6 billion; no paper counts the others.
MULTIPLY_ADDS = {
    "mobilenet_imagenet": (224, 568_740_352),
    "mobilenetv2_imagenet": (224, 300_774_272),
    "efficientnet_b0_imagenet": (224, 385_814_752),
    "resnet34": (224, 3_663_761_408),
    "mobilenet": (32, 46_354_432),
    "mobilenetv2": (32, 87_976_448),
    "mobilevit_xxs": (32, 26_252_928),
    "mobilevit_xs": (32, 67_414_784),
    "efficientnet_b0": (32, 31_979_392),
    "wide_resnet": (32, 5_243_328_768),
    "wide_resnet16_4": (32, 392_612_352),
    "resnet18_cifar": (32, 555_422_720),
    "resnet34_cifar": (32, 1_159_402_496),
    "resnet50_cifar": (32, 1_297_829_888),
    "senet": (32, 555_509_760),
    "lenet": (32, 651_720),
    "nin": (32, 222_365_568),
    "vgg11": (32, 152_769_536),
    "vgg13": (32, 228_267_008),
    "vgg16": (32, 313_201_664),
    "vgg19": (32, 398_136_320),
    "densenet": (32, 287_929_692),
    "densenet121": (32, 888_350_720),
    "dla": (32, 1_030_935_552),
    "dla_simple": (32, 913_495_040),
    "nin_q": (32, 222_365_568),
    "resnet20_q": (32, 40_551_040),
    "resnet18_q": (224, 1_814_073_344),
    "resnet18_q_cifar": (32, 555_422_720),
    "vgg_small_q": (32, 607_600_640),
}
EXACT = {**MOBILE, **OTHERS, **BINARY}
# Width, layers that are made binary, and bytes of their weights: a bit each, an output channel's padded to 8 bytes.
BINARY_BYTES = {
    "nin_q": (192, 7, 119_808),
    "resnet20_q": (16, 18, 35_072),
    "resnet20_q at width 32": (32, 18, 134_656),
    "resnet32_q": (16, 30, 60_160),
    "resnet44_q": (16, 42, 85_248),
    "resnet56_q": (16, 54, 110_336),
    "resnet18_q": (64, 19, 1_394_688),
    "resnet18_q_cifar": (64, 19, 1_394_688),
    "vgg_small_q": (128, 5, 571_392),
}
SMALL_WIDTHS = {"lenet": 1}
# Batch norms of the binary networks without blocks.
AFTER_A_CONVOLUTION = {
    "nin_q": ["bn", *(f"features.{index}.bn" for index in (0, 1, 4, 5, 8))],
    "vgg_small_q": [f"features.{index}.bn" for index in (0, 3, 6)],
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def on_meta(arch, classes, in_channels=3, width=None):
    """The model without numbers, where only its shapes are looked at."""
    with torch.device("meta"):
        return create_model(arch, classes, in_channels, width)


def small(arch):
    return create_model(arch, num_classes=7, in_channels=1, width=SMALL_WIDTHS.get(arch, 4))


def test_every_architecture_has_a_published_count():
    assert {*PUBLISHED, *EXACT} == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameter_count(arch):
    model = on_meta(arch, 1000 if default_width(arch) == 64 else 10)
    assert round(count(model) / 1e6, 2) == PUBLISHED[arch]


@pytest.mark.parametrize("arch", EXACT)
def test_exact_parameter_count(arch):
    classes, parameters = EXACT[arch]
    assert count(on_meta(arch, classes)) == parameters


@pytest.mark.parametrize("arch", MULTIPLY_ADDS)
def test_multiply_adds(arch):
    side, expected = MULTIPLY_ADDS[arch]
    model, image = on_meta(arch, EXACT[arch][0]), torch.empty(1, 3, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_width_classes_and_channels(arch):
    model = small(arch)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert count(model) < count(on_meta(arch, 10)) / 10


@pytest.mark.parametrize("arch", EXACT)
def test_width_scales_every_convolution(arch):
    classes, width = EXACT[arch][0], default_width(arch)
    published, wider = (
        [module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
        for model in (on_meta(arch, classes), on_meta(arch, classes, width=2 * width))
    )
    if arch.startswith("wide"):
        assert published.pop(0) == wider.pop(0) == 16
    else:
        assert published[0] == width
    assert wider == [2 * channels for channels in published]


@pytest.mark.parametrize(
    ("channels", "scale", "rounded"), [(64, 1.0, 64), (64, 0.75, 48), (80, 0.25, 24), (24, 0.8, 24), (96, 0.18, 16), (24, 0.1, 8)]
)
def test_channels_are_multiples_of_8(channels, scale, rounded):
    assert scaled(channels, scale) == rounded


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("compress", [False, True])
def test_gradient_reaches_every_parameter(arch, compress):
    model, images = small(arch), torch.randn(2, 1, 28, 28)
    if compress:
        # Not as few: where a batch norm sees two values of a channel, the gradient is their small difference, and rounding explodes.
        images = torch.randn(4, 1, *(64, 64) if "imagenet" in arch else (32, 32))
        model = quantize.QModule(model, quantize.ActivationConfig(bits=2, use_gradient=True))
        model.set_sample_indices(torch.arange(4))
    model(images).square().sum().backward()
    lost = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    assert not lost


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batch_norms_fold(arch):
    model = small(arch).eval()
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    pairs = find_pairs(model, {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)})
    # Pre-activation: the first batch norm of a layer is of a sum or of all before it, which others see too, or comes after a pooling.
    if arch in AFTER_A_CONVOLUTION:
        norms = AFTER_A_CONVOLUTION[arch]
    elif arch.startswith(("preact", "wide", "densenet")) or arch in BINARY:
        norms = [name for name in norms if name.endswith("bn2")]
    assert sorted(norm for _, norm in pairs) == sorted(norms)


@pytest.mark.parametrize("case", BINARY_BYTES)
def test_binary_layers(case):
    """All but the first and the last; in front of each a clip of its own after a batch norm, which only a shortcut's convolution shares."""
    arch, (width, layers, size) = case.split()[0], BINARY_BYTES[case]
    model = on_meta(arch, BINARY[arch][0], width=width)
    weighted = [(name, m) for name, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert (weighted[0][0], weighted[-1][0]) == ("conv1", "fc")
    inner = [module for name, module in weighted if not name.endswith("shortcut")][1:-1]
    binary = [module for _, module in weighted[1:-1]]
    assert len(binary) == layers and all(module.bias is None for module in binary)
    assert sum(m.out_channels * -(-m.weight[0].numel() // 64) * 8 for m in binary) == size
    order = [m for m in model.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.Hardtanh, torch.nn.Conv2d))]
    for module in inner:
        place = order.index(module)
        assert [type(m) for m in order[place - 2 : place]] == [torch.nn.BatchNorm2d, torch.nn.Hardtanh]


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


def test_lenet_puts_small_images_in_the_middle():
    model, images = create_model("lenet", 10), torch.randn(2, 3, 28, 27)
    assert torch.equal(model(images), model(torch.nn.functional.pad(images, (2, 3, 2, 2))))


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("mobilevit_xxs_imagenet", "mobilevit_xxs"),
        ("mobilevit_xs_imagenet", "mobilevit_xs"),
        ("mobilenetv2_imagenet", "mobilenetv2_100"),
        ("efficientnet_b0_imagenet", "efficientnet_b0"),
    ],
)
@pytest.mark.parametrize("side", [128, 136])  # the last maps are 4x4, and MobileViT's 17x17, 9x9 and 5x5
def test_mobile_models_compute_what_timms_do(arch, name, side):
    import timm

    theirs, ours, images = timm.create_model(name).eval(), create_model(arch, 1000).eval(), torch.randn(2, 3, side, side)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # Other names, the same order.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.third_party
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_names_are_torchvisions(arch):
    import torchvision

    shapes = {name: value.shape for name, value in create_model(arch, 1000).state_dict().items()}
    assert shapes == {name: value.shape for name, value in getattr(torchvision.models, arch)().state_dict().items()}


@pytest.mark.parametrize(
    "block",
    [create_model("preact_resnet20", 10, width=4).layer2[0], create_model("resnet18_q_cifar", 10, width=4).blocks[2]],
    ids=["preact_resnet20", "resnet18_q"],
)
def test_preact_shortcut_shares_the_activated_input(block):
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
