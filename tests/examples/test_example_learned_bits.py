"""Training with --weights diffq: what it learns, what survives an overflow, and what it says. (Bit-equal resuming, from a checkpoint and
from inside an epoch, is in test_example_resuming.py, with COMPRESSIONS' `diffq` and `diffq-same`.)"""

import engine
import learned_bits
import options
import pytest
import torch
import weights
from models import create_model
from small_runs import torchrun

import quantize

DEADLY = ["--weights", "diffq", "--amp", "fp16", "--clip-grad-norm", "1", "--bits-lr", "0.1", "--epochs", "2", "--limit-test", "8"]


def prepared(*flags):
    args = options.parse(["--arch", "lenet", "--weights", "diffq", *flags])
    return args, weights.prepare(create_model("lenet", 10, 1, width=4), args)


def all_finite(value):
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())


@pytest.fixture
def plant(monkeypatch):
    """Function calling `begin(model)` before the step `first` and those after it up to `last`, and what it returned after each."""

    def at(begin, first, last):
        original, count = engine.train_step, [0]

        def patched(run, *batch):
            count[0] += 1
            handle = begin(run.model) if first <= count[0] <= last else None
            original(run, *batch)
            if handle is not None:
                handle.remove()

        monkeypatch.setattr(engine, "train_step", patched)

    return at


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ("", "diffq-g8-p5"),
        ("--group-size 0 --penalty 0.5", "diffq-g0-p0.5"),
        ("--target-size 0.1", "diffq-g8-t0.1"),
        ("--target-size 0.1 --penalty 5 --bits-optimizer same", "diffq-g8-p5-t0.1-same"),
        ("--max-bits 8 --weight-activation-bits 8 --float-layers fc3", "diffq-g8-p5-b2-8-a8-float_fc3"),
    ],
)
def test_label(flags, label):
    args = options.parse(["--weights", "diffq", *flags.split()])
    assert weights.label(args) == options.label(args) == label


def test_every_layer_as_the_flags_say():
    _, model = prepared("--group-size", "4", "--min-bits", "3", "--max-bits", "9", "--init-bits", "5", "--weight-activation-bits", "8")
    configs = {weight.quantizer.config for weight in quantize.weight.prepare.prepared_weights(model)}
    assert configs == {quantize.DiffQ(4, 3, 9, 5, activation_bits=8)}
    assert len(quantize.weight_bits(model)) == 5


@pytest.mark.parametrize("kind", ["adam", "same"])
def test_where_the_bits_are(kind):
    args, model = prepared("--bits-optimizer", kind, "--weight-decay", "0.1", "--bits-lr", "0.5")
    main, bits = learned_bits.make_optimizers(args, model)
    logits = {p for name, p in model.named_parameters() if name.endswith("logits")}
    assert len(logits) == 5 and set(bits.group["params"]) == logits
    assert (bits.group["weight_decay"], bits.group["lr"], main.param_groups[0]["weight_decay"]) == (0, 0.5, 0.1)
    assert not logits & set(main.param_groups[0]["params"])
    assert sum(len(group["params"]) for group in main.param_groups) == len(list(model.parameters())) - (5 if kind == "adam" else 0)
    assert isinstance(bits.optimizer, torch.optim.Adam) if kind == "adam" else bits.optimizer is main
    run = engine.Run(args, None, model, model, main, None, bits=bits)
    assert run.optimizers == ([main, bits.optimizer] if kind == "adam" else [main])
    engine.set_learning_rates(run, 0.5)
    assert (main.param_groups[0]["lr"], bits.group["lr"]) == pytest.approx((0.05, 0.25))


def test_the_log_has_the_size_of_the_file(train, tmp_path, capsys):
    _, last, log = train("run", "--arch", "lenet", "--weights", "diffq", "--bits-lr", "0.3")
    assert log[-1]["bits"] < 7 and log[-1]["size_mib"] < log[0]["size_mib"] and log[-1]["skipped_steps"] == 0
    assert f"file {log[-1]['size_mib']:.3f} MiB, {log[-1]['bits']:.2f} bits" in capsys.readouterr().out
    _, model = prepared()
    model.load_state_dict(last["model"])
    report = quantize.size_report(model.eval())
    assert log[-1]["size_mib"] * 2**20 == pytest.approx(report.bytes, abs=10)
    assert learned_bits.average_bits(model) == pytest.approx(log[-1]["bits"])


def test_target_size(train):
    flags = ["--arch", "lenet", "--weights", "diffq", "--target-size", "0.02", "--bits-lr", "0.1", "--epochs", "20", "--training-only"]
    _, _, log = train("run", *flags)
    assert log[0]["size_mib"] > 0.025 and log[-1]["size_mib"] == pytest.approx(0.02, rel=0.01)
    with pytest.raises(ValueError, match=r"target_size must be at least 0.\d+ MiB, .*; got 0.001"):
        train("other", "--arch", "lenet", "--weights", "diffq", "--target-size", "0.001")


