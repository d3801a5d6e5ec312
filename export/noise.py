"""The noise of ddfast/noise.py as a graph of float32 operations, for runtimes without 64-bit integers and bit logic.

OpenVINO computes int64 as int32, and TensorRT's parser has no shifts and no XOR. So a 32-bit word is four bytes, each a
float32, and every step but the normals' own arithmetic is exact: sums stay within 2^24, and the rest is powers of two.

- Product: word times multiplier has four columns of 16 bits, column j = sum_i byte_i window_ij, and carries go up once.
- XOR: a byte is spread to the even bits of a number below 2^16. Three of these add up without a carry from one pair of
  bits to the next, and a table takes the lower bit of each pair.

Axes: b bytes of a column, l columns of a word, w the two words a round multiplies (x0, x2) or only mixes (x1, x3),
N = B samples x L tokens x Q quads of channels (Q = ceil(C / 4)). w is in swapped order after an odd number of rounds.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddfast.noise import (
    _ANGLE_UNIT,
    _COSINE_POLYNOMIAL,
    _LN2_HIGH,
    _LN2_LOW,
    _LOG_POLYNOMIAL,
    _SINE_POLYNOMIAL,
    _horner,
)

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_BYTE_SHIFTS = np.array([[0, 16], [8, 24]])  # [b, l]
_BYTE = np.arange(256)
_PAIRS = np.arange(1 << 16)
_SPREAD = sum((_BYTE >> i & 1) << 2 * i for i in range(8))  # bit i of a byte to bit 2 i
_GATHERED = sum((_PAIRS >> 2 * i & 1) << i for i in range(8))  # and back, from any number below 2^16
_SQRT_HALF = float(np.array(0x3F3504F3, np.int32).view(np.float32))
_LEAST_EXPONENT = -33  # of u = 2^-33 .. 1


def _constant(values: object, like: Tensor) -> Tensor:
    """float32, traced as a constant."""
    return torch.tensor(np.asarray(values, np.float32), device=like.device)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] as GatherElements, 20 times as fast as Gather in ONNX Runtime; only the last axis may be dynamic."""
    return table.gather(0, index.long().flatten()).view(*index.shape[:-1], -1)


def _windows() -> NDArray[np.int64]:
    """[column j, b, l, w]: multiplier w shifted by a byte's place = sum_j windows 2^16j.

    The middle digit is taken 2^16 too low and the next 1 too high, which keeps the positive as well as the negative
    digits of a column below 2^16: a column's sum of digits times bytes is exact in float32 in any order.
    """
    windows = np.zeros((4, 2, 2, 2), np.int64)
    for w, multiplier in enumerate(_MULTIPLIERS):
        for b in range(2):
            shifted = multiplier << 8 * b
            digits = (shifted & 0xFFFF, (shifted >> 16 & 0xFFFF) - (1 << 16), (shifted >> 32) + 1)
            for column in range(2):
                windows[column : column + 3, b, column, w] = digits
    return windows


def _bytes_of_columns(columns: Tensor, shifts: Tensor) -> Tensor:
    """The two low bytes of ``columns``, integers below 2^24 in size in units of 2^16: [2, ...]."""
    shifted = torch.floor(columns * shifts.view(3, *[1] * columns.dim()))
    return torch.sub(shifted[:2], shifted[1:], alpha=256)


def _product(words: Tensor, windows: Tensor, shifts: Tensor) -> Tensor:
    """Bytes [b, 4, w, N] of 64-bit products of ``words`` [b, l, w, N]; columns 0 and 1 are the low word."""
    column, *others = (words * windows).sum((1, 2)).split(1)
    carried = [column]
    for column in others:
        carried.append(torch.add(column, torch.floor(carried[-1]), alpha=2**-16))
    return _bytes_of_columns(torch.cat(carried), shifts)


def _bytes_of_int64(x: Tensor) -> Tensor:
    """int64 [N], >= 0, to float32 [high or low word, b, l, N]."""
    places = 2.0 ** (8 * np.arange(8))
    below = x % torch.tensor(places.astype(np.int64)[:, None], device=x.device)
    parts = torch.cat([below[1:], x[None]]) - below  # a byte in its place: exact in float32
    return (parts.float() * _constant(1 / places[:, None], x)).view(2, 2, 2, -1).transpose(1, 2)


def _round_keys(seed: Tensor, spread_table: Tensor, shifts: Tensor) -> Tensor:
    """Spread round keys [10, b, l, w, 1] for a seed [1], w in the order of the round."""
    key = _bytes_of_int64(seed).squeeze(-1)  # [w, b, l]
    columns = key[:, 0] + key[:, 1] * 256.0  # [w, l]
    steps = np.arange(_ROUNDS)[:, None, None] * np.array(_KEY_STEPS)[:, None] >> np.array([0, 16]) & 0xFFFF
    low, high = ((columns + _constant(steps, seed)) * 2.0**-16).split(1, -1)  # [10, w, 1]
    columns = torch.cat([low, torch.add(high, torch.floor(low), alpha=2**-16)], -1)
    spread = _look_up(spread_table, _bytes_of_columns(columns, shifts)).permute(1, 0, 3, 2)  # [10, b, l, w]
    odd = _constant(np.arange(_ROUNDS) % 2, seed).view(-1, 1, 1, 1)
    return (spread * odd + spread.flip(-1) * (1 - odd))[..., None]


