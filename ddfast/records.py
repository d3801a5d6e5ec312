"""Two records of settings side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = 24  # characters of a value: hashes are longer


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """``name is OLD, not NEW`` for every entry that differs; entries of nested records as ``record.name``."""
    lines = []
    for name in sorted(there.keys() | wanted.keys()):
        old, new = there.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{name}.{line}" for line in differences(old, new)]
        elif old != new:
            lines.append(f"{name} is {shortened(old)}, not {shortened(new)}")
    return lines


def shortened(value: object) -> str:
    text = str(value)
    hexadecimal = len(text) > SHOWN and set(text) <= set("0123456789abcdef")
    return text[:16] + "…" if hexadecimal else text
