"""Logits to tokens on a GPU in one launch: guidance, filter and the Adams solver. ``ddfast.flow`` is the twin.

This kernel gives a program one row at a time, from a persistent grid. The row's logits are read once, into registers;
what the cuts leave goes to the program's scratch as a list, which shrinks from evaluation to evaluation. So nothing of
size [N, V] is written. For rows that keep much of the codebook there is ``flow_tiles`` as well; ``configs`` says which
one runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.flow.filters import LogitFilter
from ddfast.flow.multistep import AdamsSolver

from . import configs
from .cuts import guided_logits, list_row, put_list, row_range, top_k_floor, top_p_cut
from .filters import filter_flags, filter_numbers
from .flow_list import key_index, moments, posterior, prune, two_best
from .flow_tables import HISTORY, combine, decided, solver_numbers, solver_tables
from .flow_tiles import launch_tiles
from .maths import first_wins, key_value


@triton.jit
def _settle(codebook, i, j, log_i, log_j, z, r, CHANNELS: tl.constexpr, C_PAD: tl.constexpr):
    """Which of the codes i and j the flow ends at from z [C_PAD] and r; see ``CodebookFlow.settle``."""
    channel = tl.arange(0, C_PAD)
    code_i = tl.load(codebook + i * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float64)
    code_j = tl.load(codebook + j * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float64)
    away = code_i - code_j
    gap = tl.sqrt(tl.sum(away * away, 0))
    wide = r.to(tl.float64)
    along = tl.sum((z.to(tl.float64) - 0.5 * wide * (code_i + code_j)) * away, 0) / tl.where(gap > 0, gap, 1.0)
    return tl.where(first_wins(log_i, log_j, along, 0.5 * wide * gap), i, j)


@triton.jit
def _filtered_list(
    value, column, list_index, list_value, copy, highest, lowest, finite, top_k, share: tl.float64,
    VOCAB: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, DESCENDING: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Put what the filter keeps of a row on its list, with the scratch ``copy``. Returns how many entries that is."""
    floor = lowest * 0 - float("inf")
    if TOP_K:
        floor = top_k_floor(value, top_k, highest, lowest, finite)
    count = list_row(value, column, floor, copy, list_index, list_value, VOCAB=VOCAB, BLOCK=BLOCK_L)
    if TOP_P:
        lowest = tl.maximum(lowest, floor)
        cut, last = top_p_cut(
            list_index, list_value, count, highest, lowest, share, DESCENDING=DESCENDING, BLOCK=BLOCK_L
        )
        left = count * 0
        for start in range(0, count, BLOCK_L):
            entry = start + tl.arange(0, BLOCK_L)
            live = entry < count
            index = tl.load(list_index + entry, mask=live, other=0)
            kept = tl.load(list_value + entry, mask=live, other=-float("inf"))
            tl.debug_barrier()
            keep = (kept > cut) | ((kept == cut) & (index <= last))
            left += put_list(keep, index, kept, list_index + left, list_value + left)
        tl.debug_barrier()
        count = left
    return count