def _philox(seed: Tensor, sample: Tensor, tokens: int, quads: int) -> tuple[Tensor, Tensor]:
    """Words (x0, x2) and (x1, x3) of every sample, token and quad as bytes [b, l, w, N]."""
    spread_table, gather_table = _constant(_SPREAD, seed), _constant(_GATHERED, seed)
    low, high = _bytes_of_int64(sample)[:, :, :, None, :, None, None].unbind()
    pair_word, other_word = _constant([1, 0], sample).view(2, 1, 1, 1), _constant([0, 1], sample).view(2, 1, 1, 1)
    position = _constant(np.arange(tokens) >> _BYTE_SHIFTS[..., None] & 255, sample)[:, :, None, None, :, None]
    quad = _constant(np.arange(quads) >> _BYTE_SHIFTS[..., None] & 255, sample)[:, :, None, None, None, :]
    words = (low * pair_word + position * other_word).expand(-1, -1, -1, -1, -1, quads).reshape(2, 2, 2, -1)
    mixed = (high * pair_word + quad * other_word).expand(-1, -1, -1, -1, tokens, -1).reshape(2, 2, 2, -1)
    mixed = _look_up(spread_table, mixed)
    shifts = _constant([2**16, 2**8, 1], seed)
    keys = _round_keys(seed, spread_table, shifts)
    windows = _constant(_windows()[..., None] * 2.0**-16, seed)
    swapped = windows.flip(3)
    for i in range(_ROUNDS):
        product = _product(words, swapped if i % 2 else windows, shifts)
        low, high = _look_up(spread_table, product).split(2, 1)
        words = _look_up(gather_table, high + mixed.flip(2) + keys[i])
        mixed = low
    return words, product[:, :2]


def _radius(high: Tensor, low: Tensor) -> Tensor:
    """sqrt(-2 ln u) of words 2^16 high + low."""
    u = (high * 65536.0 + low + 0.5) * 2.0**-32  # the exporter drops the addition of a number as small as 2^-33
    exponents = np.arange(_LEAST_EXPONENT, 1)
    bounds = _constant(_SQRT_HALF * 2.0 ** exponents[1:], u).view(-1, *[1] * u.dim())
    passed = (u >= bounds).float().sum(0)
    e = passed + _LEAST_EXPONENT
    f = u * _look_up(_constant(2.0**-exponents, u), passed) - 1.0
    f2 = f * f
    tail = f * f2 * _horner(f, _LOG_POLYNOMIAL) + e * _LN2_LOW
    minus_log = f2 * 0.5 - tail - f - e * _LN2_HIGH
    return torch.sqrt((minus_log + minus_log).double()).float()


def _direction(high: Tensor, low: Tensor) -> Tensor:
    """(cosine, sine) of 2 pi (2^16 high + low) / 2^32: [2, ...]."""
    quadrant = torch.floor(high * 2.0**-14 + 0.5)
    a = ((high - quadrant * 2.0**14) * 65536.0 + low) * _ANGLE_UNIT
    a2 = a * a
    sine = a * a2 * _horner(a2, _SINE_POLYNOMIAL) + a
    cosine = a2 * a2 * _horner(a2, _COSINE_POLYNOMIAL) - a2 * 0.5 + 1.0
    odd = (quadrant - 2.0).abs() == 1.0
    size = torch.stack([torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)])
    # The cosine is negative in quadrants 1 and 2, the sine in 2 and 3.
    middle = _constant([1.5, 2.5], high).view(2, *[1] * high.dim())
    return torch.where((quadrant - middle).abs() < 1.0, -size, size)


def graph_noise(seed: Tensor, sample: Tensor, tokens: int, channels: int) -> Tensor:
    """``ddfast.noise.normal_noise(seed, sample, 0, tokens, channels)`` for a graph: float32 [B, L, C].

    ``seed`` int64 [1] and ``sample`` int64 [B], both >= 0, are inputs of the graph. The bits are those of noise.py
    where float32 operations and the root are rounded to nearest and not fused, as in torch and ONNX Runtime on a CPU;
    elsewhere the last bits differ. OpenVINO computes integers as int32 and their remainders in float32: there, seed and
    samples must be below 2^24, or the noise is another one; the caller checks.
    """
    quads = -(-channels // 4)
    radius_words, angle_words = (b[0] + b[1] * 256.0 for b in _philox(seed, sample, tokens, quads))  # [l, w, N]
    (radius_low, radius_high), (angle_low, angle_high) = radius_words.unbind(), angle_words.unbind()
    normals = _radius(radius_high, radius_low) * _direction(angle_high, angle_low)  # [2, w, N]
    return normals.view(2, 2, -1, tokens, quads).permute(2, 3, 4, 1, 0).flatten(2)[..., :channels]
