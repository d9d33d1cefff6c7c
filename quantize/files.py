"""safetensors files that are complete or not there at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat

from torch import Tensor


def path_of(path, who: str) -> str:
    """`path` as text; TypeError for what is none."""
    try:
        return os.fsdecode(path)
    except TypeError:
        raise TypeError(f"{who}: path must be a str, bytes or os.PathLike; got {type(path).__name__}") from None


def save_tensors(tensors: dict[str, Tensor], text: str, path, who: str) -> None:
    """Writes `tensors`, with `text` under "quantize" in the header. The file takes the place of an older one when it is complete.

    It has the older file's mode, else what the umask leaves; a symbolic link stays, and what it points to is replaced.

    Raises:
        TypeError: `path` is no path. FileNotFoundError: its folder is not there. IsADirectoryError. ValueError: `path` is something else
        that is no regular file, as a pipe.
    """
    from safetensors.torch import save_file  # here, so that training needs no more than PyTorch

    target = os.path.realpath(path_of(path, who))
    folder, mode = os.path.dirname(target), _mode(target, who)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{who}: path must be in a folder that exists; there is none at {folder}")
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # safetensors' own file is for nobody else to read
        mode = stat.S_IMODE(os.stat(temporary).st_mode) if mode is None else mode
        save_file(tensors, temporary, metadata={"quantize": text})
        os.chmod(temporary, mode)
        _to_disk(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):
        _to_disk(folder, os.O_RDONLY | os.O_DIRECTORY)


def _mode(target: str, who: str) -> int | None:
    """The permissions of the file that is there; None where there is none."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{who}: path must be a file; {target} is a folder")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{who}: path must be a regular file; {target} is something else")
    return stat.S_IMODE(mode)


def _to_disk(path: str, flags: int = os.O_RDWR) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
