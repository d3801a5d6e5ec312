"""filter_logits on a GPU: one program a row, the row in registers, what top-k leaves in scratch for top-p."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.flow.filters import LogitFilter

from . import configs
from .cuts import guided_logits, list_row, row_range, top_k_floor, top_p_cut


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
    list_value = scratch + program.to(tl.int64) * (3 * VOCAB)
    list_index = (list_value + VOCAB).to(tl.pointer_type(tl.int32))
    column = tl.arange(0, BLOCK_V)
    for row in range(program, rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * VOCAB
        line = logits + start
        value = guided_logits(line, line, column, column < VOCAB, 1.0, temperature, False, HEATED)
        highest, lowest, finite = row_range(value)
        if TOP_K:
            floor = top_k_floor(value, top_k, highest, lowest, finite)
            value = tl.where(value > floor, value, -float("inf"))
            lowest = tl.maximum(lowest, floor)
        if TOP_P:
            count = list_row(
                value, column, -float("inf"), list_value + 2 * VOCAB, list_index, list_value, VOCAB=VOCAB, BLOCK=BLOCK_L
            )
            cut, last = top_p_cut(
                list_index, list_value, count, highest, lowest, share, DESCENDING=DESCENDING, BLOCK=BLOCK_L
            )
            tl.debug_barrier()
            kept = (value > cut) | ((value == cut) & (column <= last))
            value = tl.where(kept, value, -float("inf"))
        tl.store(out + start + column, value, mask=column < VOCAB)


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
    programs = min(rows, config.per_sm * configs.processors(logits.device))
    scratch = 3 * vocab * programs if filter.cuts_mass else 1
    with torch.cuda.device_of(logits):
        filter_kernel[(programs,)](
            logits,
            out,
            torch.empty(scratch, dtype=torch.float32, device=logits.device),
            rows,
            filter.divisor,
            *filter_numbers(filter, vocab),
            VOCAB=vocab,
            **filter_flags(filter),
            BLOCK_V=triton.next_power_of_2(vocab),
            BLOCK_L=config.block_l,
            num_warps=config.num_warps,
        )


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
