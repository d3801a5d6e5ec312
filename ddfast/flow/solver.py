"""What every solver of the flow is: a frozen, hashable setting with one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow.field import CodebookFlow


@dataclass(frozen=True)
class FlowResult:
    """Where N tokens ended.

    tokens: int64 [N].
    x: [N, C], the state where the solver stopped following each token (x = z / (1 + r)).
    evaluations: int32 [N], of the field at r > 0. At r = 0 the field is the mean of p, which needs no weights; solvers
        that start at t > 0 never get it for free and their first evaluation counts.
    """

    tokens: Tensor
    x: Tensor
    evaluations: Tensor

    @property
    def nfe(self) -> float:
        """Evaluations of the field a token, on average (NaN for no tokens)."""
        return float(self.evaluations.double().mean())


@dataclass(frozen=True)
class Solver(ABC):
    """A way to follow the flow from noise to token. Its fields are all that decides the result."""

    kind: ClassVar[str]

    @abstractmethod
    def solve(self, flow: CodebookFlow, noise: Tensor) -> FlowResult:
        """Follow each row of noise [N, C] (dtype and device of the flow) to its token."""

    def to_dict(self) -> dict[str, Any]:
        """Kind and fields, JSON-able; ``solver_from_dict`` restores the solver."""
        fields = asdict(self).items()
        return {"kind": self.kind, **{key: list(v) if isinstance(v, tuple) else v for key, v in fields}}

    def describe(self) -> str:
        """One line for a log or a manifest's reader."""
        fields = ", ".join(f"{key}={value}" for key, value in asdict(self).items())
        return f"{self.kind}({fields})"


def check_noise(flow: CodebookFlow, noise: Tensor) -> None:
    """Refuse noise that is not finite, or not [N, C] in the flow's dtype."""
    want = (len(flow), flow.codebook.shape[1])
    if tuple(noise.shape) != want or noise.dtype != flow.codebook.dtype:
        raise UserError(f"noise must be {list(want)} {flow.codebook.dtype}, not {list(noise.shape)} {noise.dtype}")
    if not bool(torch.isfinite(noise).all()):
        raise UserError("noise has NaN or infinite entries: draw it from a standard normal")


def check_count(solver: str, nfe: object, least: int, most: int) -> None:
    """Refuse a number of evaluations outside [least, most]."""
    if not isinstance(nfe, int) or isinstance(nfe, bool) or not least <= nfe <= most:
        raise UserError(f"solver {solver!r} takes a whole number of evaluations from {least} to {most}, not {nfe!r}")


class ActiveRows:
    """The tokens of a flow that are not yet decided, and the results of those that are."""

    def __init__(self, flow: CodebookFlow, noise: Tensor) -> None:
        self._flow = flow
        self._index = torch.arange(len(flow), device=noise.device)
        self._tokens = torch.zeros_like(self._index)
        self._x = torch.zeros_like(noise)
        self._evaluations = torch.zeros_like(self._index, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self._index)

    def evaluate(self, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """``CodebookFlow.posterior`` of the rows that are left, counted."""
        self._evaluations[self._index] += 1
        return self._flow.posterior(z, r)

    def prune(self, weights: Tensor, share: Tensor) -> Tensor:
        """Let go of entries that together have less than ``share`` [n] of the weights [n, V].

        Returns how many entries each row has left: int64 [n].
        """
        count = (self._flow.log_p > -torch.inf).sum(dim=1)
        self._flow = self._flow.without(weights < (share / count)[:, None])
        return (self._flow.log_p > -torch.inf).sum(dim=1)

    def retire(self, done: Tensor, weights: Tensor, z: Tensor, r: Tensor) -> Tensor | None:
        """Where the mask ``done`` [n] is set, settle the token and go on without those rows.

        weights [n, V], z [n, C] and r [n] are where the n remaining rows stand. Returns the indices to cut per-row
        tensors with, or None if no row left.
        """
        if not bool(done.any()):
            return None
        leaving = done.nonzero()[:, 0]
        where, z, r = self._index[leaving], z[leaving], r[leaving]
        self._tokens[where] = self._flow.rows(leaving).settle(z, r, weights[leaving])
        self._x[where] = (z / (1 + r)[:, None]).to(self._x.dtype)
        left = (~done).nonzero()[:, 0]
        self._index = self._index[left]
        self._flow = self._flow.rows(left)
        return left

    def result(self) -> FlowResult:
        """Tokens, end points and evaluations in the order of the flow."""
        return FlowResult(self._tokens, self._x, self._evaluations)
