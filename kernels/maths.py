"""Small functions that Triton lacks, of language primitives only, so that they also run in its interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_key(x):
    """int32 that sorts as float32 x does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    """The float32 of an ``order_key``."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def expm1(x):
    """exp(x) - 1 for float32 x >= 0, to a few units in the last place: a Taylor series below 1/2."""
    small = tl.minimum(x, 0.5)
    series = 1 + small / 8 * (1 + small / 9)
    series = 1 + small / 6 * (1 + small / 7 * series)
    series = 1 + small / 4 * (1 + small / 5 * series)
    series = 1 + small / 2 * (1 + small / 3 * series)
    return tl.where(x < 0.5, small * series, tl.exp(x) - 1)


@triton.jit
def log_normal_cdf(x):
    """log Phi(x) for float64 x, to 1e-8 (relative to 1 or to the result, whichever is larger).

    With z = |x| / sqrt 2 and t = 1 / (1 + z / 2), log(erfcx(z) / t) is smooth on 0 < t <= 1: a polynomial fitted at
    Chebyshev points. So log Phi(-|x|) = log(t / 2) + P(t) - z^2 holds however far out x lies.
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1 / (1 + 0.5 * z)
    p = 0.991357598174 - 0.178757244058 * t
    p = -2.20510750214 + t * p
    p = 2.39873373159 + t * p
    p = -1.22542517164 + t * p
    p = 0.335540227157 + t * p
    p = -0.233707890336 + t * p
    p = -0.0747341944268 + t * p
    p = 0.0825924332447 + t * p
    p = 0.375020199007 + t * p
    p = 0.99999992725 + t * p
    p = -1.26551212428 + t * p
    tail = tl.log(0.5 * t) + p - z * z
    return tl.where(x > 0, tl.log(1 - tl.exp(tail)), tail)


@triton.jit
def first_wins(log_first, log_second, along, half):
    """Which of two codes the flow ends at (``CodebookFlow.settle``): whether it is the first.

    log_first, log_second: float32 log-probabilities up to a common constant. along, half: float64, the point's
    coordinate from the middle towards the first centre, and half the distance of the two centres.
    """
    first = log_first.to(tl.float64) + log_normal_cdf(along - half)
    return first >= log_second.to(tl.float64) + log_normal_cdf(-along - half)
