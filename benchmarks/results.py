"""Where benchmarks leave their figures: results/NAME.json, with the machine they were taken on."""

import json
import os
from pathlib import Path

from machine import describe

FOLDER = Path(__file__).parent / "results"


def write(name: str, figures: dict, path: Path | None = None) -> Path:
    """Writes {"machine": ..., **figures} as JSON, whole or not at all."""
    path = path or FOLDER / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": describe(), **figures}, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"written to {path}")
    return path
