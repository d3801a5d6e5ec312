"""The flow for many rows that keep much of the codebook: one program follows BLOCK_N rows, products on tensor cores.

With a filter, ``filters.row_cuts`` is launched first, and what a row's cut leaves out gets weight 0. Nothing is pruned,
since skipping an entry would not spare its row's product: so a token may take more evaluations than its twin. The
logits are read again at each evaluation. Weights need log p only up to a constant of the row, so the logits stand in
for it. The guided logit is computed in float32, unless a cut depends on its last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.flow.filters import LogitFilter
from ddfast.flow.multistep import AdamsSolver

from . import configs
from .cuts import guided_logits
from .filters import filter_flags, row_cuts
from .flow_list import natural_scale
from .flow_tables import HISTORY, combine, decided, solver_numbers, solver_tables
from .maths import first_wins


@triton.jit
def _logits(
    cond, uncond, offset, live, guidance: tl.float64, temperature,
    GUIDED: tl.constexpr, HEATED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """Guided logits of a tile as float32; -inf where ``live`` is not set."""
    if FILTERED:
        return guided_logits(cond, uncond, offset, live, guidance, temperature, GUIDED=GUIDED, HEATED=HEATED)
    logits = tl.load(cond + offset, mask=live, other=-float("inf")).to(tl.float32)
    if GUIDED:
        base = tl.load(uncond + offset, mask=live, other=-float("inf")).to(tl.float32)
        logits = tl.where(logits == base, base, base + tl.cast(guidance, tl.float32) * (logits - base))
    if HEATED:
        logits = logits / temperature
    return logits


@triton.jit
def _kept(value, entry, cut, last, FILTERED: tl.constexpr):
    """``value`` [N, B] of the entries [B], -inf where a row's cut [N] leaves them out."""
    if FILTERED:
        tied = (value == cut[:, None]) & (entry[None, :] <= last[:, None])
        value = tl.where((value > cut[:, None]) | tied, value, -float("inf"))
    return value


@triton.jit
def _codes(codebook, entry, VOCAB: tl.constexpr, CHANNELS: tl.constexpr, C_PAD: tl.constexpr):
    """Rows ``entry`` of the codebook [B, C_PAD], 0 where there are none, and |c|^2 / 2 [B]."""
    channel = tl.arange(0, C_PAD)
    live = (entry < VOCAB)[:, None] & (channel < CHANNELS)[None, :]
    code = tl.load(codebook + entry[:, None] * CHANNELS + channel[None, :], mask=live, other=0.0)
    return code, 0.5 * tl.sum(code * code, 1)


@triton.jit
def _tile_best(weight, entry):
    """The largest of weight [N, B] in each row [N], and the lowest index that has it."""
    best = tl.max(weight, 1)
    return best, tl.min(tl.where(weight == best[:, None], entry[None, :], 0x7FFFFFFF), 1)


