"""Teacher logits and noise to tokens in plain torch: the twin of the fused kernels, and what their callers check."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow.field import CodebookFlow
from ddfast.flow.filters import LogitFilter, check_filter, filter_logits
from ddfast.flow.solver import FlowResult, Solver

BAD_LOGITS, BAD_NOISE = -1, -2  # in place of a number of evaluations
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_CHUNK_BYTES_CPU = 32 * 2**20  # about what stays in cache
_CHUNK_BYTES_GPU = 2**30  # enough rows to fill the machine
_WORDS_PER_LOGIT = 14  # the most that filter and solver hold at once for one logit, in words of the working dtype


def guide(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """Guided logits uncond + guidance (cond - uncond) [..., V], computed in float64.

    float64 logits give float64, others float32, rounded once. Where both are equal, so where both are -inf, that value
    stays.
    """
    dtype = torch.float64 if cond.dtype == torch.float64 else torch.float32
    if uncond is None:
        return cond.to(dtype)
    base = uncond.double()
    step = torch.where(cond == uncond, 0.0, cond.double() - base)
    return step.mul_(guidance).add_(base).to(dtype)


@torch.no_grad()
def solve_rows(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    codebook: Tensor,
    *,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
    solver: Solver,
    chunk_bytes: int | None = None,
) -> FlowResult:
    """What ``ddfast.ops.flow`` computes, in torch, of arguments that ``check_flow_arguments`` has passed.

    Works in float64 if cond is float64, otherwise in float32. Rows that cannot be solved get token 0, x = NaN and
    BAD_LOGITS or BAD_NOISE in place of their evaluations.

    chunk_bytes: rows are worked off in chunks whose temporaries fit in about this much memory (at least one row), so
        that memory does not grow with N; by default 32 MiB on a CPU and 1 GiB elsewhere. The chunks change nothing but
        rounding.
    """
    dtype = torch.float64 if cond.dtype == torch.float64 else torch.float32
    codebook = codebook.to(dtype)
    tokens = torch.empty(len(cond), dtype=torch.int64, device=cond.device)
    x = torch.empty_like(noise, dtype=dtype)
    evaluations = torch.empty_like(tokens, dtype=torch.int32)
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES_CPU if cond.device.type == "cpu" else _CHUNK_BYTES_GPU
    rows = rows_per_chunk(cond.shape[1], dtype, chunk_bytes)
    for start in range(0, len(cond), rows):
        part = slice(start, start + rows)
        logits = guide(cond[part], None if uncond is None else uncond[part], guidance)
        start_noise = noise[part].to(dtype)
        bad_logits = ~logits.amax(dim=1).isfinite()  # NaN, +inf, or nothing but -inf
        bad_noise = ~start_noise.isfinite().all(dim=1)
        logits = logits.masked_fill(bad_logits[:, None], 0.0)
        flow = CodebookFlow(filter_logits(logits, filter), codebook)
        result = solver.solve(flow, start_noise.masked_fill(bad_noise[:, None], 0.0))
        bad = bad_logits | bad_noise
        tokens[part] = result.tokens.masked_fill(bad, 0)
        x[part] = result.x.masked_fill(bad[:, None], torch.nan)
        evaluations[part] = result.evaluations.masked_fill(bad_noise, BAD_NOISE).masked_fill(bad_logits, BAD_LOGITS)
    return FlowResult(tokens, x, evaluations)


def rows_per_chunk(vocab: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    """How many rows of ``vocab`` logits are worked on at a time so that temporaries take about chunk_bytes."""
    if chunk_bytes <= 0:
        raise UserError(f"chunk_bytes must be above 0, not {chunk_bytes!r}")
    return max(1, chunk_bytes // (_WORDS_PER_LOGIT * dtype.itemsize * vocab))


def check_flow_arguments(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    codebook: Tensor,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
) -> None:
    """Shapes, dtypes and devices of a flow from logits, and a guidance and a filter that mean something for them."""
    named = {"cond": cond, "noise": noise, "codebook": codebook} | ({} if uncond is None else {"uncond": uncond})
    for name, tensor in named.items():
        if tensor.ndim != 2 or tensor.dtype not in DTYPES:
            raise UserError(
                f"{name} must be a matrix of {', '.join(map(str, DTYPES))}, not {tensor.dtype} {list(tensor.shape)}: "
                "convert it, or flatten the batch"
            )
        if tensor.device != cond.device:
            raise UserError(f"{name} is on {tensor.device} but cond on {cond.device}: move one of them")
    n, v = cond.shape
    want = {"noise": (n, codebook.shape[1]), "codebook": (v, codebook.shape[1]), "uncond": (n, v)}
    for name, shape in want.items():
        if name in named and tuple(named[name].shape) != shape:
            raise UserError(f"{name} must be {list(shape)} to go with cond {[n, v]}, not {list(named[name].shape)}")
    if uncond is not None and uncond.dtype != cond.dtype:
        raise UserError(f"uncond is {uncond.dtype} but cond {cond.dtype}: convert one of them")
    if not abs(guidance) < math.inf:
        raise UserError(f"guidance must be a finite number, not {guidance!r}")
    if uncond is None and guidance != 1:
        raise UserError(f"guidance={guidance} needs unconditional logits: pass uncond, or guidance=1.0")
    check_filter(filter, v)


def check_codebook(codebook: Tensor) -> None:
    """Raise UserError for the first row of [V, C] that is not finite or overflows squared. Waits for the device."""
    bad = (~codebook.square().sum(1).isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"codebook row {int(bad[0])} is not finite, or overflows when squared: check the tokenizer's weights"
        )


def raise_bad_rows(evaluations: Tensor) -> None:
    """Raise UserError for the first row of [N], or row and position of [N, L], that carries BAD_LOGITS or BAD_NOISE.

    Waits for the device.
    """
    bad = (evaluations < 0).nonzero()
    if len(bad) == 0:
        return
    first = tuple(bad[0].tolist())
    where = ", ".join(f"{name} {index}" for name, index in zip(("row", "position"), first, strict=False))
    if int(evaluations[first]) == BAD_NOISE:
        raise UserError(f"{where} of noise has NaN or infinite entries: draw it from a standard normal")
    raise UserError(
        f"{where} of the guided logits has NaN, +inf or no finite entry: check the teacher for overflow, or compute "
        "its logits in a wider dtype"
    )
