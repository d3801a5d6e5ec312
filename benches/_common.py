"""Shared by the benches: what the hardware is, how to time, how to write the figures down."""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import ddfast
from ddfast.hardware import cpu_name

RESULTS = Path(__file__).parent / "results"


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on: CPU and cores, GPU if ``device`` is one, and versions. Names no machine."""
    facts: dict[str, Any] = {
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    facts["versions"] = {"ddfast": ddfast.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return facts


def measure(run: Callable[[], object], *, repeats: int = 10, warmup: int = 2, device: str = "cpu") -> dict[str, float]:
    """Seconds a call: median, p20 and p80 over ``repeats`` calls after ``warmup`` that do not count."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds = []
    for _ in range(warmup + repeats):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - begin)
    cuts = quantiles(seconds[warmup:], n=10, method="inclusive")
    return {"median_s": cuts[4], "p20_s": cuts[1], "p80_s": cuts[7]}


def compare(
    runs: Mapping[str, Callable[[], object]], *, repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, dict[str, float]]:
    """Seconds a call of each, the least and the median of ``repeats``, after one call that does not count.

    They take turns, so that whatever else the machine does meets all of them. The default clock is this process' CPU
    time, right for one thread; ``time.perf_counter`` for more.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            seconds[name].append(clock() - begin)
    return {name: {"min_s": min(all_[1:]), "median_s": median(all_[1:])} for name, all_ in seconds.items()}


def free(device: torch.device) -> None:
    """Give back what nobody refers to, and count the most memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def finish(figures: dict[str, Any], out: Path) -> None:
    """Write the figures to ``out`` and print them as one JSON object, the bench's last line."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))
