"""What lies under results/, and the machines and days it is of."""

import json

from results import FOLDER


def read(name: str, machine: str = "") -> dict:
    """What a benchmark left, on a second machine where one is named; or nothing."""
    path = FOLDER / machine / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def machines_in(figures):
    """Those of a result: rows that an earlier run has left have their own."""
    if isinstance(figures, dict):
        own = figures.get("machine")
        yield from [own] if own else []
    for value in figures.values() if isinstance(figures, dict) else figures if isinstance(figures, list) else ():
        yield from machines_in(value)


def others() -> list[str]:
    """The second machines, by their folders."""
    return sorted(path.parent.name for path in FOLDER.glob("*/kernels.json"))


def measured_on(names, machine: str = "") -> str:
    """The machines and days of some results."""
    days: dict[str, set] = {}
    for found in (found for name in names for found in machines_in(read(name, machine))):
        text = f"{found['cpu']}, {found['cores']} cores, PyTorch {found['torch']}"
        days.setdefault(text, set()).add(found["date"])
    found = [f"{text} ({', '.join(sorted(own))})" for text, own in sorted(days.items())]
    if machine:
        return f"Measured on {'; '.join(found)}."
    on_gpu = ", ".join(f"`{path.name}`" for path in sorted(FOLDER.glob("gpu_*.json")))
    return f"Measured on {'; '.join(found)}. On a GPU: {on_gpu or 'not yet measured'}."
