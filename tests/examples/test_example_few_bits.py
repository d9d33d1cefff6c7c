"""Training with --weights xnor|dorefa: which layers, which configuration, and statistics taken anew. (Bit-equal resuming is in
test_example_resuming.py, with COMPRESSIONS' `xnor` and `dorefa`; bad flags are in test_example_options.py.)"""

import warnings

import few_bits
import options
import pytest
import torch
import train as train_script
import weights
from models import ARCHITECTURES, create_model
from processes import Processes
from small_runs import SMALL

import quantize
from quantize.weight.prepare import prepared_weights

BINARY = [arch for arch in ARCHITECTURES if "_q" in arch]


def prepared(*flags, arch="resnet20_q"):
    args = options.parse(["--arch", arch, *flags])
    return args, weights.prepare(create_model(arch, 10, 1, width=4), args)


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ("xnor", "xnor-1-a1"),
        ("xnor --activation-bits 32", "xnor-1"),
        ("xnor --rectify 0.99 --sign-gradient polynomial", "xnor-1-a1-rectify0.99-polynomial"),
        ("xnor --float-layers", "xnor-1-a1-float_none"),
        ("xnor --float-layers fc", "xnor-1-a1-float_fc"),
        ("dorefa", "dorefa-2-a2"),
        ("dorefa --weight-bits 4 --activation-bits 32 --gradient-bits 6", "dorefa-4-g6"),
        ("dorefa --weight-bits 16", "dorefa-16-a16"),
        ("dorefa --weight-bits 1 --no-scale-adjusted", "dorefa-1-a1-unscaled"),
        ("ternary --activation-bits 32 --float-layers", "ternary-2"),
    ],
)
def test_label(flags, label):
    args = options.parse(["--weights", *flags.split()])
    assert weights.label(args) == options.label(args) == label


def test_defaults_are_the_librarys():
    args = options.parse(["--weights", "xnor"])
    assert few_bits.config(args, create_model("resnet20_q", 10, width=4)) == quantize.XNOR()
    args = options.parse(["--weights", "dorefa"])
    assert few_bits.config(args, create_model("resnet20", 10, width=4)) == quantize.DoReFa(2, 2)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("xnor", lambda: quantize.XNOR(1)),
        ("xnor --activation-bits 32", lambda: quantize.XNOR(None)),
        ("xnor --rectify 0.9 --sign-gradient polynomial", lambda: quantize.XNOR(1, rectify=0.9, sign_gradient="polynomial")),
        ("dorefa --weight-bits 4 --gradient-bits 8", lambda: quantize.DoReFa(4, 4, 8)),
        ("dorefa --weight-bits 1 --activation-bits 32 --no-scale-adjusted", lambda: quantize.DoReFa(1, None, scale_adjusted=False)),
    ],
)
def test_every_layer_but_the_ends(flags, expected):
    _, model = prepared("--weights", *flags.split())
    found = list(prepared_weights(model))
    assert {weight.quantizer.config for weight in found} == {expected()}
    assert len(found) == 18 and {"conv1", "fc"}.isdisjoint(weight.layer for weight in found)
    assert model(torch.randn(2, 1, 32, 32)).isfinite().all()


@pytest.mark.parametrize("arch", [*BINARY, "lenet", "resnet18", "mobilevit"])
def test_ends(arch):
    with torch.device("meta"):
        assert few_bits.ends(create_model(arch, 10)) == ["conv1", "fc"]


@pytest.mark.parametrize(("flags", "left_out"), [([], {"conv1", "fc"}), (["blocks.0.*", "fc"], {"blocks.0.conv1", "blocks.0.conv2", "fc"})])
@pytest.mark.parametrize("method", ["xnor", "dorefa"])
def test_float_layers_replace_the_ends(method, flags, left_out):
    _, model = prepared("--weights", method, "--float-layers", *flags)
    layers = {name for name, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert layers - {weight.layer for weight in prepared_weights(model)} == (left_out if flags else set())


def test_statistics_are_taken_anew_where_bits_are_few():
    found = {line: options.parse(line.split()).reestimate_bn for line in ("--weights xnor", "--weights dorefa", "--weights ternary", "")}
    assert found == {"--weights xnor": 100, "--weights dorefa": 100, "--weights ternary": 0, "": 0}
    assert options.parse(["--weights", "xnor", "--reestimate-bn", "0"]).reestimate_bn == 0


def test_rectifiers_leave_no_signs():
    with pytest.warns(
        UserWarning, match="the rectifiers of resnet20 leave no negative activations, so all signs are .1; take a model named"
    ):
        prepared("--weights", "xnor", arch="resnet20")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared("--weights", "xnor", "--activation-bits", "32", arch="resnet20")
        prepared("--weights", "dorefa", arch="resnet20")


def test_statistics_anew_before_each_test(train, tmp_path):
    """They are those of the last weights over the batches, and training goes on as without."""
    flags = ["--arch", "resnet20_q", "--weights", "dorefa"]
    _, plain, _ = train("plain", *flags, "--reestimate-bn", "0")
    _, last, log = train("anew", *flags, "--reestimate-bn", "2")
    moved = {name for name, value in last["model"].items() if not torch.equal(value, plain["model"][name])}
    assert moved and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)
    model = prepared("--weights", "dorefa")[1]
    model.load_state_dict(last["model"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, loader, _ = train_script.prepare(options.parse([*SMALL, *flags]), Processes.start("cpu"))
    batches = [images for images, _, _ in loader.epoch(0)][:2]
    quantize.reestimate_batch_norm(model, batches)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
    outputs = train("again", *flags, "--reestimate-bn", "2", "--evaluate", "--resume", tmp_path / "anew" / "last.pt")
    assert outputs[0] == 0 and log[-1]["test_top1"] is not None


@pytest.mark.parametrize(("arch", "width", "size"), [("nin_q", 192, 119_808), ("resnet20_q", 16, 35_072), ("resnet20_q", 32, 134_656)])
def test_bytes_of_the_file(arch, width, size, tmp_path):
    """A bit a binary weight, a scale a channel, what stays in full precision, and a header."""
    args = options.parse(["--arch", arch, "--weights", "xnor"])
    model = weights.prepare(create_model(arch, 10, 3, width), args)
    floats = 4 * sum(value.numel() for name, value in model.state_dict().items() if ".parametrizations." not in name)
    packed = quantize.convert(model.eval())
    layers = [module for module in packed.modules() if isinstance(module, quantize.PackedConv2d)]
    assert sum(layer.codes.nbytes for layer in layers) == size
    quantize.save(packed, tmp_path / "model.safetensors")
    scales = 4 * sum(layer.out_channels for layer in layers)
    assert size < (tmp_path / "model.safetensors").stat().st_size <= size + scales + floats + 16 * 1024
