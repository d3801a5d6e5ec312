"""The Adams solver as the numbers that the flow kernels take."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.flow.multistep import AdamsSolver, adams_tables

HISTORY = 6  # the most slopes that AdamsSolver allows


@lru_cache(maxsize=64)
def solver_tables(solver: AdamsSolver, device: torch.device) -> Tensor:
    """float32 [3, knots, HISTORY]: weights of the predictor and the corrector, and the knots in the first column.

    The first call for a solver copies to the device; make it before a CUDA graph is captured.
    """
    knots = [(rho,) for rho in solver.knots]
    rows = [[*row, *[0.0] * (HISTORY - len(row))] for table in (*adams_tables(solver), knots) for row in table]
    return torch.tensor(rows, dtype=torch.float32).view(3, len(knots), HISTORY).to(device)


def solver_numbers(solver: AdamsSolver) -> tuple[float, float, float, float, float]:
    """offset, shrink, certain, pair and log(prune), -inf for none."""
    log_prune = math.log(solver.prune) if solver.prune > 0 else -math.inf
    return solver.offset, solver.shrink, solver.certain, solver.pair, log_prune


@triton.jit
def combine(u, weights, ring, count, SLOT: tl.constexpr, FIRST: tl.constexpr, HISTORY: tl.constexpr):
    """u plus past slopes times ``weights`` [HISTORY] from the FIRST on, the newest of ``count`` slopes first.

    Slope n >= 1 lies at ``ring`` (pointers shaped as u) + (n mod 8) SLOT; slope 0 is zero.
    """
    for age in tl.static_range(FIRST, HISTORY):
        n = count + FIRST - age
        slope = tl.load(ring + (n & 7) * SLOT, mask=n > 0, other=0.0)
        u += tl.load(weights + age) * slope
    return u


@triton.jit
def decided(w1, w2, rest, certain, pair):
    """Whether the two largest weights decide a token, by more than sums of float32 may be off (1e-6)."""
    return (w1 > 1 - (certain * rest - 1e-6)) | (w1 + w2 > 1 - (pair * rest - 1e-6))
