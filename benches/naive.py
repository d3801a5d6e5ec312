"""The flow the straightforward way: a sort for the filter, dense softmaxes over the codebook for the solve.

These are the calls of the public sampling code (VAR's and LlamaGen's top-k and top-p), and Eq. 3 of arXiv 2412.17153 as
it stands. They are what the fused operations are measured against, on any device, and give nearly the same tokens, not
the same ones: ten Euler steps are not the default solver.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.flow import LogitFilter

EVALUATIONS = 10
_LAST_T = 0.99


def filter_logits(logits: Tensor, f: LogitFilter) -> Tensor:
    """Logits [N, V] over the temperature, -inf outside the top-k and top-p sets: topk, sort, cumsum, scatter."""
    logits = logits / f.divisor
    if f.top_k:
        least = logits.topk(min(f.top_k, logits.shape[1]), dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        logits.masked_fill_(logits < least, -torch.inf)
    if f.top_p is not None and f.cuts_mass:
        values, order = logits.sort(dim=1, descending=f.rule == "llamagen")
        mass = values.softmax(dim=1).cumsum(dim=1)
        if f.rule == "llamagen":
            gone = F.pad(mass > f.top_p, (1, 0))[:, :-1]
        else:
            gone = mass <= 1 - f.top_p
            gone[:, -1] = False
        logits.masked_fill_(torch.zeros_like(gone).scatter(1, order, gone), -torch.inf)
    return logits


def solve(log_p: Tensor, noise: Tensor, codebook: Tensor) -> Tensor:
    """Eq. 3 by ten Euler steps in t, each a softmax over all of V: tokens int64 [N].

    log_p [N, V] up to a constant of each row, noise [N, C], codebook [V, C].
    """
    half_square = 0.5 * codebook.square().sum(dim=1)
    x, step = noise, _LAST_T / EVALUATIONS
    for t in (step * i for i in range(EVALUATIONS)):
        stretch = t / (1 - t) ** 2
        weights = torch.addmm(log_p - t * stretch * half_square, x, codebook.t(), alpha=stretch).softmax(dim=1)
        x = x + step / (1 - t) * (weights @ codebook - x)
    return (x @ codebook.t() - half_square).argmax(dim=1)


def flow_tokens(
    cond: Tensor,
    uncond: Tensor,
    noise: Tensor,
    codebook: Tensor,
    *,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
    rows: int,
) -> Tensor:
    """The tokens int64 [N] of guided logits [N, V], ``rows`` of them at a time, in float32."""
    tokens = []
    for part in (slice(start, start + rows) for start in range(0, len(cond), rows)):
        base = uncond[part].float()
        logits = base + guidance * (cond[part].float() - base)
        tokens.append(solve(filter_logits(logits, filter), noise[part], codebook))
    return torch.cat(tokens)


def nearest_cdist(x: Tensor, codebook: Tensor, rows: int) -> Tensor:
    """The nearest code to each of x [N, C] through distances [rows, V]: int64 [N]."""
    return torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in x.split(rows)])


def nearest_matmul(x: Tensor, codebook: Tensor, rows: int) -> Tensor:
    """The same through argmax_j (x.c_j - |c_j|^2 / 2), one matrix product a chunk."""
    bias = -0.5 * codebook.square().sum(dim=1)
    return torch.cat([torch.addmm(bias, part, codebook.t()).argmax(dim=1) for part in x.split(rows)])