@triton.jit
def _moments(
    cond, uncond, codebook, row_offset, live, guidance: tl.float64, temperature, cut, last,
    VOCAB: tl.constexpr, CHANNELS: tl.constexpr, C_PAD: tl.constexpr, GUIDED: tl.constexpr, HEATED: tl.constexpr,
    FILTERED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """mean [BLOCK_N, C_PAD], std, scale and rest [BLOCK_N] of the rows, and which of them are bad; how many entries are
    possible, the first largest one, and the other one if they are two."""
    highest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    top = tl.zeros([BLOCK_N], tl.int32)
    total = tl.zeros([BLOCK_N], tl.float32)
    wrong = tl.zeros([BLOCK_N], tl.int32)
    count = tl.zeros([BLOCK_N], tl.int32)
    indices = tl.zeros([BLOCK_N], tl.int32)  # their sum
    for start in range(0, VOCAB, BLOCK_V):
        entry = start + tl.arange(0, BLOCK_V)
        mask = live[:, None] & (entry < VOCAB)[None, :]
        value = _logits(
            cond, uncond, row_offset + entry[None, :], mask, guidance, temperature, GUIDED, HEATED, FILTERED
        )
        wrong += tl.sum(((value != value) | (value == float("inf"))).to(tl.int32), 1)
        value = _kept(value, entry, cut, last, FILTERED)
        possible = value > -float("inf")
        count += tl.sum(possible.to(tl.int32), 1)
        indices += tl.sum(tl.where(possible, entry[None, :], 0), 1)
        best, index = _tile_best(value, entry)
        top = tl.where(best > highest, index, top)
        higher = tl.maximum(highest, best)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(value - base[:, None]), 1)
        highest = higher
    bad = (wrong > 0) | (highest == -float("inf"))
    log_total = tl.log(total)

    entropy = tl.zeros([BLOCK_N], tl.float32)
    rest = tl.zeros([BLOCK_N], tl.float32)
    half = tl.zeros([BLOCK_N], tl.float32)
    first = tl.zeros([BLOCK_N, C_PAD], tl.float32)
    for start in range(0, VOCAB, BLOCK_V):
        entry = start + tl.arange(0, BLOCK_V)
        mask = live[:, None] & (entry < VOCAB)[None, :]
        value = _logits(
            cond, uncond, row_offset + entry[None, :], mask, guidance, temperature, GUIDED, HEATED, FILTERED
        )
        value = _kept(value, entry, cut, last, FILTERED)
        log_p = (value - highest[:, None]) - log_total[:, None]
        p = tl.exp(log_p)
        entropy -= tl.sum(tl.where(p > 0, p * log_p, 0.0), 1)
        p = tl.where(entry[None, :] == top[:, None], 0.0, p)
        code, half_square = _codes(codebook, entry, VOCAB, CHANNELS, C_PAD)
        rest += tl.sum(p, 1)
        half += tl.sum(p * half_square[None, :], 1)
        first = tl.dot(p, code, first, input_precision="tf32x3")
    channel = tl.arange(0, C_PAD)
    near = tl.where(bad, 0, top)[:, None] * CHANNELS + channel[None, :]
    centre = tl.load(codebook + near, mask=(channel < CHANNELS)[None, :], other=0.0)
    shift = first - rest[:, None] * centre
    second = 2 * half - tl.sum((first + shift) * centre, 1)
    std, scale = natural_scale(second - tl.sum(shift * shift, 1), entropy, CHANNELS)
    return centre + shift, std, scale, rest, bad, count, top, tl.where(count == 2, indices - top, top)


@triton.jit
def _posterior(
    cond, uncond, codebook, row_offset, live, guidance: tl.float64, temperature, cut, last, z, r,
    VOCAB: tl.constexpr, CHANNELS: tl.constexpr, C_PAD: tl.constexpr, GUIDED: tl.constexpr, HEATED: tl.constexpr,
    FILTERED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """At z [BLOCK_N, C_PAD] and r [BLOCK_N]: D, the two largest weights, and the indices that have them.

    Online softmax: sums are relative to the largest log-weight so far and rescaled when it grows.
    """
    best = tl.full([BLOCK_N], -float("inf"), tl.float32)
    other = tl.full([BLOCK_N], -float("inf"), tl.float32)
    best_index = tl.zeros([BLOCK_N], tl.int32)
    other_index = tl.zeros([BLOCK_N], tl.int32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N, C_PAD], tl.float32)
    point = r[:, None] * z
    square = (r * r)[:, None]
    for start in range(0, VOCAB, BLOCK_V):
        entry = start + tl.arange(0, BLOCK_V)
        mask = live[:, None] & (entry < VOCAB)[None, :]
        value = _logits(
            cond, uncond, row_offset + entry[None, :], mask, guidance, temperature, GUIDED, HEATED, FILTERED
        )
        value = _kept(value, entry, cut, last, FILTERED)
        code, half_square = _codes(codebook, entry, VOCAB, CHANNELS, C_PAD)
        weight = tl.dot(point, tl.trans(code), input_precision="tf32x3") - square * half_square[None, :] + value

        tile, index = _tile_best(weight, entry)
        rival, rival_index = _tile_best(tl.where(entry[None, :] == index[:, None], -float("inf"), weight), entry)
        leads = tile > best
        loser = tl.where(leads, best, tile)  # of the two leaders; the second best is it, or a second of its own side
        loser_index = tl.where(leads, best_index, index)
        runner = tl.where(leads, rival, other)
        runner_index = tl.where(leads, rival_index, other_index)
        # of equal weights the lower index: the one found before this tile
        own = tl.where(leads, runner > loser, runner >= loser)
        other = tl.where(own, runner, loser)
        other_index = tl.where(own, runner_index, loser_index)
        best_index = tl.where(leads, index, best_index)

        higher = tl.maximum(best, tile)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp(best - base)
        share = tl.exp(weight - base[:, None])
        total = total * shrink + tl.sum(share, 1)
        mean = tl.dot(share, code, mean * shrink[:, None], input_precision="tf32x3")
        best = higher
    w1 = 1 / total
    return mean * w1[:, None], w1, tl.exp(other - best) * w1, best_index, other_index


