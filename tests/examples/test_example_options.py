import re
from pathlib import Path

import options
import pytest
import train
from models import create_model

from quantize import ActivationConfig


def config(*flags):
    args = options.parse(list(flags))
    return options.compression(args, create_model("resnet20", 10, width=4))


# The rows of ActNN's CIFAR table, and the defaults.
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--ca --cabits 4 --ibits 4 --no-pergroup --no-perlayer", {"bits": 4, "max_bits": 4, "group_size": "sample", "per_layer": False}),
        ("--cabits 2 --ibits 2 --pergroup False --perlayer False", {"bits": 2, "max_bits": 2, "group_size": "sample", "per_layer": False}),
        ("--ca True --cabits=2 --ibits=2 --pergroup=True --perlayer=False --usegradient=False", {"max_bits": 2, "per_layer": False}),
        ("--ca yes --cabits 2 --ibits 8 --no-perlayer --usegradient", {"per_layer": False, "use_gradient": True}),
        ("--cabits 2 --ibits 8 --perlayer --usegradient True", {"use_gradient": True}),
        ("--cabits 3 --no-usegradient", {"bits": 3}),
        ("--cabits 4 --ibits 4 --once", {"bits": 4, "max_bits": 4, "compress_once": True}),
        ("--no-ca", {"enabled": False}),
        ("--ca False", {"enabled": False}),
        ("", {}),
    ],
)
def test_original_flags(flags, expected):
    assert config("-c", "quantize", *flags.split()) == ActivationConfig(**expected)


def test_fanin_is_no_config():
    assert config("-c", "fanin", "--cabits", "4") is None
    assert config() is None


def test_qlinear_names_convolutions_and_linear_layers():
    chosen = config("-c", "qlinear", "--ibits", "2")
    assert list(chosen)[0] == "*" and chosen.pop("*") is None
    assert {"conv1", "layer3.2.conv2", "fc"} <= set(chosen) and len(chosen) == 20
    assert set(chosen.values()) == {ActivationConfig(max_bits=2)}


ACTNN = """--dataset cifar10 --arch preact_resnet56 --epochs 200 --num-classes 10 -j 0 --weight-decay 1e-4 --batch-size 128
    --label-smoothing 0 -c quantize --ca=True --cabits=2 --ibits=8 --pergroup=True --perlayer=True --usegradient=False
    --workspace results/tmp --gather-checkpoints data/cifar10"""


def test_originals_command_line():
    args = options.parse(ACTNN.split())
    assert (str(args.data_path), str(args.workspace), args.arch) == ("data/cifar10", "results/tmp", "preact_resnet56")
    assert args.gather_checkpoints and args.ca and not args.usegradient


def test_every_flag_decides_or_is_a_place():
    flags = set(vars(options.build_parser().parse_args([])))
    decisive = set(options.decisive(options.parse([])))
    assert decisive | set(options.PLACES) == flags and not decisive & set(options.PLACES)
    assert {"image_size", "deterministic", "limit_test", "float_layers"} <= decisive


