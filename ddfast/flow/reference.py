"""The exact flow, for tests and for judging the fast solvers: adaptive Runge-Kutta, each token with its own steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow.field import CodebookFlow
from ddfast.flow.solver import ActiveRows, FlowResult, Solver, check_noise

# Dormand and Prince, 1980: the embedded pair of orders 5 and 4. The last stage is the first one of the next step.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class ExactSolver(Solver):
    """Dormand-Prince 5(4) in sigma = log(1 + r / R*), with the step of each token chosen by its own error.

    Computes in float64 whatever the flow's dtype.

    rtol: local error allowed per step, relative to max(1, |z|) in the largest channel.
    certain: a token stops when its best weight exceeds 1 - certain.
    r_max: a token undecided at r = r_max R* takes its best weight there (codes that repeat never decide).

    It reproduces an independent DOP853 solution at rtol 1e-9 to better than 1e-8 in every state, in about 200
    evaluations a token.
    """

    kind: ClassVar[str] = "exact"
    rtol: float = 1e-9
    certain: float = 1e-9
    r_max: float = 1e3

    def __post_init__(self) -> None:
        for field in ("rtol", "certain"):
            if not 1e-12 <= getattr(self, field) <= 1e-2:
                raise UserError(f"{field} must lie in [1e-12, 1e-2], not {getattr(self, field)!r} (1e-9 is usual)")
        if not 1 <= self.r_max <= 1e6:
            raise UserError(f"r_max must lie in [1, 1e6], not {self.r_max!r} (1e3 is usual)")

    def solve(self, flow: CodebookFlow, noise: Tensor) -> FlowResult:
        """See ``Solver.solve``."""
        check_noise(flow, noise)
        flow = flow.double()
        return self._follow(flow, noise, self.r_max * flow.moments().scale, self.certain)

    def state(self, flow: CodebookFlow, noise: Tensor, t: float) -> Tensor:
        """x [N, C] at time t in [0, 1), whether the token is decided by then or not."""
        check_noise(flow, noise)
        if not 0 <= t < 1:
            raise UserError(f"t must lie in [0, 1), not {t!r}")
        end = torch.full((len(flow),), t / (1 - t), dtype=torch.float64, device=noise.device)
        return self._follow(flow.double(), noise, end, certain=0.0).x

    def _follow(self, flow: CodebookFlow, noise: Tensor, r_end: Tensor, certain: float) -> FlowResult:
        """Follow every token to r_end [N], or until its best weight exceeds 1 - certain."""
        active = ActiveRows(flow, noise)
        at = _start(flow, noise, r_end)
        while len(active):
            trial, weights, error = _try_step(active, at)
            worst = error.abs().amax(dim=1) / (self.rtol * trial.z.abs().amax(dim=1).clamp_min(1.0))
            accepted = worst <= 1
            at = _choose(accepted, trial, at)
            over = (at.end - at.sigma <= 1e-14 * at.end) | (weights.amax(dim=1) > 1 - certain)
            left = active.retire(accepted & over, weights, at.z, at.scale * torch.expm1(at.sigma))
            step = at.step * (0.9 * worst.clamp_min(1e-10) ** -0.2).clamp(0.2, 5.0)
            at = at._replace(step=torch.minimum(step, at.end - at.sigma))
            if left is not None:
                at = _State(*(value[left] for value in at))
        return active.result()


class _State(NamedTuple):
    """Where n tokens stand: all [n] but for z and its slope dz/dsigma, [n, C]."""

    scale: Tensor  # R*
    end: Tensor  # sigma at the end
    sigma: Tensor
    step: Tensor  # of sigma, to try next
    z: Tensor
    slope: Tensor


def _start(flow: CodebookFlow, noise: Tensor, r_end: Tensor) -> _State:
    """All tokens at r = 0, where D is the mean of p."""
    moments = flow.moments()
    end = torch.log1p(r_end / moments.scale)
    slope = moments.scale[:, None] * moments.mean
    return _State(moments.scale, end, torch.zeros_like(end), end.clamp_max(0.05), noise.double(), slope)


def _try_step(active: ActiveRows, at: _State) -> tuple[_State, Tensor, Tensor]:
    """The state one step on, the weights [n, V] there, and an estimate of the error in z [n, C]."""
    slopes = [at.slope]
    for node, row in zip(_NODES, _STAGES, strict=True):
        z = at.z + at.step[:, None] * _combine(row, slopes)
        sigma = at.sigma + node * at.step
        mean, weights = active.evaluate(z, at.scale * torch.expm1(sigma))
        slopes.append((at.scale * torch.exp(sigma))[:, None] * mean)
    trial = at._replace(sigma=sigma, z=z, slope=slopes[-1])
    return trial, weights, at.step[:, None] * _combine(_ERROR, slopes)


def _combine(coefficients: tuple[float, ...], terms: list[Tensor]) -> Tensor:
    """The sum of coefficient times term."""
    return torch.stack([c * term for c, term in zip(coefficients, terms, strict=True)]).sum(dim=0)


def _choose(accepted: Tensor, new: _State, old: _State) -> _State:
    """Row by row, the new state where the mask is set and the old one elsewhere."""
    pairs = zip(new, old, strict=True)
    return _State(*(torch.where(accepted if a.ndim == 1 else accepted[:, None], a, b) for a, b in pairs))
