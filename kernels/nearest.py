"""The nearest codebook entry on a GPU: argmax_j (x.c_j - |c_j|^2 / 2) over tiles of the codebook, on tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs


@triton.jit(do_not_specialize=["rows"])
def nearest_kernel(
    x,  # [rows, CHANNELS]
    codebook,  # [VOCAB, CHANNELS]
    out,  # [rows] int64
    rows,
    VOCAB: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C_PAD: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)
    channel = tl.arange(0, C_PAD)
    inside = channel < CHANNELS
    live = (row < rows)[:, None] & inside[None, :]
    point = tl.load(x + (at * CHANNELS)[:, None] + channel[None, :], mask=live, other=0.0).to(tl.float32)
    best = tl.full([BLOCK_N, BLOCK_V], -float("inf"), tl.float32)
    best_entry = tl.zeros([BLOCK_N, BLOCK_V], tl.int32)
    for start in range(0, VOCAB, BLOCK_V):
        entry = start + tl.arange(0, BLOCK_V)
        mask = (entry < VOCAB)[:, None] & inside[None, :]
        code = tl.load(codebook + entry[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        half_square = tl.where(entry < VOCAB, 0.5 * tl.sum(code * code, 1), float("inf"))
        score = tl.dot(point, tl.trans(code), input_precision="tf32x3") - half_square[None, :]
        better = score > best  # each lane keeps the lowest index of its own maximum
        best_entry = tl.where(better, entry[None, :], best_entry)
        best = tl.where(better, score, best)
    top = tl.max(best, 1)
    index = tl.min(tl.where(best == top[:, None], best_entry, 0x7FFFFFFF), 1)
    tl.store(out + at, tl.where(index < VOCAB, index, 0).to(tl.int64), mask=row < rows)


def nearest_code(x: Tensor, codebook: Tensor, out: Tensor, config: configs.TilesConfig | None = None) -> None:
    """Write the index of the entry nearest to each row of x, by squared distance, to out int64 [N]; ties: the lowest.

    x [N, C] and codebook [V, C] (float32, bfloat16, float16) are contiguous and on one device. Distances are computed
    as float32 products of three tf32 parts, good to a few units in the last place. A row with NaN gets 0.
    ``config`` takes the place of the recorded one.
    """
    vocab, channels = codebook.shape
    rows = out.numel()
    if rows == 0:
        return
    config = config or configs.nearest_config(configs.device_name(x.device), vocab, channels, rows)
    with torch.cuda.device_of(x):
        nearest_kernel[(triton.cdiv(rows, config.block_n),)](
            x,
            codebook,
            out,
            rows,
            VOCAB=vocab,
            CHANNELS=channels,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            C_PAD=max(16, triton.next_power_of_2(channels)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
