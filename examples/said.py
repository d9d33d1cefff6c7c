"""How a script ends where its input or its training is at fault: with a line, not with a traceback."""

import sys
from collections.abc import Callable
from pathlib import Path


def said(main: Callable[[], int | None]) -> int:
    """main()'s exit status; 2 for what a flag is to blame for, 1 for numbers that are not finite, 130 after Ctrl-C."""
    own = Path(sys.argv[0]).name
    try:
        return main() or 0
    except KeyboardInterrupt:
        print(f"{own}: interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"{own}: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        if not str(error).startswith(("--", "dataset ")):  # such a message names the flag, or what the data lack; others are surprises
            raise
        print(f"{own}: {error}", file=sys.stderr)
        return 2
