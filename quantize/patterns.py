"""Configurations by module name: a mapping from glob patterns is taken wherever a configuration is."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping


def resolve(config, name: str):
    """The config in force for the module `name`: of a mapping from glob patterns the last match wins."""
    if not isinstance(config, Mapping):
        return config
    found = None
    for pattern, value in config.items():
        if fnmatch.fnmatchcase(name, pattern):
            found = value
    return found


def check(config, kinds: tuple[type, ...], who: str):
    """`config` itself if it is of one of `kinds`, or a mapping from patterns to these or None; TypeError otherwise."""
    *most, last = [f"{'an' if kind.__name__[0] in 'AEIOX' else 'a'} {kind.__name__}" for kind in kinds]
    names = f"{', '.join(most)} or {last}" if most else last
    if not isinstance(config, Mapping):
        if not isinstance(config, kinds):
            raise TypeError(f"{who}: config must be {names} or a mapping from glob patterns to it; got {config!r}")
        return config
    for pattern, value in config.items():
        if not isinstance(pattern, str):
            raise TypeError(f"{who}: config's keys must be glob patterns over module names; got {pattern!r}")
        if not isinstance(value, (*kinds, type(None))):
            raise TypeError(f"{who}: config must be {names} for {pattern!r}; got {value!r}")
    return config


def exactly(name: str) -> str:
    """The pattern that fits this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def unmatched(config, names: list[str]) -> list[str]:
    """The patterns of `config` that fit none of `names`."""
    return [p for p in config if not any(fnmatch.fnmatchcase(n, p) for n in names)] if isinstance(config, Mapping) else []