@triton.jit(do_not_specialize=["rows", "top_k", "steps"])
def flow_kernel(
    cond,  # [rows, VOCAB]
    uncond,  # [rows, VOCAB]; read if GUIDED
    noise,  # [rows, CHANNELS] float32
    codebook,  # [VOCAB, CHANNELS] float32
    tables,  # [3, steps, HISTORY] float32: predictor, corrector, and the knots in the first column
    tokens,  # [rows] int64
    x,  # [rows, CHANNELS] float32
    evaluations,  # [rows] int32
    scratch,  # [programs, 3 VOCAB + 8 C_PAD] float32
    rows,
    steps,
    guidance: tl.float64,
    temperature,
    top_k,
    share: tl.float64,
    offset,
    shrink,
    certain,
    pair,
    log_prune,  # log(prune), -inf for 0
    VOCAB: tl.constexpr,
    CHANNELS: tl.constexpr,
    HISTORY: tl.constexpr,
    GUIDED: tl.constexpr,
    HEATED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    DESCENDING: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    C_PAD: tl.constexpr,
):
    program = tl.program_id(0)
    list_value = scratch + program.to(tl.int64) * (3 * VOCAB + 8 * C_PAD)
    list_index = (list_value + VOCAB).to(tl.pointer_type(tl.int32))
    list_weight = list_value + 2 * VOCAB
    correct = tables + steps * HISTORY
    knots = correct + steps * HISTORY
    column = tl.arange(0, BLOCK_V)
    channel = tl.arange(0, C_PAD)
    inside = channel < CHANNELS
    ring = list_value + 3 * VOCAB + channel
    for row in range(program, rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        line = cond + at * VOCAB
        base = uncond + at * VOCAB
        value = guided_logits(line, base, column, column < VOCAB, guidance, temperature, GUIDED=GUIDED, HEATED=HEATED)
        wrong = tl.sum(((value != value) | (value == float("inf"))).to(tl.int32), 0)
        highest, lowest, finite = row_range(value)
        u = tl.load(noise + at * CHANNELS + channel, mask=inside, other=0.0)
        noise_wrong = tl.sum(((u != u) | (tl.abs(u) == float("inf"))).to(tl.int32), 0)
        if (wrong > 0) | (finite == 0) | (noise_wrong > 0):
            tl.store(tokens + at, 0)
            tl.store(x + at * CHANNELS + channel, tl.full([C_PAD], float("nan"), tl.float32), mask=inside)
            tl.store(evaluations + at, tl.where((wrong > 0) | (finite == 0), -1, -2))
        else:
            count = _filtered_list(
                value, column, list_index, list_value, list_weight, highest, lowest, finite, top_k, share,
                VOCAB=VOCAB, TOP_K=TOP_K, TOP_P=TOP_P, DESCENDING=DESCENDING, BLOCK_L=BLOCK_L,
            )  # fmt: skip
            log_total, mean, std, scale, rest = moments(
                codebook, list_index, list_value, count, highest,
                CHANNELS=CHANNELS, C_PAD=C_PAD, BLOCK=BLOCK_K, BLOCK_L=BLOCK_L,
            )  # fmt: skip
            doubt = log_prune + tl.log(rest)
            least = highest + log_total + doubt - tl.log(count.to(tl.float32))
            count = prune(list_index, list_value, list_value, count, least, BLOCK=BLOCK_L)
            tl.debug_barrier()
            std *= shrink
            step = count * 0
            r = scale * 0
            g = r + 1
            running = count > 2
            first = step.to(tl.int64)
            second = first
            if count <= 2:
                first, second = two_best(list_index, list_value, count, BLOCK=BLOCK_L)
            while running:
                rho = tl.load(knots + step * HISTORY)
                r = rho * scale
                g = tl.sqrt(1 + r * std * (r * std))
                guess = combine(u, tables + step * HISTORY, ring, step, SLOT=C_PAD, FIRST=0, HISTORY=HISTORY)
                field, best, weights = posterior(
                    codebook, list_index, list_value, list_weight, count, highest, log_total, g * guess + r * mean, r,
                    CHANNELS=CHANNELS, C_PAD=C_PAD, BLOCK=BLOCK_K,
                )  # fmt: skip
                tl.debug_barrier()  # list_weight is complete, and the ring has been read
                slope = (offset + rho) * scale * ((field - mean - std * std * r * guess / g) / g)
                u += tl.load(correct + step * HISTORY) * slope
                u = combine(u, correct + step * HISTORY, ring, step, SLOT=C_PAD, FIRST=1, HISTORY=HISTORY)
                step += 1
                tl.store(ring + (step & 7) * C_PAD, slope)
                first, second = two_best(list_index, list_weight, count, BLOCK=BLOCK_L)
                rival = key_value((second >> 32).to(tl.int32))
                least = best + tl.log(weights) + doubt - tl.log(count.to(tl.float32))
                done = decided(1 / weights, tl.exp(rival - best) / weights, rest, certain, pair) | (step == steps)
                running = not done
                if running:
                    count = prune(list_index, list_value, list_weight, count, least, BLOCK=BLOCK_L)
                    running = count > 2
                if rival < least:  # pruned, or would be
                    second = first
                tl.debug_barrier()  # list and ring are complete, or free for the next row
            z = g * u + r * mean
            i = key_index(first)
            j = tl.where(count > 1, key_index(second), i)
            log_i = guided_logits(line, base, i, True, guidance, temperature, GUIDED=GUIDED, HEATED=HEATED)
            log_j = guided_logits(line, base, j, True, guidance, temperature, GUIDED=GUIDED, HEATED=HEATED)
            token = _settle(codebook, i, j, log_i, log_j, z, r, CHANNELS=CHANNELS, C_PAD=C_PAD)
            tl.store(tokens + at, token.to(tl.int64))
            tl.store(x + at * CHANNELS + channel, z / (1 + r), mask=inside)
            tl.store(evaluations + at, step)


def flow_adams(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    codebook: Tensor,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
    solver: AdamsSolver,
    tokens: Tensor,
    x: Tensor,
    evaluations: Tensor,
    config: configs.RowsConfig | configs.TilesConfig | None = None,
) -> None:
    """Follow each row's noise to its token: ``ddfast.flow.tokens`` with an ``AdamsSolver``, in one or two launches.

    cond and uncond [N, V] (float32, bfloat16, float16), noise [N, C] and codebook [V, C] float32; written are tokens
    int64 [N], x float32 [N, C] (where the row was followed to) and evaluations int32 [N]. All contiguous and on one
    device. A row whose guided logits hold NaN or +inf, or nothing finite, gets token 0, x NaN and evaluations -1; one
    whose noise is not finite, -2. Nothing waits for the GPU; after a first call with this solver the call can be
    captured in a CUDA graph.

    config: in place of the recorded one.
    """
    rows, vocab = cond.shape
    if rows == 0:
        return
    device = cond.device
    channels = codebook.shape[1]
    config = config or configs.flow_config(configs.device_name(device), vocab, channels, filter, rows)
    if isinstance(config, configs.TilesConfig):
        launch_tiles(cond, uncond, noise, codebook, guidance, filter, solver, tokens, x, evaluations, config)
        return
    c_pad = triton.next_power_of_2(channels)
    programs = min(rows, config.per_sm * configs.processors(device))
    with torch.cuda.device_of(cond):
        flow_kernel[(programs,)](
            cond,
            cond if uncond is None else uncond,
            noise,
            codebook,
            solver_tables(solver, device),
            tokens,
            x,
            evaluations,
            torch.empty((programs, 3 * vocab + 8 * c_pad), dtype=torch.float32, device=device),
            rows,
            len(solver.knots),
            guidance,
            filter.divisor,
            *filter_numbers(filter, vocab),
            *solver_numbers(solver),
            **filter_flags(filter),
            GUIDED=uncond is not None,
            VOCAB=vocab,
            CHANNELS=channels,
            HISTORY=HISTORY,
            BLOCK_V=triton.next_power_of_2(vocab),
            BLOCK_L=config.block_l,
            BLOCK_K=config.block_k,
            C_PAD=c_pad,
            num_warps=config.num_warps,
            **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
        )
