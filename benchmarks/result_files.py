"""What lies under results/, and the machines and days it is of."""

import json

from results import FOLDER


def read(name: str) -> dict:
    """What a benchmark left, or nothing."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def machines_in(figures):
    """Those of a result: rows that an earlier run has left have their own."""
    if isinstance(figures, dict):
        own = figures.get("machine")
        yield from [own] if own else []
    for value in figures.values() if isinstance(figures, dict) else figures if isinstance(figures, list) else ():
        yield from machines_in(value)


def measured_on(names) -> str:
    """The machines and days of some results."""
    days: dict[str, set] = {}
    for machine in (machine for result in map(read, names) for machine in machines_in(result)):
        text = f"{machine['cpu']}, {machine['cores']} cores, PyTorch {machine['torch']}"
        days.setdefault(text, set()).add(machine["date"])
    found = [f"{text} ({', '.join(sorted(own))})" for text, own in sorted(days.items())]
    on_gpu = ", ".join(f"`{path.name}`" for path in sorted(FOLDER.glob("gpu_*.json")))
    return f"Measured on {'; '.join(found)}. On a GPU: {on_gpu or 'not yet measured'}."
