"""Guided logits, and the cuts of top-k and top-p without a sort; shared by the filter and the flow.

A cut is found by bisection over the float32 numbers, so it is exact, ties included. A row's kept entries are a list: up
to V pairs (index int32, value float32) in the program's own scratch, in the order of the index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import key_value, order_key


@triton.jit
def guided_logits(
    cond, uncond, offset, live, guidance: tl.float64, temperature, GUIDED: tl.constexpr, HEATED: tl.constexpr
):
    """(u + guidance (c - u)) / temperature, as float32, at ``offset`` from two pointers; -inf where not ``live``.

    The guided logit is computed in float64 and rounded once; -inf in both stays -inf.
    """
    logits = tl.load(cond + offset, mask=live, other=-float("inf")).to(tl.float32)
    if GUIDED:
        base = tl.load(uncond + offset, mask=live, other=-float("inf")).to(tl.float32)
        wide = base.to(tl.float64)
        gap = tl.where(logits == base, 0.0, logits.to(tl.float64) - wide)
        logits = (wide + gap * guidance).to(tl.float32)
    if HEATED:
        logits = tl.div_rn(logits, temperature)
    return logits


@triton.jit
def row_range(values):
    """The largest value, the smallest finite one (inf if none), and how many are above -inf."""
    finite = values > -float("inf")
    lowest = tl.min(tl.where(finite, values, float("inf")), 0)
    return tl.max(values, 0), lowest, tl.sum(finite.to(tl.int32), 0)


@triton.jit
def _key_below(x):
    """The key of a number below x: the one before, but -2e-37 near 0, since the key before that of 0 is that of -0."""
    return tl.where(tl.abs(x) < 1e-37, order_key(tl.minimum(x, -2e-37)), order_key(x) - 1)


@triton.jit
def _between(lo, hi, step):
    """A key strictly between lo and hi, which are at least 2 apart.

    Halving the interval of values is quick for logits, halving that of keys is sure to end: 16 of the first come first.
    """
    by_value = order_key(0.5 * key_value(lo) + 0.5 * key_value(hi))
    by_key = ((lo.to(tl.int64) + hi.to(tl.int64)) >> 1).to(tl.int32)
    return tl.minimum(tl.maximum(tl.where(step < 16, by_value, by_key), lo + 1), hi - 1)


@triton.jit
def top_k_floor(values, top_k, highest, lowest, finite):
    """The number above which lie the values [B] to keep: all that are at least the k-th largest.

    highest, lowest, finite: ``row_range(values)``. Below k finite values all of them are kept.
    """
    lo = _key_below(lowest)
    hi = order_key(highest)
    above = finite  # values above lo: at least k of them, and less than k above hi
    step = 0
    while (above > top_k) & (hi > lo + 1):
        middle = _between(lo, hi, step)
        count = tl.sum((values > key_value(middle)).to(tl.int32), 0)
        enough = count >= top_k
        lo = tl.where(enough, middle, lo)
        above = tl.where(enough, count, above)
        hi = tl.where(enough, hi, middle)
        step += 1
    return key_value(lo)


@triton.jit
def put_list(keep, index, value, list_index, list_value):
    """Write the entries of a block whose mask ``keep`` is set one after the other. Returns how many they are."""
    ones = keep.to(tl.int32)
    place = tl.cumsum(ones, 0) - 1
    tl.store(list_index + place, index, mask=keep)
    tl.store(list_value + place, value, mask=keep)
    return tl.sum(ones, 0)


@triton.jit
def list_row(values, column, floor, copy, list_index, list_value, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Put the entries of a row [B] that are above ``floor`` on a list. Returns how many they are.

    By way of ``copy`` [VOCAB] in scratch, BLOCK at a time: ranks of a whole row at once would not fit in registers.
    """
    tl.store(copy + column, values, mask=column < VOCAB)
    tl.debug_barrier()
    count = tl.program_id(0) * 0
    for start in range(0, VOCAB, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        value = tl.load(copy + entry, mask=entry < VOCAB, other=-float("inf"))
        count += put_list(value > floor, entry, value, list_index + count, list_value + count)
    tl.debug_barrier()
    return count


@triton.jit
def _mass(list_value, count, highest, point, UPPER: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of exp(value - highest) (float64) of a list over the values above ``point``, or else over the others; and how
    many values are above it."""
    mass = tl.zeros([BLOCK], tl.float64)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        value = tl.load(list_value + entry, mask=entry < count, other=-float("inf"))
        over = value > point
        part = tl.exp(value - highest).to(tl.float64)
        mass += tl.where(over, part, 0.0) if UPPER else tl.where(over, 0.0, part)
        above += over.to(tl.int32)
    return tl.sum(mass, 0), tl.sum(above, 0)


@triton.jit
def top_p_cut(
    list_index, list_value, count, highest, lowest, share: tl.float64, DESCENDING: tl.constexpr, BLOCK: tl.constexpr
):
    """Two numbers (cut, last) of a list: top-p keeps value > cut, and value == cut where index <= last.

    DESCENDING ("llamagen", share = top_p): an entry goes when the mass before it exceeds ``share`` of all. Otherwise
    ("var", share = 1 - top_p): in ascending order, entries go while the mass up to and with them is at most ``share``
    of all, the largest never. Of equal values the lower index is kept first.
    """
    total, _ = _mass(list_value, count, highest, -float("inf"), True, BLOCK)
    limit = total * share
    lo = _key_below(lowest)
    hi = order_key(highest)
    above_lo = count
    above_hi = count * 0
    step = 0
    while (above_lo > above_hi + 1) & (hi > lo + 1):  # the cut is a value in (lo, hi]
        middle = _between(lo, hi, step)
        mass, above = _mass(list_value, count, highest, key_value(middle), DESCENDING, BLOCK)
        kept = mass <= limit if DESCENDING else mass > limit
        hi = tl.where(kept, middle, hi)
        above_hi = tl.where(kept, above, above_hi)
        lo = tl.where(kept, lo, middle)
        above_lo = tl.where(kept, above_lo, above)
        step += 1
    cut, ties, outside = _at_cut(list_value, count, highest, key_value(lo), DESCENDING, BLOCK)
    kept_ties = _ties_kept(outside, tl.exp(cut - highest).to(tl.float64), ties, limit, DESCENDING)
    last = 0x7FFFFFFF
    if kept_ties < ties:
        last = _index_of_tie(list_index, list_value, count, cut, kept_ties, BLOCK)
    return cut, last


@triton.jit
def _at_cut(list_value, count, highest, point, UPPER: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest value above ``point``, how often the list has it, and the mass above it, or else below it."""
    least = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        value = tl.load(list_value + entry, mask=entry < count, other=-float("inf"))
        least = tl.minimum(least, tl.where(value > point, value, float("inf")))
    cut = tl.min(least, 0)
    ties = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        value = tl.load(list_value + entry, mask=entry < count, other=-float("inf"))
        ties += (value == cut).to(tl.int32)
        beyond = value > cut if UPPER else value < cut
        mass += tl.where(beyond, tl.exp(value - highest), 0.0).to(tl.float64)
    return cut, tl.sum(ties, 0), tl.sum(mass, 0)


@triton.jit
def _ties_kept(outside, each, ties, limit, DESCENDING: tl.constexpr):
    """How many of ``ties`` entries of mass ``each`` stay (at least 1), with mass ``outside`` above or below them."""
    most = ties.to(tl.float64)
    fit = tl.floor((limit - outside) / tl.maximum(each, 1e-300))  # the i with outside + i each <= limit
    fit = tl.minimum(tl.maximum(fit, -1.0), most)
    fit = tl.where(outside + (fit + 1) * each <= limit, fit + 1, fit)  # the quotient was rounded
    fit = tl.where(outside + fit * each > limit, fit - 1, fit)
    kept = fit + 1 if DESCENDING else most - fit
    return tl.minimum(tl.maximum(kept, 1.0), most).to(tl.int32)


@triton.jit
def _index_of_tie(list_index, list_value, count, cut, nth, BLOCK: tl.constexpr):
    """The index of the nth (from 1) entry of value ``cut``."""
    found = tl.zeros([BLOCK], tl.int32)
    seen = nth * 0
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        live = entry < count
        tied = live & (tl.load(list_value + entry, mask=live, other=0.0) == cut)
        rank = seen + tl.cumsum(tied.to(tl.int32), 0)
        index = tl.load(list_index + entry, mask=live, other=0)
        found += tl.where(tied & (rank == nth), index, 0)
        seen += tl.sum(tied.to(tl.int32), 0)
    return tl.sum(found, 0)
