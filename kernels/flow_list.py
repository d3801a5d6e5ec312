"""Steps of the flow over one row's list of kept entries: index (int32), value (logit) and weight (log), in scratch.

Blocks are [BLOCK] entries, or [BLOCK, C_PAD] with the codes gathered from the codebook [VOCAB, CHANNELS].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cuts import put_list
from .maths import expm1, order_key


@triton.jit
def _codes(codebook, index, live, CHANNELS: tl.constexpr, C_PAD: tl.constexpr):
    """Rows ``index`` [BLOCK] of the codebook: [BLOCK, C_PAD], 0 outside of ``live`` and beyond the channels."""
    channel = tl.arange(0, C_PAD)
    offset = index[:, None] * CHANNELS + channel[None, :]
    return tl.load(codebook + offset, mask=live[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def moments(
    codebook,
    list_index,
    list_value,
    count,
    highest,
    CHANNELS: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """log sum exp(value - highest), mean [C_PAD], std, natural scale R* and rest of a list (``CodebookFlow.moments``).

    What lies about the most probable code (the first one) is summed over the others, so that nothing cancels.
    """
    total = tl.zeros([BLOCK_L], tl.float32)
    equal = tl.zeros([BLOCK_L], tl.float32)
    top = tl.full([BLOCK_L], 0x7FFFFFFF, tl.int32)
    for start in range(0, count, BLOCK_L):
        entry = start + tl.arange(0, BLOCK_L)
        live = entry < count
        value = tl.load(list_value + entry, mask=live, other=-float("inf"))
        index = tl.load(list_index + entry, mask=live & (value == highest), other=0x7FFFFFFF)
        top = tl.minimum(top, index)
        total += tl.where(value < highest, tl.exp(value - highest), 0.0)
        equal += (value == highest).to(tl.float32)
    top = tl.min(top, 0)
    others = tl.sum(total, 0) + (tl.sum(equal, 0) - 1)  # without the most probable one, which would swallow them
    log_total = tl.where(others < 1e-4, others * (1 - 0.5 * others), tl.log(1 + others))

    channel = tl.arange(0, C_PAD)
    centre = tl.load(codebook + top * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
    entropy = tl.zeros([BLOCK], tl.float32)
    rest = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK, C_PAD], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        live = entry < count
        index = tl.load(list_index + entry, mask=live, other=0)
        log_p = (tl.load(list_value + entry, mask=live, other=0.0) - highest) - log_total
        p = tl.where(live, tl.exp(log_p), 0.0)
        entropy -= p * log_p
        p = tl.where(index == top, 0.0, p)
        away = _codes(codebook, index, live, CHANNELS, C_PAD) - centre[None, :]
        rest += p
        first += p[:, None] * away
        second += p * tl.sum(away * away, 1)
    shift = tl.sum(first, 0)
    std, scale = natural_scale(tl.sum(second, 0) - tl.sum(shift * shift, 0), tl.sum(entropy, 0), CHANNELS)
    return log_total, centre + shift, std, scale, tl.sum(rest, 0)


@triton.jit
def natural_scale(variance, entropy, CHANNELS: tl.constexpr):
    """std s and R* = sqrt(exp(2 H / C) - 1) / s, from C s^2 and H (nats); R* = 1 where either is 0."""
    std = tl.sqrt(tl.maximum(variance, 0.0) / CHANNELS)
    radius = tl.sqrt(expm1(tl.maximum(entropy, 0.0) * (2.0 / CHANNELS)))
    known = (std > 0) & (radius > 0)
    return std, tl.where(known, radius / tl.where(known, std, 1.0), 1.0)


@triton.jit
def posterior(
    codebook,
    list_index,
    list_value,
    list_weight,
    count,
    highest,
    log_total,
    z,
    r,
    CHANNELS: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """D [C_PAD] at z [C_PAD] and r, the largest log-weight, and the sum of all weights over the largest.

    Writes log p + r z.c - r^2 |c|^2 / 2 to list_weight. One pass: each of BLOCK lanes keeps its own running maximum, so
    that lanes meet only once.
    """
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK, C_PAD], tl.float32)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        live = entry < count
        index = tl.load(list_index + entry, mask=live, other=0)
        code = _codes(codebook, index, live, CHANNELS, C_PAD)
        log_p = (tl.load(list_value + entry, mask=live, other=-float("inf")) - highest) - log_total
        weight = log_p + tl.sum(code * (r * z[None, :] - (0.5 * r * r) * code), 1)
        tl.store(list_weight + entry, weight, mask=live)
        higher = tl.maximum(peak, weight)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp(peak - base)
        share = tl.exp(weight - base)
        total = total * shrink + share
        mean = mean * shrink[:, None] + share[:, None] * code
        peak = higher
    best = tl.max(peak, 0)
    shrink = tl.exp(peak - best)
    weights = tl.sum(total * shrink, 0)
    return tl.sum(mean * shrink[:, None], 0) / weights, best, weights


@triton.jit
def two_best(list_index, list_weight, count, BLOCK: tl.constexpr):
    """The two entries of largest weight (ties: the lower index), as int64 keys; see ``key_index``, ``key_weight``.

    The second is -1 << 63 if there is one entry.
    """
    nothing = -1 << 63
    best = tl.full([BLOCK], nothing, tl.int64)
    other = tl.full([BLOCK], nothing, tl.int64)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        live = entry < count
        weight = tl.load(list_weight + entry, mask=live, other=0.0)
        index = tl.load(list_index + entry, mask=live, other=0)
        key = (order_key(weight).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
        key = tl.where(live, key, nothing)
        other = tl.maximum(other, tl.minimum(best, key))
        best = tl.maximum(best, key)
    first = tl.max(best, 0)
    return first, tl.max(tl.where(best == first, other, best), 0)


@triton.jit
def key_index(key):
    """The index in a key of ``two_best``."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def prune(list_index, list_value, list_weight, count, least, BLOCK: tl.constexpr):
    """Take entries of weight below ``least`` off the list, in place. Returns how many are left.

    An entry moves to a place of its own block or an earlier one, and is read before any of its block moves.
    """
    left = count * 0
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        live = entry < count
        weight = tl.load(list_weight + entry, mask=live, other=-float("inf"))
        index = tl.load(list_index + entry, mask=live, other=0)
        value = tl.load(list_value + entry, mask=live, other=0.0)
        tl.debug_barrier()
        left += put_list(live & (weight >= least), index, value, list_index + left, list_value + left)
    return left
