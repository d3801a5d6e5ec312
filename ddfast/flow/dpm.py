"""DPM-Solver++ (arXiv 2211.01095), multistep with data prediction, in the variables of ``field``.

In z = x / (1 - t) the exponential integrator of the paper loses its exponential part: with lambda = log r the exact
solution is

    z(r_1) = z(r_0) + int_{lambda_0}^{lambda_1} e^lambda D dlambda,

and the solver expands D around lambda_0 from the last one, two or three evaluations. Every step is thus a fixed linear
combination of past D, whose weights depend on the knots only. Order 1 is Euler's method, in z as well as in x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow.field import CodebookFlow
from ddfast.flow.schedules import time_knots
from ddfast.flow.solver import FlowResult, Solver, check_count, check_noise

LOWER_ORDER_END = ("never", "short", "always")


@dataclass(frozen=True)
class DPMSolver(Solver):
    """DPM-Solver++ multistep with the read-out of the nearest code in the whole codebook.

    nfe: evaluations, one a step (with ``denoise`` one of them is the last projection x = D, not a step).
    order: 1, 2 or 3; the first steps use what history there is.
    skip: "time_uniform" or "logSNR", the spacing of the knots from t_start to t_end (0 <= t_start < t_end < 1; a log
        SNR grid needs t_start > 0). The noise is taken to be x at t_start.
    lower_order_end: whether the last two steps fall to order 2 and 1: "never", "always", or "short", the public
        code's rule, below 10 steps only.
    denoise: end with one evaluation at t_end and x = D.

    Measured agreement with the exact flow stands with the named settings in ``registry``. The nearest code may be one
    of zero probability.
    """

    kind: ClassVar[str] = "dpm"
    nfe: int
    order: int = 3
    skip: str = "time_uniform"
    t_start: float = 0.001
    t_end: float = 0.999
    lower_order_end: str = "short"
    denoise: bool = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UserError(f"order must be 1, 2 or 3, not {self.order!r}")
        check_count(self.kind, self.nfe, self.order + self.denoise, 10_000)
        if self.lower_order_end not in LOWER_ORDER_END:
            raise UserError(
                f"lower_order_end must be one of {', '.join(LOWER_ORDER_END)}, not {self.lower_order_end!r}"
            )
        self.times()  # checks skip, t_start and t_end

    def times(self) -> tuple[float, ...]:
        """The knots t_0 < ... < t_steps (float64)."""
        return time_knots(self.skip, self.t_start, self.t_end, self.nfe - self.denoise)

    def solve(self, flow: CodebookFlow, noise: Tensor) -> FlowResult:
        """See ``Solver.solve``."""
        *_, x = self.states(flow, noise)
        free_start = self.t_start == 0.0
        evaluations = torch.full((len(x),), self.nfe - free_start, dtype=torch.int32, device=x.device)
        return FlowResult(flow.nearest(x), x, evaluations)

    def states(self, flow: CodebookFlow, noise: Tensor) -> Iterator[Tensor]:
        """x [N, C] at each knot, the noise itself first; with ``denoise`` one more, the last D."""
        check_noise(flow, noise)
        times = self.times()
        ratios = [t / (1 - t) for t in times]
        yield noise
        z = noise / (1 - times[0])
        history: list[Tensor] = []  # D at the last knots, newest first
        for step, r in enumerate(ratios[1:], start=1):
            mean, _ = flow.posterior(z, ratios[step - 1])
            history = [mean, *history][: self.order]
            order = min(self._order_at(step, len(times) - 1), len(history))
            for weight, past in zip(_weights(ratios[step - order : step + 1], order), history, strict=False):
                z = z + weight * past
            yield z / (1 + r)
        if self.denoise:
            yield flow.posterior(z, ratios[-1])[0]

    def _order_at(self, step: int, steps: int) -> int:
        lower = self.lower_order_end == "always" or (self.lower_order_end == "short" and steps < 10)
        return min(self.order, steps + 1 - step) if lower else self.order


def _weights(ratios: list[float], order: int) -> tuple[float, ...]:
    """Weights of D, newest first, for the step between the last two of order + 1 ratios.

    These are the published multistep updates. Their third-order term carries phi_3, half of what the quadratic
    interpolant would give; it is kept, since the solver is here to reproduce published results.
    """
    *past, start, end = ratios
    if order == 1:
        return (end - start,)
    lam_end, lam_0 = math.log(end), math.log(start)
    lam_1 = _log(past[-1])
    h = lam_end - lam_0
    gap_0 = (lam_0 - lam_1) / h
    phi_1 = math.expm1(-h)
    if order == 2:
        slope = -0.5 * end * phi_1 / gap_0
        return (end - start + slope, -slope)
    gap_1 = (lam_1 - _log(past[-2])) / h
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    # D' = a (m0 - m1) + b (m1 - m2) and D'' = c (m0 - m1) - d (m1 - m2), by divided differences
    blend = gap_0 / (gap_0 + gap_1)
    a, b = (1 + blend) / gap_0, -blend / gap_1
    c, d = 1 / (gap_0 + gap_1) / gap_0, 1 / (gap_0 + gap_1) / gap_1
    newest = end * (phi_2 * a - phi_3 * c)
    older = end * (phi_2 * b + phi_3 * d)
    return (end - start + newest, older - newest, -older)


def _log(r: float) -> float:
    """log r, with -inf at the start of the flow: a point infinitely far back, whose differences count for nothing."""
    return math.log(r) if r > 0 else -math.inf
