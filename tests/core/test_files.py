"""Where files go, and with which permissions: packed models and sensitivities alike."""

import os
import stat

import pytest
import torch
from torch import nn

import quantize
from quantize.files import save_tensors


def packed():
    return quantize.convert(quantize.prepare(nn.Linear(4, 4), quantize.Uniform(4)))


def sensitivity():
    one, cost = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.long)
    return quantize.Sensitivity(["fc"], [(4, None)], one, cost, cost.clone())


WRITERS = {"save": lambda path: quantize.save(packed(), path), "Sensitivity.save": lambda path: sensitivity().save(path)}
every_writer = pytest.mark.parametrize(("who", "write"), WRITERS.items(), ids=WRITERS)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@every_writer
def test_permissions(who, write, tmp_path):
    torch.save({}, tmp_path / "other")
    before = os.umask(0o027)
    try:
        write(tmp_path / "umask")
        assert mode(tmp_path / "umask") == 0o640
        os.umask(0o022)
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o644
    os.chmod(tmp_path / "new", 0o664)
    write(tmp_path / "new")
    assert mode(tmp_path / "new") == 0o664


@every_writer
def test_links_stay(who, write, tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "model", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(os.path.join("folder", "model"))
    write(link)
    assert link.is_symlink() and target.stat().st_size > 100
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "folder" / "new")
    write(dangling)
    assert dangling.is_symlink() and sorted(os.listdir(tmp_path / "folder")) == ["model", "new"]


@every_writer
def test_what_is_no_file_is_refused(who, write, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"{who}: path must be a regular file; .*pipe is something else"):
        write(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError, match=f"{who}: path must be a file; {tmp_path} is a folder"):
        write(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{who}: path must be in a folder that exists; there is none at {tmp_path / 'none'}"):
        write(tmp_path / "none" / "file")
    for path in (None, 5, ["x"]):
        with pytest.raises(TypeError, match=f"{who}: path must be a str, bytes or os.PathLike; got {type(path).__name__}"):
            write(path)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_readers_take_paths_only(tmp_path):
    for read, who in ((lambda path: quantize.load(nn.Linear(4, 4), path), "load"), (quantize.Sensitivity.load, "Sensitivity.load")):
        for path in (None, 0):
            with pytest.raises(TypeError, match=f"{who}: path must be a str, bytes or os.PathLike; got {type(path).__name__}"):
                read(path)


@every_writer
def test_bytes_are_paths(who, write, tmp_path):
    write(os.fsencode(tmp_path / "file"))
    assert os.listdir(tmp_path) == ["file"]
    if who == "save":
        quantize.load(nn.Linear(4, 4), os.fsencode(tmp_path / "file"))


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(Exception, match="contiguous"):
        save_tensors({"x": torch.ones(3, 4).t()}, "", tmp_path / "file", "save")
    assert not os.listdir(tmp_path)
