"""Where benchmarks leave their figures: results/NAME.json, with the machine they were taken on.

QUANTIZE_RESULTS=zen4 in the environment: results/zen4/NAME.json, for a second machine beside the one that README has.
"""

import json
import os
from pathlib import Path

from machine import describe

FOLDER = Path(__file__).parent / "results" / os.environ.get("QUANTIZE_RESULTS", "")


def write(name: str, figures: dict, path: Path | None = None) -> Path:
    """Writes {"machine": ..., **figures} as JSON, whole or not at all."""
    path = path or FOLDER / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": describe(), **figures}, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"written to {path}")
    return path


def merged(name: str, part: str, new, by: tuple[str, ...] = (), **settings):
    """`new`, and what results/NAME.json holds in `part` beside it, with a "machine" of its own: of a run that measured only some of all.

    Rows (a list) are told apart by the columns `by`, other figures (a dict) by their keys. From a file of other `settings` nothing is kept.
    """
    path = FOLDER / f"{name}.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    if any(held.get(setting) != value for setting, value in settings.items()):
        return new
    listed = isinstance(new, list)
    fresh, old = ({tuple(row[key] for key in by): row for row in rows} if listed else rows for rows in (new, held.get(part, type(new)())))
    found = {key: fresh.get(key) or {"machine": held["machine"], **row} for key, row in old.items()} | fresh
    return list(found.values()) if listed else found
