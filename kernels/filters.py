"""filter_logits on a GPU: one program a row, the row in registers, what top-k leaves in scratch for top-p.

The same cuts, as two numbers a row, for kernels that filter as they read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.flow.filters import LogitFilter

from . import configs
from .cuts import guided_logits, list_row, row_range, top_k_floor, top_p_cut


@triton.jit
def _row_cut(
    value, column, list_value, top_k, share: tl.float64,
    VOCAB: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, DESCENDING: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Two numbers (cut, last) of a row [B]: value > cut is kept, and value == cut where column <= last.

    list_value: [3 VOCAB] of scratch, used if TOP_P.
    """
    highest, lowest, finite = row_range(value)
    cut = lowest * 0 - float("inf")
    last = finite * 0 - 1
    if TOP_K:
        cut = top_k_floor(value, top_k, highest, lowest, finite)
    if TOP_P:
        list_index = (list_value + VOCAB).to(tl.pointer_type(tl.int32))
        count = list_row(value, column, cut, list_value + 2 * VOCAB, list_index, list_value, VOCAB=VOCAB, BLOCK=BLOCK_L)
        cut, last = top_p_cut(
            list_index, list_value, count, highest, tl.maximum(lowest, cut), share, DESCENDING=DESCENDING, BLOCK=BLOCK_L
        )
        tl.debug_barrier()
    return cut, last


@triton.jit(do_not_specialize=["rows", "top_k"])
def filter_kernel(
    logits,  # [rows, VOCAB]
    out,  # [rows, VOCAB] float32
    scratch,  # [programs, 3 VOCAB] float32; used if TOP_P
    rows,
    temperature,
    top_k,
    share: tl.float64,
    VOCAB: tl.constexpr,
    HEATED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    DESCENDING: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_V)
    for row in range(program, rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * VOCAB
        line = logits + start
        value = guided_logits(line, line, column, column < VOCAB, 1.0, temperature, False, HEATED)
        cut, last = _row_cut(
            value, column, scratch + program.to(tl.int64) * (3 * VOCAB), top_k, share,
            VOCAB=VOCAB, TOP_K=TOP_K, TOP_P=TOP_P, DESCENDING=DESCENDING, BLOCK_L=BLOCK_L,
        )  # fmt: skip
        value = tl.where((value > cut) | ((value == cut) & (column <= last)), value, -float("inf"))
        tl.store(out + start + column, value, mask=column < VOCAB)


@triton.jit(do_not_specialize=["rows", "top_k"])
def cuts_kernel(
    cond,  # [rows, VOCAB]
    uncond,  # [rows, VOCAB]; read if GUIDED
    cuts,  # [rows] float32
    lasts,  # [rows] int32
    scratch,  # [programs, 3 VOCAB] float32; used if TOP_P
    rows,
    guidance: tl.float64,
    temperature,
    top_k,
    share: tl.float64,
    VOCAB: tl.constexpr,
    GUIDED: tl.constexpr,
    HEATED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    DESCENDING: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """``_row_cut`` of guided logits."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_V)
    for row in range(program, rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * VOCAB
        value = guided_logits(
            cond + start, uncond + start, column, column < VOCAB, guidance, temperature, GUIDED=GUIDED, HEATED=HEATED
        )
        cut, last = _row_cut(
            value, column, scratch + program.to(tl.int64) * (3 * VOCAB), top_k, share,
            VOCAB=VOCAB, TOP_K=TOP_K, TOP_P=TOP_P, DESCENDING=DESCENDING, BLOCK_L=BLOCK_L,
        )  # fmt: skip
        tl.store(cuts + row, cut)
        tl.store(lasts + row, last)


def filter_rows(
    logits: Tensor,
    filter: LogitFilter,  # noqa: A002 - the field's word
    out: Tensor,
    config: configs.FilterConfig | None = None,
) -> None:
    """Write ``ddfast.flow.filter_logits(logits.float(), filter)`` to ``out``.

    logits [N, V] (float32, bfloat16, float16) and out float32 [N, V] are contiguous and on one device. Nothing waits
    for the GPU, so the call can be captured in a CUDA graph. ``config`` takes the place of the recorded one.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    config = config or configs.filter_config(configs.device_name(logits.device), vocab, rows)
    programs, scratch = _grid(logits, filter, config)
    with torch.cuda.device_of(logits):
        filter_kernel[(programs,)](
            logits,
            out,
            scratch,
            rows,
            filter.divisor,
            *filter_numbers(filter, vocab),
            **_shape(vocab, filter, config),
        )


def row_cuts(
    cond: Tensor,
    uncond: Tensor | None,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
    config: configs.FilterConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Float32 and int32 [N], at least one row: of guided logits over the temperature, those above the first are kept,
    and those equal to it up to the index in the second.

    cond and uncond [N, V] as for ``filter_rows``, which this agrees with to the last bit.
    """
    rows, vocab = cond.shape
    config = config or configs.filter_config(configs.device_name(cond.device), vocab, rows)
    programs, scratch = _grid(cond, filter, config)
    cuts = torch.empty(rows, dtype=torch.float32, device=cond.device)
    lasts = torch.empty(rows, dtype=torch.int32, device=cond.device)
    with torch.cuda.device_of(cond):
        cuts_kernel[(programs,)](
            cond,
            cond if uncond is None else uncond,
            cuts,
            lasts,
            scratch,
            rows,
            guidance,
            filter.divisor,
            *filter_numbers(filter, vocab),
            GUIDED=uncond is not None,
            **_shape(vocab, filter, config),
        )
    return cuts, lasts


def _grid(logits: Tensor, filter: LogitFilter, config: configs.FilterConfig) -> tuple[int, Tensor]:  # noqa: A002
    """Programs, and their scratch."""
    rows, vocab = logits.shape
    programs = min(rows, config.per_sm * configs.processors(logits.device))
    scratch = 3 * vocab * programs if filter.cuts_mass else 1
    return programs, torch.empty(scratch, dtype=torch.float32, device=logits.device)


def _shape(vocab: int, filter: LogitFilter, config: configs.FilterConfig) -> dict[str, int]:  # noqa: A002
    """What both kernels are compiled for."""
    sizes = {"VOCAB": vocab, "BLOCK_V": triton.next_power_of_2(vocab), "BLOCK_L": config.block_l}
    return {**sizes, **filter_flags(filter), "num_warps": config.num_warps}


def filter_numbers(filter: LogitFilter, vocab: int) -> tuple[int, float]:  # noqa: A002
    """What the kernels take as ``top_k`` and ``share``."""
    top_p = filter.top_p if filter.top_p is not None else 1.0
    return min(filter.top_k, vocab), top_p if filter.rule == "llamagen" else 1 - top_p


def filter_flags(filter: LogitFilter) -> dict[str, bool]:  # noqa: A002
    """What the kernels are compiled for."""
    return {
        "HEATED": filter.divisor != 1.0,
        "TOP_K": filter.top_k > 0,
        "TOP_P": filter.cuts_mass,
        "DESCENDING": filter.rule == "llamagen",
    }
