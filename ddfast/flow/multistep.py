"""The default solver: an Adams predictor-corrector on the preconditioned flow, in units of each token's own scale.

Three changes of variable make the flow of any token look alike and nearly straight:

- *Its own units.* rho = r / R*, with R* the natural scale of ``CodebookFlow.moments``, so that knots in rho, and with
  them the weights of the method, are shared by all tokens.
- *The Gaussian part solved exactly.* If the codes under p were normal with mean m and per-channel std s, D would be
  m + s^2 r (z - r m) / g^2 with g^2 = 1 + r^2 s^2, and u = (z - r m) / g would stay put. So u is what is followed (with
  ``shrink`` s in place of s, since the flow leaves the Gaussian regime as it decides):

      du/dr = (D - m - s^2 r u / g) / g.

- *A stretched clock.* Polynomials in sigma = log(offset + rho) fit du/dsigma better than polynomials in rho.

Each knot costs one evaluation: predict u from the past slopes (Adams-Bashforth), evaluate D there, correct u with that
slope (Adams-Moulton). At rho = 0 the slope is exactly zero and costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow.field import CodebookFlow, Moments
from ddfast.flow.solver import ActiveRows, FlowResult, Solver, check_noise


@dataclass(frozen=True)
class AdamsSolver(Solver):
    """Predictor-corrector Adams multistep; the token is settled as between two codes, see ``CodebookFlow.settle``.

    knots: rho = r / R* of the evaluations, ascending and above 0; at most one evaluation each (the mean of p at
        rho = 0, a by-product of R*, is not counted).
    offset, shrink: see the module.
    predictor, corrector: points the two polynomials run through (1-6), fewer while history is short.
    certain: a token is done, and drops out, once its best weight w has 1 - w < certain (1 - max p): once the odds
        against it have fallen that much. So the average number of evaluations is below len(knots). The measure is
        relative to p, or else peaked distributions would never draw from their tails.

    Zero-probability tokens are never drawn. With the knots of ``adams_knots`` the share of tokens equal to the exact
    flow's is 96.5-99.3% at nfe 4, 98.3-99.8% at 6, 99.1-99.9% at 8, 99.5-99.98% at 10 and 99.7-100% at 14: ranges over
    the families of ``benches/results/solvers.json``.
    """

    kind: ClassVar[str] = "adams"
    knots: tuple[float, ...]
    offset: float = 0.6
    shrink: float = 0.8
    predictor: int = 4
    corrector: int = 4
    certain: float = 0.02

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.knots), self.knots, strict=False))
        if not self.knots or not rising or not math.isfinite(self.knots[-1]):
            raise UserError(f"knots must be finite, ascending and above 0, not {self.knots!r}")
        if not (self.offset > 0 and 0 <= self.shrink <= 2 and 0 <= self.certain < 0.5):
            raise UserError(
                "offset must be above 0, shrink in [0, 2] and certain in [0, 0.5), not "
                f"{self.offset!r}, {self.shrink!r} and {self.certain!r}"
            )
        if not (1 <= self.predictor <= 6 and 1 <= self.corrector <= 6):
            raise UserError(f"predictor and corrector must lie in 1-6, not {self.predictor!r} and {self.corrector!r}")

    def solve(self, flow: CodebookFlow, noise: Tensor) -> FlowResult:
        """See ``Solver.solve``."""
        check_noise(flow, noise)
        active = ActiveRows(flow, noise)
        at = self._start(flow.moments(), noise)
        for rho, predict, correct in zip(self.knots, *_adams_weights(self), strict=True):
            r = rho * at.scale
            g = (1 + (r * at.std).square()).sqrt()
            guess = at.u + _combine(predict, at.slopes)
            z = g * guess + r * at.mean
            mean, weights = active.evaluate(z, r[:, 0])
            pull = (mean - at.mean - at.std.square() * r * guess / g) / g
            slope = (self.offset + rho) * at.scale * pull
            at.slopes = torch.cat([slope[None], at.slopes])[: max(self.predictor, self.corrector)]
            at.u = at.u + _combine(correct, at.slopes)
            done = weights.amax(dim=1) > (at.enough if rho < self.knots[-1] else 0.0)
            left = active.retire(done, weights, g * at.u + r * at.mean, r[:, 0])
            if left is not None:
                at = at.rows(left)
        return active.result()

    def _start(self, moments: Moments, noise: Tensor) -> _State:
        """All tokens at rho = 0, where u is the noise and its slope zero."""
        return _State(
            u=noise,
            mean=moments.mean,
            std=self.shrink * moments.std[:, None],
            scale=moments.scale[:, None],
            enough=1 - self.certain * moments.rest,
            slopes=torch.zeros_like(noise)[None],
        )


@dataclass
class _State:
    """Where n tokens stand."""

    u: Tensor  # [n, C]
    mean: Tensor  # [n, C]
    std: Tensor  # [n, 1]
    scale: Tensor  # [n, 1]
    enough: Tensor  # [n], the weight at which a token is certain
    slopes: Tensor  # [history, n, C], du/dsigma, newest first

    def rows(self, index: Tensor) -> _State:
        per_row = (self.u, self.mean, self.std, self.scale, self.enough)
        u, mean, std, scale, enough = (value[index] for value in per_row)
        return _State(u, mean, std, scale, enough, self.slopes[:, index])


def _combine(weights: tuple[float, ...], slopes: Tensor) -> Tensor:
    """Sum of weight times slope over the newest len(weights) of slopes [history, n, C]."""
    w = torch.tensor(weights, dtype=slopes.dtype, device=slopes.device)
    return torch.einsum("h,hnc->nc", w, slopes[: len(weights)])


@lru_cache(maxsize=64)
def _adams_weights(solver: AdamsSolver) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
    """Weights of past slopes, newest first, for the predictor and the corrector of each knot (float64)."""
    sigmas = [math.log(solver.offset + rho) for rho in (0.0, *solver.knots)]
    predict, correct = [], []
    for step in range(1, len(sigmas)):
        known, reached = sigmas[max(0, step - solver.predictor) : step], sigmas[: step + 1][-solver.corrector :]
        predict.append(_integral_weights(known[::-1], sigmas[step - 1], sigmas[step]))
        correct.append(_integral_weights(reached[::-1], sigmas[step - 1], sigmas[step]))
    return tuple(predict), tuple(correct)


def _integral_weights(nodes: list[float], start: float, end: float) -> tuple[float, ...]:
    """The w with sum_i w_i f(node_i) = integral of f from start to end, for polynomials f of degree < len(nodes)."""
    powers = np.arange(len(nodes))
    moments = ((end - start) ** (powers + 1)) / (powers + 1)
    vandermonde = (np.asarray(nodes) - start)[None, :] ** powers[:, None]
    return tuple(float(w) for w in np.linalg.solve(vandermonde, moments))