@pytest.mark.parametrize("kind", ["adam", "same"])
def test_a_bad_gradient_beside_the_bits(train, plant, capsys, kind):
    """What killed trainings of facebookresearch/diffq: the overflow is the main optimizer's, and clipping carries it to the bits, whose
    optimizer the scaler lets step."""
    plant(lambda model: model.conv1.bias.register_hook(lambda grad: grad * float("nan")), 5, 5)
    _, last, log = train("run", "--arch", "lenet", *DEADLY, "--bits-optimizer", kind)
    assert last["skipped"] == [1, 0] and log[-1]["skipped_steps"] == 1 and log[0]["skipped_steps"] == 0
    # Of one optimizer for all, the scaler skips the step as a whole: the guard never sees it.
    assert (last["bits"]["steps"], last["bits"]["skipped"]) == ((6, 1) if kind == "adam" else (5, 0))
    assert all_finite(last["model"]) and all_finite(last["optimizer"]) and all_finite(last["bits"])
    assert "1 of 6 steps were skipped" in capsys.readouterr().out


def test_an_overflow_in_the_forward_pass(train, plant, capsys):
    """Batch norms and the loss see it, the scaler skips the step; statistics, averages of the epoch and tests stay finite."""
    plant(lambda model: model.conv1.register_forward_hook(lambda module, inputs, output: output * float("inf")), 4, 4)
    status, last, log = train("run", *DEADLY)
    assert status == 0 and last["skipped"] == [1, 0]
    assert all_finite(last["model"])
    assert log[1]["skipped_steps"] == 1 and 0 < log[1]["train_loss"] < 10 and 0 < log[-1]["test_loss"] < 10
    assert "skipped 1" in capsys.readouterr().out


def test_what_overflows_for_ever_is_named(train, plant, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "PATIENCE", 3)
    plant(lambda model: model.conv1.register_forward_hook(lambda module, inputs, output: output * float("inf")), 2, 99)
    message = r"3 steps in a row were skipped .*; loss is nan at step 1 of epoch 2; the first layer to make it is conv1 \("
    with pytest.raises(FloatingPointError, match=message):
        train("run", *DEADLY)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["skipped"] == [2, 2] and all_finite(saved["model"])


def test_gradients_that_overflow_at_every_scale(train, plant, monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 3)
    plant(lambda model: model.fc.weight.register_hook(lambda grad: grad * float("inf")), 1, 99)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row were skipped .*; loss is 2.\d+ at step 3 of epoch 1, its scale 8192"):
        train("run", "--amp", "fp16")


def test_resumed_with_another_penalty(train, tmp_path):
    train("run", "--arch", "lenet", "--epochs", "1", "--weights", "diffq")
    with pytest.raises(ValueError, match="expected .*weights diffq-g8-p1; the file holds .*weights diffq-g8-p5"):
        train("other", "--arch", "lenet", "--weights", "diffq", "--penalty", "1", "--resume", tmp_path / "run" / "last.pt")
    with pytest.warns(UserWarning, match="other options .*: bits_lr 0.03 -> 0.1"):
        train(
            "other", "--arch", "lenet", "--epochs", "1", "--weights", "diffq", "--bits-lr", "0.1", "--resume", tmp_path / "run" / "last.pt"
        )


def test_learned_step(train):
    _, last, log = train("run", "--arch", "lenet", "--epochs", "1", "--weights", "lsq", "--weight-bits", "3")
    steps = {name: value for name, value in last["model"].items() if name.endswith("weight.0.step")}
    assert len(steps) == 5 and log[0]["test_loss"] < 3
    args = options.parse(["--arch", "lenet", "--weights", "lsq", "--weight-bits", "3"])
    begun = weights.prepare(create_model("lenet", 10, 1, width=4), args)
    assert weights.label(args) == "lsq-3" and learned_bits.average_bits(begun) == 3
    assert begun.conv1.parametrizations.weight[0].config == quantize.Uniform(3, scale="learned")


def test_ternary(train):
    _, last, log = train("run", "--arch", "lenet", "--epochs", "1", "--weights", "ternary")
    assert log[0]["test_loss"] < 3
    args = options.parse(["--arch", "lenet", "--weights", "ternary"])
    begun = weights.prepare(create_model("lenet", 10, 1, width=4), args)
    assert weights.label(args) == "ternary-2" and learned_bits.average_bits(begun) == 2
    assert begun.conv1.parametrizations.weight[0].config == quantize.Ternary()


def test_two_processes(tmp_path):
    flags = ["--arch", "lenet", "--epochs", "1", "--weights", "diffq", "--bits-lr", "0.3", "--clip-grad-norm", "1"]
    assert "2 processes agree" in torchrun("--workspace", str(tmp_path / "two"), *flags)
