"""The noise of a pair: a pure function of (seed, pair index, position, channel).

Shards store tokens and labels, not noise, so this definition is a file format and never changes. It uses integer
operations and IEEE 754 float32 multiplication, addition, subtraction and square root, each rounded to nearest even and
never fused, so that torch on any device, C++ and CUDA (csrc/core) give the same bits.

1. Words. Philox4x32-10 (Salmon et al., SC 2011) with key = (seed mod 2^32, seed >> 32) and counter = (pair mod 2^32,
   pair >> 32, position, q = channel // 4) gives four 32-bit words x0..x3. (x0, x1) make the normals of channels 4q and
   4q + 1, (x2, x3) those of 4q + 2 and 4q + 3. Words of channels past the last are not used.
2. Radius r = sqrt(-2 ln u) with u = float32(x0) 2^-32 + 2^-33, in (0, 1]. The bits of u are split into u = 2^e (1 + f)
   with 1 + f in [sqrt(1/2), sqrt(2)), and ln(1 + f) = f - f^2 / 2 + f^3 P(f), P of degree 7.
3. Direction 2 pi x1 / 2^32. The nearest multiple of pi / 2 is taken off exactly, in integers; the rest, at most pi / 4
   in size, goes through an odd polynomial for the sine and an even one for the cosine.
4. Normals: r cos to the first channel, r sin to the second (Box and Muller, 1958).

The normals are within 4.5 ulp of the exact function of (u, x1), r within 1 ulp, and none exceeds 6.77 (u >= 2^-33).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOG_POLYNOMIAL = (
    0.333332509,
    -0.250010282,
    0.200050533,
    -0.166195661,
    0.141411915,
    -0.131435588,
    0.130807176,
    -0.0801214054,
)
_LN2_HIGH = 0.693359375  # ln 2 = high + low; high has 9 significant bits, so that e * high is exact
_LN2_LOW = -2.12194440e-4
_SINE_POLYNOMIAL = (-0.166666552, 8.33218917e-3, -1.95182918e-4)  # sin a = a + a^3 S(a^2)
_COSINE_POLYNOMIAL = (4.16666456e-2, -1.38873095e-3, 2.44323273e-5)  # cos a = 1 - a^2 / 2 + a^4 C(a^2)
_ANGLE_UNIT = 1.46291811e-9  # pi / 2^31, the angle of one step of x1
_SQRT_HALF_BITS = 0x3F3504F3  # float32 sqrt(1/2)
_WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10.

    ``counter`` is int64 [..., 4] with values in [0, 2^32), ``key`` two integers in [0, 2^32). Returns the four random
    words, int64 [..., 4] in [0, 2^32). Equal to Random123's ``philox4x32_R(10, ...)``.
    """
    x0, x1, x2, x3 = counter.unbind(-1)
    key0, key1 = key
    for _ in range(10):
        product0 = x0 * 0xD2511F53  # 64 bits wide: wraps to a negative number, the bits stay
        product1 = x2 * 0xCD9E8D57
        x0 = (product1 >> 32 & _WORD) ^ x1 ^ key0
        x1 = product1 & _WORD
        x2 = (product0 >> 32 & _WORD) ^ x3 ^ key1
        x3 = product0 & _WORD
        key0 = (key0 + 0x9E3779B9) & _WORD
        key1 = (key1 + 0xBB67AE85) & _WORD
    return torch.stack((x0, x1, x2, x3), -1)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """sum_i coefficients[i] x^i, from the highest power down."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u) as float32 for words int64 in [0, 2^32)."""
    u = word.to(torch.float32) * 2.0**-32 + 2.0**-33
    bits = u.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    e = exponent.to(torch.float32)
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    f2 = f * f
    tail = f * f2 * _horner(f, _LOG_POLYNOMIAL) + e * _LN2_LOW
    minus_log = f2 * 0.5 - tail - f - e * _LN2_HIGH
    # torch's float32 square root may come from a vector library that is 1 ulp off. Through float64 the nearest float32
    # comes out: no root of a float32 is as close to a rounding boundary as float64's error.
    return torch.sqrt((minus_log + minus_log).double()).float()


def _direction(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi word / 2^32 as float32 for words int64 in [0, 2^32)."""
    quadrant = (word + 2**29) >> 30
    a = (word - (quadrant << 30)).to(torch.float32) * _ANGLE_UNIT
    a2 = a * a
    sine = a * a2 * _horner(a2, _SINE_POLYNOMIAL) + a
    cosine = a2 * a2 * _horner(a2, _COSINE_POLYNOMIAL) - a2 * 0.5 + 1.0
    odd = (quadrant & 1).bool()
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where((quadrant + 1 & 2).bool(), -first, first)
    second = torch.where((quadrant & 2).bool(), -second, second)
    return first, second


def normal_noise(
    seed: int, pairs: Tensor, start: int, stop: int, channels: int, device: torch.device | str | None = None
) -> Tensor:
    """The noise of some pairs at positions start..stop-1: float32 [B, stop - start, channels], standard normal.

    ``seed`` in [0, 2^64); ``pairs`` int64 [B], pair indices >= 0 in any order; 0 <= start <= stop <= 2^32. The result
    is on ``device``, by default that of ``pairs``. This is the readable twin of the compiled loops:
    ``ddfast.ops.normal_noise`` checks its input and takes the fastest.

        normal_noise(0, torch.arange(4), 0, 680, 32)  # the noise of the first four pairs, [4, 680, 32]
    """
    pairs = pairs.to(device)
    pair = pairs[:, None, None]
    position = torch.arange(start, stop, device=pairs.device)[:, None]
    quad = torch.arange(-(-channels // 4), device=pairs.device)
    shape = (len(pairs), len(position), len(quad))
    counter = torch.stack([word.expand(shape) for word in (pair & _WORD, pair >> 32, position, quad)], -1)
    words = philox4x32(counter, (seed & _WORD, seed >> 32))  # [B, positions, quads, 4]
    radius = _radius(words[..., 0::2])
    cosine, sine = _direction(words[..., 1::2])
    normals = torch.stack((radius * cosine, radius * sine), -1)  # [B, positions, quads, 2, 2]
    return normals.flatten(2)[..., :channels].contiguous()
