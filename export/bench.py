"""How long an exported folder takes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch

from .engine import Engine

WARMUP, LEAST = 1, 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds of ``calls`` calls with ``batch`` images each; ``first_ms``, the very first, is not among them."""

    batch: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    first_ms: float
    calls: int

    def record(self) -> dict[str, Any]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


def latency(engine: Engine, batch: int, seconds: float) -> Latency:
    """Time :meth:`Engine.run` for about ``seconds``, at least ``LEAST`` calls after the first and ``WARMUP`` others."""
    labels = torch.arange(batch) % engine.manifest.shapes.num_classes
    feeds = engine.feeds(labels, 0, torch.arange(batch))

    def call() -> float:
        begin = time.perf_counter()
        engine.run(feeds)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return 1e3 * (time.perf_counter() - begin)

    first, times = call(), list[float]()
    for _ in range(WARMUP):
        call()
    begin = time.perf_counter()
    while len(times) < LEAST or time.perf_counter() - begin < seconds:
        times.append(call())
    cuts = quantiles(times, n=10, method="inclusive")
    return Latency(batch, median(times), cuts[1], cuts[7], first, len(times))
