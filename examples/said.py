"""How a script ends where its input or its training is at fault: with a line, not with a traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What a message for the user begins with: the flag or argument, data set, log or package it is about. Others are surprises.
NAMES = ("--", "FOLDER: ", "dataset ", "log ", "package ")


def said(main: Callable[[], int | None]) -> int:
    """main()'s exit status; 2 for what a flag is to blame for, 1 for numbers that are not finite, 130 after Ctrl-C."""
    own = Path(sys.argv[0]).name
    try:
        return main() or 0
    except KeyboardInterrupt:
        print(f"{own}: interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"{own}: {line(error)}", file=sys.stderr)
        return 1
    except (ImportError, OSError, ValueError) as error:
        if not str(error).startswith(NAMES):
            raise
        print(f"{own}: {line(error)}", file=sys.stderr)
        return 2


def line(error: object) -> str:
    """The message in one line, as PyTorch's are not."""
    return " ".join(part.strip() for part in str(error).splitlines())


@contextmanager
def blaming(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds in the block are the fault of `name`, a flag, and begin with it; those that name theirs stay as they are."""
    try:
        yield
    except kinds as error:
        if str(error).startswith(NAMES):
            raise
        raise ValueError(f"{name}: {error}") from error
