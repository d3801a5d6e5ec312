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

_ROUNDING = 1e-6  # what float32 sums of weights may be off by


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
    pair: a token is also done once its two best weights together have 1 - w1 - w2 < pair (1 - max p), since between
        two codes the rest of the way is known.
    prune: after each evaluation, the one at rho = 0 included, entries that together have less than prune (1 - max p) of
        the weight are let go, those of less than an equal share of it: they are no longer computed, nor ever drawn. 0
        keeps all. With two left a token is done.

    Zero-probability tokens are never drawn. How often the token is the exact flow's stands with the named settings in
    ``registry``.
    """

    kind: ClassVar[str] = "adams"
    knots: tuple[float, ...]
    offset: float = 0.7
    shrink: float = 0.85
    predictor: int = 5
    corrector: int = 5
    certain: float = 0.03
    pair: float = 0.04
    prune: float = 2e-3

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.knots), self.knots, strict=False))
        if not self.knots or not rising or not math.isfinite(self.knots[-1]):
            raise UserError(f"knots must be finite, ascending and above 0, not {self.knots!r}")
        if not (self.offset > 0 and 0 <= self.shrink <= 2):
            raise UserError(f"offset must be above 0 and shrink in [0, 2], not {self.offset!r} and {self.shrink!r}")
        for name in ("certain", "pair", "prune"):
            if not 0 <= getattr(self, name) < 0.5:
                raise UserError(f"{name} must lie in [0, 0.5), not {getattr(self, name)!r}")
        if not (1 <= self.predictor <= 6 and 1 <= self.corrector <= 6):
            raise UserError(f"predictor and corrector must lie in 1-6, not {self.predictor!r} and {self.corrector!r}")

    def solve(self, flow: CodebookFlow, noise: Tensor) -> FlowResult:
        """See ``Solver.solve``."""
        check_noise(flow, noise)
        active = ActiveRows(flow, noise)
        moments = flow.moments()
        at = self._start(moments, noise)
        undecided = torch.zeros(len(flow), dtype=torch.bool, device=noise.device)
        at = self._let_go(active, at, undecided, flow.log_p.exp(), noise, torch.zeros_like(moments.scale))
        for rho, predict, correct in zip(self.knots, *adams_tables(self), strict=True):
            r = rho * at.scale
            g = (1 + (r * at.std).square()).sqrt()
            guess = at.u + _combine(predict, at.slopes)
            z = g * guess + r * at.mean
            mean, weights = active.evaluate(z, r[:, 0])
            pull = (mean - at.mean - at.std.square() * r * guess / g) / g
            slope = (self.offset + rho) * at.scale * pull
            at.slopes = torch.cat([slope[None], at.slopes])[: max(self.predictor, self.corrector)]
            at.u = at.u + _combine(correct, at.slopes)
            decided = self._decided(weights, at.rest) | (rho == self.knots[-1])
            at = self._let_go(active, at, decided, weights, g * at.u + r * at.mean, r[:, 0])
        return active.result()

    def _decided(self, weights: Tensor, rest: Tensor) -> Tensor:
        """Which tokens [n] the weights [n, V] have decided, by more than rounding may do."""
        best = weights.topk(min(2, weights.shape[1]), dim=1).values
        certain, pair = self.certain * rest - _ROUNDING, self.pair * rest - _ROUNDING
        return (best[:, 0] > 1 - certain) | (best.sum(dim=1) > 1 - pair)

    def _let_go(self, active: ActiveRows, at: _State, decided: Tensor, weights: Tensor, z: Tensor, r: Tensor) -> _State:
        """Prune, then settle the tokens that are decided or have two codes left; the state of the others."""
        few = active.prune(weights, self.prune * at.rest) <= 2
        left = active.retire(decided | few, weights, z, r)
        return at if left is None else at.rows(left)

    def _start(self, moments: Moments, noise: Tensor) -> _State:
        """All tokens at rho = 0, where u is the noise and its slope zero."""
        return _State(
            u=noise,
            mean=moments.mean,
            std=self.shrink * moments.std[:, None],
            scale=moments.scale[:, None],
            rest=moments.rest,
            slopes=torch.zeros_like(noise)[None],
        )


@dataclass
class _State:
    """Where n tokens stand."""

    u: Tensor  # [n, C]
    mean: Tensor  # [n, C]
    std: Tensor  # [n, 1]
    scale: Tensor  # [n, 1]
    rest: Tensor  # [n], 1 - max p
    slopes: Tensor  # [history, n, C], du/dsigma, newest first

    def rows(self, index: Tensor) -> _State:
        per_row = (self.u, self.mean, self.std, self.scale, self.rest)
        u, mean, std, scale, rest = (value[index] for value in per_row)
        return _State(u, mean, std, scale, rest, self.slopes[:, index])


def _combine(weights: tuple[float, ...], slopes: Tensor) -> Tensor:
    """Sum of weight times slope over slopes [history, n, C], of which there may be fewer than weights."""
    w = torch.tensor(weights[: len(slopes)], dtype=slopes.dtype, device=slopes.device)
    return torch.einsum("h,hnc->nc", w, slopes)


Table = tuple[tuple[float, ...], ...]


@lru_cache(maxsize=64)
def adams_tables(solver: AdamsSolver) -> tuple[Table, Table]:
    """Weights [knots, history] of past slopes, newest first, in the predictor and in the corrector of each knot.

    float64; the history is as long as the longer of the two polynomials, weights of older slopes are 0. The slope at
    rho = 0 counts as the first.
    """
    sigmas = [math.log(solver.offset + rho) for rho in (0.0, *solver.knots)]
    history = max(solver.predictor, solver.corrector)
    predict: list[tuple[float, ...]] = []
    correct: list[tuple[float, ...]] = []
    for step in range(1, len(sigmas)):
        known, reached = sigmas[max(0, step - solver.predictor) : step], sigmas[: step + 1][-solver.corrector :]
        for table, nodes in ((predict, known), (correct, reached)):
            weights = _integral_weights(nodes[::-1], sigmas[step - 1], sigmas[step])
            table.append(weights + (0.0,) * (history - len(weights)))
    return tuple(predict), tuple(correct)


def _integral_weights(nodes: list[float], start: float, end: float) -> tuple[float, ...]:
    """The w with sum_i w_i f(node_i) = integral of f from start to end, for polynomials f of degree < len(nodes)."""
    powers = np.arange(len(nodes))
    moments = ((end - start) ** (powers + 1)) / (powers + 1)
    vandermonde = (np.asarray(nodes) - start)[None, :] ** powers[:, None]
    return tuple(float(w) for w in np.linalg.solve(vandermonde, moments))