@triton.jit
def _settle(
    cond, uncond, codebook, row_offset, live, guidance: tl.float64, temperature, i, j, z, r,
    CHANNELS: tl.constexpr, C_PAD: tl.constexpr, GUIDED: tl.constexpr, HEATED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """Which of the codes i and j [BLOCK_N] the flow ends at; see ``CodebookFlow.settle``."""
    channel = tl.arange(0, C_PAD)
    inside = (channel < CHANNELS)[None, :]
    code_i = tl.load(codebook + i[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0).to(tl.float64)
    code_j = tl.load(codebook + j[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0).to(tl.float64)
    away = code_i - code_j
    gap = tl.sqrt(tl.sum(away * away, 1))
    wide = r.to(tl.float64)
    middle = z.to(tl.float64) - 0.5 * wide[:, None] * (code_i + code_j)
    along = tl.sum(middle * away, 1) / tl.where(gap > 0, gap, 1.0)
    at_i = row_offset + i[:, None]
    log_i = _logits(cond, uncond, at_i, live[:, None], guidance, temperature, GUIDED, HEATED, FILTERED)
    at_j = row_offset + j[:, None]
    log_j = _logits(cond, uncond, at_j, live[:, None], guidance, temperature, GUIDED, HEATED, FILTERED)
    wins = first_wins(tl.sum(log_i, 1), tl.sum(log_j, 1), along, 0.5 * wide * gap)
    return tl.where(wins, i, j)


@triton.jit(do_not_specialize=["rows", "steps"])
def tiles_kernel(
    cond,  # [rows, VOCAB]
    uncond,  # [rows, VOCAB]; read if GUIDED
    noise,  # [rows, CHANNELS] float32
    codebook,  # [VOCAB, CHANNELS] float32
    tables,  # [3, steps, HISTORY] float32: predictor, corrector, and the knots in the first column
    tokens,  # [rows] int64
    x,  # [rows, CHANNELS] float32
    evaluations,  # [rows] int32
    slopes,  # [programs, 8, BLOCK_N, C_PAD] float32
    cuts,  # [rows] float32; read if FILTERED
    lasts,  # [rows] int32; read if FILTERED
    rows,
    steps,
    guidance: tl.float64,
    temperature,
    offset,
    shrink,
    certain,
    pair,
    VOCAB: tl.constexpr,
    CHANNELS: tl.constexpr,
    HISTORY: tl.constexpr,
    GUIDED: tl.constexpr,
    HEATED: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C_PAD: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < rows
    channel = tl.arange(0, C_PAD)
    inside = live[:, None] & (channel < CHANNELS)[None, :]
    at = row.to(tl.int64)
    row_offset = (at * VOCAB)[:, None]
    place = (at * CHANNELS)[:, None] + channel[None, :]
    knots = tables + 2 * steps * HISTORY
    slot = (tl.arange(0, BLOCK_N) * C_PAD)[:, None] + channel[None, :]
    ring = slopes + tl.program_id(0).to(tl.int64) * (8 * BLOCK_N * C_PAD) + slot

    u = tl.load(noise + place, mask=inside, other=0.0)
    noise_wrong = tl.sum(((u != u) | (tl.abs(u) == float("inf"))).to(tl.int32), 1) > 0
    cut = tl.full([BLOCK_N], -float("inf"), tl.float32)
    last = tl.zeros([BLOCK_N], tl.int32)
    if FILTERED:
        cut = tl.load(cuts + at, mask=live, other=0.0)
        last = tl.load(lasts + at, mask=live, other=0)
    mean, std, scale, rest, bad, count, top, other = _moments(
        cond, uncond, codebook, row_offset, live, guidance, temperature, cut, last,
        VOCAB, CHANNELS, C_PAD, GUIDED, HEATED, FILTERED, BLOCK_N, BLOCK_V,
    )  # fmt: skip
    good = live & ~(bad | noise_wrong)
    few = good & (count <= 2)
    i = tl.where(few, top, 0)
    j = tl.where(few, other, 0)
    token = _settle(
        cond, uncond, codebook, row_offset, live, guidance, temperature, i, j, u, tl.zeros([BLOCK_N], tl.float32),
        CHANNELS, C_PAD, GUIDED, HEATED, FILTERED,
    )  # fmt: skip
    ended = few | (live & ~good)
    tl.store(tokens + at, tl.where(few, token, 0).to(tl.int64), mask=ended)
    tl.store(x + place, tl.where(few[:, None], u, float("nan")), mask=inside & ended[:, None])
    tl.store(evaluations + at, tl.where(few, 0, tl.where(bad, -1, -2)), mask=ended)

    std *= shrink
    waiting = (good & ~few).to(tl.int32)
    step = tl.sum(waiting, 0) * 0
    while tl.sum(waiting, 0) > 0:
        rho = tl.load(knots + step * HISTORY)
        r = rho * scale
        g = tl.sqrt(1 + r * std * (r * std))[:, None]
        guess = combine(u, tables + step * HISTORY, ring, step, SLOT=BLOCK_N * C_PAD, FIRST=0, HISTORY=HISTORY)
        field, w1, w2, i, j = _posterior(
            cond, uncond, codebook, row_offset, live, guidance, temperature, cut, last,
            g * guess + r[:, None] * mean, r,
            VOCAB, CHANNELS, C_PAD, GUIDED, HEATED, FILTERED, BLOCK_N, BLOCK_V,
        )  # fmt: skip
        pull = (field - mean - (std * std * r)[:, None] * guess / g) / g
        slope = ((offset + rho) * scale)[:, None] * pull
        weights = tables + (steps + step) * HISTORY
        u += tl.load(weights) * slope
        u = combine(u, weights, ring, step, SLOT=BLOCK_N * C_PAD, FIRST=1, HISTORY=HISTORY)
        step += 1
        tl.debug_barrier()  # the ring has been read
        tl.store(ring + (step & 7) * (BLOCK_N * C_PAD), slope)
        tl.debug_barrier()  # and is complete
        leaving = (waiting > 0) & (decided(w1, w2, rest, certain, pair) | (step == steps))
        if tl.sum(leaving.to(tl.int32), 0) > 0:
            z = g * u + r[:, None] * mean
            i = tl.where(leaving, i, 0)
            j = tl.where(leaving & (w2 > 0), j, i)
            token = _settle(
                cond, uncond, codebook, row_offset, live, guidance, temperature, i, j, z, r,
                CHANNELS, C_PAD, GUIDED, HEATED, FILTERED,
            )  # fmt: skip
            tl.store(tokens + at, token.to(tl.int64), mask=leaving)
            tl.store(x + place, z / (1 + r)[:, None], mask=inside & leaving[:, None])
            tl.store(evaluations + at, tl.zeros([BLOCK_N], tl.int32) + step, mask=leaving)
        waiting = tl.where(leaving, 0, waiting)


def launch_tiles(
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
    config: configs.TilesConfig,
) -> None:
    """``flow.flow_adams``, for at least one row."""
    rows, vocab = cond.shape
    flags = filter_flags(filter)
    filtered = flags["TOP_K"] or flags["TOP_P"]
    cuts, lasts = row_cuts(cond, uncond, guidance, filter) if filtered else (x, evaluations)
    programs = triton.cdiv(rows, config.block_n)
    c_pad = max(16, triton.next_power_of_2(codebook.shape[1]))
    with torch.cuda.device_of(cond):
        tiles_kernel[(programs,)](
            cond,
            cond if uncond is None else uncond,
            noise,
            codebook,
            solver_tables(solver, cond.device),
            tokens,
            x,
            evaluations,
            torch.empty((programs, 8, config.block_n, c_pad), dtype=torch.float32, device=cond.device),
            cuts,
            lasts,
            rows,
            len(solver.knots),
            guidance,
            filter.divisor,
            *solver_numbers(solver)[:4],
            VOCAB=vocab,
            CHANNELS=codebook.shape[1],
            HISTORY=HISTORY,
            GUIDED=uncond is not None,
            HEATED=flags["HEATED"],
            FILTERED=filtered,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            C_PAD=c_pad,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
