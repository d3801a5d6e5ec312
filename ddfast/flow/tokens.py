"""Teacher logits and noise to tokens, in one call of bounded memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow.field import CodebookFlow
from ddfast.flow.filters import LogitFilter, filter_logits
from ddfast.flow.solver import Solver

_CHUNK_BYTES_CPU = 32 * 2**20  # about what stays in cache
_CHUNK_BYTES_GPU = 2**30  # enough rows to fill the machine
_WORDS_PER_LOGIT = 12  # the most that filter and solver hold at once for one logit, in words of the working dtype


@torch.no_grad()
def flow_tokens(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    codebook: Tensor,
    *,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
    solver: Solver,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Tokens int64 [N] that the flow (Eq. 3-4 of arXiv 2412.17153) gives to noise, under a teacher's distribution.

        p = softmax(filter(uncond + guidance (cond - uncond)))
        token = end of dz/dr = E[c | z], z(0) = noise

    cond, uncond: logits [N, V] of any floating dtype. uncond is None where the teacher is not guided: guidance is 1.
    noise: [N, C], standard normal. codebook: [V, C].
    chunk_bytes: rows are worked off in chunks whose temporaries fit in about this much memory (at least one row), so
        that memory does not grow with N; by default 32 MiB on a CPU and 1 GiB elsewhere. The chunks change nothing but
        rounding.

    Works in float64 if cond is float64, otherwise in float32; half-precision logits are converted chunk by chunk.
    Raises UserError for shapes, dtypes or devices that do not fit, and for rows of logits that hold NaN or +inf.

    >>> tokens = flow_tokens(cond, uncond, noise, teacher.codebook, guidance=2.0,
    ...                      filter=LogitFilter(top_k=900, top_p=0.95), solver=make_solver("adams", 10))
    """
    _check(cond, uncond, noise, codebook, guidance)
    dtype = torch.float64 if cond.dtype == torch.float64 else torch.float32
    codebook = codebook.to(dtype)
    tokens = torch.empty(len(cond), dtype=torch.int64, device=cond.device)
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES_CPU if cond.device.type == "cpu" else _CHUNK_BYTES_GPU
    rows = rows_per_chunk(cond.shape[1], dtype, chunk_bytes)
    for start in range(0, len(cond), rows):
        part = slice(start, start + rows)
        logits = cond[part].to(dtype)
        if uncond is not None:
            base = uncond[part].to(dtype)
            logits = torch.lerp(base, logits, guidance)
        flow = CodebookFlow(filter_logits(logits, filter), codebook)
        tokens[part] = solver.solve(flow, noise[part].to(dtype)).tokens
    return tokens


def rows_per_chunk(vocab: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    """How many rows of ``vocab`` logits are worked on at a time so that temporaries take about chunk_bytes."""
    if chunk_bytes <= 0:
        raise UserError(f"chunk_bytes must be above 0, not {chunk_bytes!r}")
    return max(1, chunk_bytes // (_WORDS_PER_LOGIT * dtype.itemsize * vocab))


def _check(cond: Tensor, uncond: Tensor | None, noise: Tensor, codebook: Tensor, guidance: float) -> None:
    """Shapes, dtypes and devices of flow_tokens, and a guidance that means something."""
    named = {"cond": cond, "noise": noise, "codebook": codebook} | ({} if uncond is None else {"uncond": uncond})
    for name, tensor in named.items():
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise UserError(
                f"{name} must be a floating matrix, not {tensor.dtype} {list(tensor.shape)}: flatten the batch"
            )
        if tensor.device != cond.device:
            raise UserError(f"{name} is on {tensor.device} but cond on {cond.device}: move one of them")
    n, v = cond.shape
    want = {"noise": (n, codebook.shape[1]), "codebook": (v, codebook.shape[1]), "uncond": (n, v)}
    for name, shape in want.items():
        if name in named and tuple(named[name].shape) != shape:
            raise UserError(f"{name} must be {list(shape)} to go with cond {[n, v]}, not {list(named[name].shape)}")
    if not math.isfinite(guidance):
        raise UserError(f"guidance must be a finite number, not {guidance!r}")
    if uncond is None and guidance != 1:
        raise UserError(f"guidance={guidance} needs unconditional logits: pass uncond, or guidance=1.0")
