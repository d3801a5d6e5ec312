"""What the flow is measured on, on a CPU and a GPU: teachers' settings, guided logits for them, the work they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from problems import FAMILIES, draw
from torch import Tensor

from ddfast.flow import CodebookFlow, LogitFilter, Solver, filter_logits
from ddfast.flow.tokens import guide

EXP_FLOP = 20  # what an exponential counts as


@dataclass(frozen=True)
class Setting:
    """How a teacher is sampled. families: problems of ``problems.FAMILIES``; figures are means over them."""

    families: tuple[str, ...]
    filter: LogitFilter
    guidance: float

    @property
    def vocab(self) -> int:
        return FAMILIES[self.families[0]].vocab

    @property
    def channels(self) -> int:
        return FAMILIES[self.families[0]].channels

    def describe(self) -> dict[str, Any]:
        """The setting as the JSON has it."""
        sizes = {"vocab": self.vocab, "channels": self.channels, "guidance": self.guidance}
        return sizes | {"filter": self.filter.to_dict(), "families": list(self.families)}


_VAR = ("var-0.3", "var-0.5", "var-1.0", "var-geo")
_LLAMA = ("llama-iid", "llama-geo")

SETTINGS: Mapping[str, Setting] = {
    "var": Setting(_VAR, LogitFilter(top_k=900, top_p=0.95), 1.5),
    "llamagen": Setting(_LLAMA, LogitFilter(rule="llamagen"), 2.0),
    "llamagen-k2000": Setting(_LLAMA, LogitFilter(top_k=2000, rule="llamagen"), 2.0),
    "llamagen-k8000": Setting(_LLAMA, LogitFilter(top_k=8000, rule="llamagen"), 2.0),
    "llamagen-p0.9": Setting(_LLAMA, LogitFilter(top_p=0.9, rule="llamagen"), 2.0),
}


@dataclass(frozen=True)
class Guided:
    """cond, uncond [N, V]; noise [N, C], codebook [V, C], float32."""

    cond: Tensor
    uncond: Tensor
    noise: Tensor
    codebook: Tensor

    def __len__(self) -> int:
        return len(self.cond)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Guided:
        """On another device, the logits in another dtype."""
        cond, uncond = (t.to(device, dtype) for t in (self.cond, self.uncond))
        return Guided(cond, uncond, self.noise.to(device), self.codebook.to(device))

    def rows(self, count: int) -> Guided:
        """The first ``count`` rows."""
        return Guided(self.cond[:count], self.uncond[:count], self.noise[:count], self.codebook)

    def repeat(self, rows: int, seed: int) -> Guided:
        """``rows`` rows: these logits over and over, each time under other noise."""
        times = -(-rows // len(self))
        noise = torch.randn(rows, self.noise.shape[1], generator=torch.Generator().manual_seed(seed))
        cond, uncond = (t.repeat(times, 1)[:rows] for t in (self.cond, self.uncond))
        return Guided(cond, uncond, noise.to(self.noise.device), self.codebook)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``ops.flow`` takes them."""
        return self.cond, self.uncond, self.noise, self.codebook


def guided_problem(family: str, rows: int, seed: int, guidance: float) -> Guided:
    """Float32 logits whose guided distribution has the family's perplexity; cond and uncond differ by about 0.3."""
    raw = replace(FAMILIES[family], filter=LogitFilter())
    parts = list(draw(raw, rows, seed, chunk=min(rows, 200)))
    logits, noise = (torch.cat(t) for t in zip(*((part.log_p, part.noise) for part in parts), strict=True))
    step = 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(-seed - 1))
    return Guided(logits - (guidance - 1) * step, logits - guidance * step, noise, parts[0].codebook)


class CountingFlow(CodebookFlow):
    """Adds up the codes that evaluations look at; rows and prunings of a flow count to the flow they come from."""

    def __init__(self, log_p: Tensor, codebook: Tensor) -> None:
        super().__init__(log_p, codebook)
        self.looked_at = [0]

    def posterior(self, z: Tensor, r: Tensor | float) -> tuple[Tensor, Tensor]:
        self.looked_at[0] += int((self.log_p > -torch.inf).sum())
        return super().posterior(z, r)


@dataclass(frozen=True)
class Work:
    """What one token needs, on average.

    evaluations: of the field at r > 0.
    kept: codes the filter keeps. after_top_k: codes that top-p has to weigh, 0 without top-p.
    looked_at: codes summed over the evaluations, after pruning.
    """

    evaluations: float
    kept: float
    after_top_k: float
    looked_at: float

    def flop(self, vocab: int, channels: int) -> float:
        """Guidance; top-p's masses; mean, variance and entropy of the kept codes; log-weights, exponentials and mean of
        the codes each evaluation looks at. Comparisons and bookkeeping are free."""
        moments = self.kept * (2 * channels + EXP_FLOP + 6)
        return 3 * vocab + self.after_top_k * EXP_FLOP + moments + self.looked_at * (4 * channels + EXP_FLOP)


def count_work(problem: Guided, setting: Setting, solver: Solver) -> Work:
    """The work of a problem's tokens, counted in the torch twin."""
    logits = guide(problem.cond, problem.uncond, setting.guidance)
    kept = filter_logits(logits, setting.filter)
    flow = CountingFlow(kept, problem.codebook)
    result = solver.solve(flow, problem.noise)
    weighed = 0.0
    if setting.filter.cuts_mass:
        weighed = _mean_kept(filter_logits(logits, replace(setting.filter, top_p=None)))
    return Work(result.nfe, _mean_kept(kept), weighed, flow.looked_at[0] / len(problem))


def _mean_kept(logits: Tensor) -> float:
    return float((logits > -torch.inf).sum(dim=1).double().mean())
