import pytest
import torch
from models import ARCHITECTURES, create_model, default_width

# Parameters in millions: He et al. 2015 (CIFAR models, ResNet-18 and -50), and for preact_resnet20, which no paper lists, 0.27.
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


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_architecture_has_a_published_count():
    assert set(PUBLISHED) == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parameter_count(arch):
    model = create_model(arch, num_classes=1000 if default_width(arch) == 64 else 10)
    assert round(count(model) / 1e6, 2) == PUBLISHED[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_width_classes_and_channels(arch):
    model = create_model(arch, num_classes=7, in_channels=1, width=4)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert count(model) < count(create_model(arch, num_classes=7, in_channels=1)) / 10


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
