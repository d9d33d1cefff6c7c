"""Files that are whole, or as they were: whatever stops the script while it writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path, to_disk: bool = False) -> Iterator[Path]:
    """A path beside `file`, to be written to; where the block ends without an error it takes the place of `file`.

    `to_disk`: not before the content is on the disk, so that the machine, too, may stop at any moment.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        if to_disk:
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write(file: Path, content: str | bytes) -> None:
    """`content` as the file's."""
    with replacing(file) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def try_out(file: Path) -> None:
    """OSError if `file` could not be written; it stays as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.touch()
    temporary.unlink()