def test_workspace_tells_runs_apart():
    flags = ["", "-c quantize", "-c qlinear", "-c quantize --ibits 2", "-c quantize --no-ca", "--seed 1", "--amp bf16", "--arch resnet56"]
    flags += ["-c quantize --amp bf16", "-c quantize --no-ca --amp bf16", "--weights po2 -c quantize --amp bf16"]
    flags += ["--weights po2", "--weights po2plus", "--weights po2 --weight-bits 3", "--weights po2 --weight-activation-bits 8"]
    flags += ["--weights xnor", "--weights xnor --activation-bits 32", "--weights xnor --rectify 0.9", "--weights xnor --rectify 0.99"]
    flags += ["--weights xnor --sign-gradient polynomial", "--weights xnor --float-layers", "--weights xnor --float-layers fc"]
    flags += ["--weights dorefa", "--weights dorefa --weight-bits 4", "--weights dorefa --activation-bits 4"]
    flags += ["--weights dorefa --gradient-bits 8", "--weights dorefa --no-scale-adjusted", "--weights ternary"]
    flags += ["--weights po2 --float-layers fc", "--weights po2 -c quantize", "--weights po2 --amp bf16", "--weights uniform"]
    assert len({options.parse(line.split()).workspace for line in flags}) == len(flags)
    assert str(options.parse(["--weights", "po2plus"]).workspace) == "runs/mnist5k-resnet20-po2plus-4-seed0"
    assert str(options.parse(["-c", "quantize"]).workspace) == "runs/mnist5k-resnet20-quantize-2-8-group-layer-seed0"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch resnet21", "--arch"),
        ("--dataset svhn", "--dataset"),
        ("--ca maybe", "argument --ca: expected True or False; got 'maybe'"),
        ("--cabits 4 --ibits 2", r"--ibits must be at least --cabits \(4\); got 2"),
        ("--cabits 0.5", "--cabits must be at least 1; got 0.5"),
        ("--ibits 5", "--ibits must be 1, 2, 4 or 8; got 5"),
        ("--cabits inf", "argument --cabits: expected a finite number; got 'inf'"),
        ("--ibits nan", "argument --ibits: expected a finite number; got 'nan'"),
        ("--limit-train 0", "--limit-train must be at least 1 if given; got 0"),
        ("--limit-train -5", "--limit-train must be at least 1 if given; got -5"),
        ("--limit-test 0", "--limit-test must be at least 1 if given; got 0"),
        ("--width 0", "--width must be at least 1 if given; got 0"),
        ("--num-classes 0", "--num-classes must be at least 1 if given; got 0"),
        ("--lr nan", "--lr must be finite; got nan"),
        ("--weight-decay nan", "--weight-decay must be finite; got nan"),
        ("--batch-size 0", "--batch-size must be at least 1; got 0"),
        ("--lr -1", "--lr must not be negative; got -1.0"),
        ("--label-smoothing 1", r"--label-smoothing must be in \[0, 1\); got 1.0"),
        ("--epochs 2 --lr-warmup-epochs 3", r"--lr-warmup-epochs must be at most --epochs \(2\); got 3.0"),
        ("--evaluate", "--evaluate needs --resume"),
        ("--weights po3", "--weights"),
        ("--weights po2 --weight-bits 9", "--weight-bits must be from 2 to 8; got 9"),
        ("--weights uniform --activation-bits 1", "--activation-bits must be from 2 to 8, or 32 for none; got 1"),
        ("--weights uniform --weight-activation-bits 9", "--activation-bits must be from 2 to 8, or 32 for none; got 9"),
        ("--weight-bits 4", r"--weight-bits belongs to --weights po2\|po2plus\|uniform"),
        ("--activation-bits 8", r"--activation-bits belongs to --weights po2\|.*\|diffq$"),
        ("--float-layers fc", "--float-layers belongs to --weights"),
        ("--weights diffq --weight-bits 4", r"--weight-bits belongs to --weights po2\|po2plus\|uniform\|lsq\|ternary\|xnor\|dorefa$"),
        ("--weights ternary --weight-bits 4", "--weight-bits must be 2 with --weights ternary; got 4"),
        ("--weights xnor --weight-bits 2", "--weight-bits must be 1 with --weights xnor; got 2"),
        ("--weights xnor --activation-bits 2", "--activation-bits must be 1 with --weights xnor, or 32 for none; got 2"),
        ("--weights dorefa --weight-bits 9", "--weight-bits must be from 1 to 8 or 16 with --weights dorefa; got 9"),
        (
            "--weights dorefa --activation-bits 0",
            "--activation-bits must be from 1 to 8 or 16 with --weights dorefa, or 32 for none; got 0",
        ),
        ("--weights dorefa --gradient-bits 1", "--gradient-bits must be from 2 to 8, 16 or 32; got 1"),
        ("--weights xnor --gradient-bits 8", "--gradient-bits belongs to --weights dorefa"),
        ("--weights dorefa --rectify 0.9", "--rectify belongs to --weights xnor"),
        ("--weights xnor --rectify 0.4", "--rectify must be above 0.5 and at most 1; got 0.4"),
        ("--weights dorefa --sign-gradient clip", "--sign-gradient belongs to --weights xnor"),
        ("--weights xnor --sign-gradient ste", "--sign-gradient"),
        ("--weights ternary --no-scale-adjusted", "--scale-adjusted belongs to --weights dorefa"),
        ("--reestimate-bn -1", "--reestimate-bn must not be negative; got -1"),
        ("--weights lsq --group-size 8", "--group-size belongs to --weights diffq"),
        ("--target-size 1", "--target-size belongs to --weights diffq"),
        ("--weights diffq --group-size -1", "--group-size must not be negative; got -1"),
        ("--weights diffq --penalty nan", "--penalty must not be negative; got nan"),
        ("--weights diffq --target-size 0", "--target-size must be above 0; got 0.0"),
        ("--weights diffq --init-bits 16", "must be from 1 to 16 and in this order; got 2, 16 and 15"),
        ("--weights diffq --bits-optimizer sgd", "--bits-optimizer"),
        ("--weights diffq --penalty inf", "--penalty must be finite; got inf"),
        ("--weights diffq --target-size inf", "--target-size must be finite; got inf"),
        ("--weights diffq --bits-lr inf", "--bits-lr must be finite; got inf"),
        (
            "--weights diffq --min-bits 2.2 --max-bits 2.8 --init-bits 2.5",
            "--min-bits to --max-bits must hold a whole number; got 2.2 to 2.8",
        ),
        ("--lr-scheduler step --lr-milestones 4 -3", "--lr-milestones must not be negative; got 4 -3"),
        ("--seed 4294967296", "--seed must be below 4294901760; got 4294967296"),
        ("--clip-grad-norm 0", "--clip-grad-norm must be above 0; got 0.0"),
        ("--resume a --resume2 b", "--resume2 belongs to --evaluate --training-only"),
        ("--evaluate --training-only --resume a --resume2 b", r"--resume2 belongs to -c quantize\|qlinear"),
        ("--cabits 4", r"--cabits belongs to -c quantize\|qlinear"),
        ("--no-perlayer", r"--perlayer belongs to -c quantize\|qlinear"),
        ("--usegradient", r"--usegradient belongs to -c quantize\|qlinear"),
        ("--once", r"--once belongs to -c quantize\|qlinear"),
        ("-c qlinear --once", "--once belongs to -c quantize: with -c qlinear"),
        ("--ibits 8", r"--ibits belongs to -c quantize\|qlinear"),  # what it is anyway
        ("--lr-milestones 1", "--lr-milestones belongs to --lr-scheduler step"),
        ("--image-size 224", "--image-size belongs to --dataset imagenet"),
        ("--evaluate --resume a --draws 3", "--draws belongs to --evaluate --training-only"),
        ("--batches 3", "--batches belongs to --evaluate --training-only"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        options.parse(flags.split())
    assert re.search(message, capsys.readouterr().err)


def test_a_resume_does_not_overwrite_another_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = options.parse([]).workspace
    for folder in (own, Path("other")):
        folder.mkdir(parents=True)
        (folder / "last.pt").touch()
    for more in ([], ["--workspace", str(own)]):
        with pytest.raises(SystemExit):
            options.parse(["--resume", "other/last.pt", *more])
        text = f"--resume: going on from other/last.pt would overwrite another run in {own}; name another --workspace"
        assert text in capsys.readouterr().err
    assert options.parse(["--resume", "other/last.pt", "--seed", "1"]).resume == Path("other/last.pt")  # there is no such run yet
    for more in (["--resume", str(tmp_path / own / "epoch-0001.pt")], ["--resume", "other/last.pt", "--evaluate"]):
        assert options.parse(more).workspace == own


def test_help_names_every_default():
    text = " ".join(options.build_parser().format_help().split())
    assert "default: None" not in text and "(default: 128)" in text and "--no-perlayer: off (default: True)" in text


def test_too_few_classes(tmp_path):
    with pytest.raises(ValueError, match="--num-classes: expected at least the 10 of digits; got 4"):
        train.main(["--dataset", "digits", "--num-classes", "4", "--workspace", str(tmp_path)])


def test_schedules():
    from schedule import learning_rate

    cosine = [learning_rate("cosine", 1.0, epoch, 10, warmup=2) for epoch in (0, 1, 2, 6, 10)]
    assert cosine == pytest.approx([0, 0.5, 1, 0.5, 0])
    step = [learning_rate("step", 1.0, epoch, 10, milestones=(5, 8)) for epoch in (0, 4.9, 5, 8.5)]
    assert step == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize(("epochs", "milestones"), [(1, []), (2, [1]), (3, [1, 2]), (100, [50, 75])])
def test_default_milestones(epochs, milestones):
    args = options.parse(["--lr-scheduler", "step", "--epochs", str(epochs)])
    assert args.lr_milestones == milestones
    assert options.parse(["--epochs", str(epochs)]).lr_milestones is None


def test_variances_need_two_batches(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--evaluate", "--training-only", "--resume", "x.pt", "--batches", "1"])
    assert "--batches must be at least 2; got 1" in capsys.readouterr().err
