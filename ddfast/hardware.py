"""What figures were measured on, without naming a machine."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Such as "AMD EPYC (Zen 5)": the maker's name, with the generation where the name alone does not give it."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    fourth = "avx512f" in fields.get("flags", "").split()
    generations = {"23": "Zen 1-2", "25": "Zen 4" if fourth else "Zen 3", "26": "Zen 5"}
    generation = generations.get(fields.get("cpu family", ""))
    return f"{name} ({generation})" if generation and "AMD" in name else name
