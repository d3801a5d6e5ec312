"""The noise against published Philox vectors, float64 Box-Muller, statistics of the normal distribution, and itself:
every backend and every way of asking must give the same bits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ddfast import _native
from ddfast.noise import _direction, _radius, normal_noise, philox4x32

Noise = Callable[[int, Tensor, int, int, int], Tensor]

needs_native = pytest.mark.skipif(not _native.available(), reason="ddfast._C is not built")

BIG_SEED = 2**64 - 12345
PAIRS = torch.tensor([7, 0, 2**32 + 7, 2**63 - 1, 1, 7])
FORMAT_SHA256 = "5af27f002ed1450dd87d75182da96a394191ecaf6082db60d804accee68eef61"


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def native(seed: int, pairs: Tensor, start: int, stop: int, channels: int, device: str = "cpu") -> Tensor:
    """The compiled noise in a buffer poisoned with NaN and fenced by guard values on both sides."""
    shape = (len(pairs), stop - start, channels)
    buffer = torch.full((math.prod(shape) + 8,), torch.nan, device=device)
    buffer[:4] = buffer[-4:] = 1e9
    out = buffer[4:-4].view(shape)
    _native.normal_noise(seed, pairs.to(device), start, stop, channels, out)
    assert (buffer[:4] == 1e9).all() and (buffer[-4:] == 1e9).all()
    return out.cpu()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    def parse(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    key0, key1 = parse(key)
    assert philox4x32(torch.tensor(parse(counter)), (key0, key1)).tolist() == parse(words)


def test_the_format_has_not_changed() -> None:
    noise = normal_noise(BIG_SEED, PAIRS, 5, 12, 7)
    assert noise.shape == (6, 7, 7) and noise.dtype == torch.float32
    assert hashlib.sha256(noise.numpy().astype("<f4").tobytes()).hexdigest() == FORMAT_SHA256


def test_counter_and_key_are_laid_out_as_documented() -> None:
    seed, pair, position = 3 << 32 | 5, 11 << 32 | 13, 17
    words = [philox4x32(torch.tensor([13, 11, position, quad]), (5, 3)) for quad in (0, 1)]
    want = []
    for x in words:
        for radius_word, angle_word in ((x[0], x[1]), (x[2], x[3])):
            cosine, sine = _direction(angle_word[None])
            want += [_radius(radius_word[None]) * cosine, _radius(radius_word[None]) * sine]
    got = normal_noise(seed, torch.tensor([pair]), position, position + 1, 8)
    assert torch.equal(bits(got.flatten()), bits(torch.cat(want)))


def exact(words: np.ndarray, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box-Muller in float64 of the float32 u that the definition names; angles are reduced exactly, as integers."""
    u = (words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    eighth = (angles + 2**29) >> 30
    rest = (angles - (eighth << 30)) * (np.pi / 2**31)
    turns = np.stack([np.cos(rest), -np.sin(rest), -np.cos(rest), np.sin(rest)])
    column = np.arange(len(angles))
    return radius * turns[eighth % 4, column], radius * turns[(eighth - 1) % 4, column]


def ulps(got: Tensor, want: np.ndarray) -> np.ndarray:
    return np.abs(got.numpy().astype(np.float64) - want) / np.exp2(np.floor(np.log2(np.abs(want) + 1e-300)) - 23)


def test_normals_are_accurate_in_every_octant_and_both_tails() -> None:
    rng = np.random.default_rng(0)
    edges = np.array([v + d for v in range(0, 2**32 + 1, 2**29) for d in (-3, -2, -1, 0, 1, 2)]) % 2**32
    powers = np.array([2**k + d for k in range(33) for d in (-1, 0, 1)]) % 2**32
    angles = np.concatenate([edges, powers, rng.integers(0, 2**32, 500_000)])
    words = rng.integers(0, 2**32, len(angles))
    words[: len(powers)] = powers
    radius, direction = _radius(torch.from_numpy(words)), _direction(torch.from_numpy(angles))
    for part, want in zip(direction, exact(words, angles), strict=True):
        keep = (want != 0) & (radius.numpy() != 0)
        assert ulps(radius * part, want)[keep].max() < 4.5
        assert ((radius * part).numpy()[~keep] == 0).all()


def test_radius_at_its_ends() -> None:
    ends = _radius(torch.tensor([2**32 - 1, 0]))
    assert bits(ends)[0] == 0  # u = 1 gives +0, not -0
    assert ends[1].item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-7)


@needs_native
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 7, 8, 9, 32])
@pytest.mark.parametrize("level", _native.cpu_levels())
def test_every_instruction_set_gives_the_bits_of_the_twin(level: str, channels: int) -> None:
    for seed in (0, 1, BIG_SEED):
        with _native.cpu_level(level):
            got = native(seed, PAIRS, 3, 40, channels)
        assert torch.equal(bits(got), bits(normal_noise(seed, PAIRS, 3, 40, channels)))


@needs_native
def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'avx-9000' is not one of"), _native.cpu_level("avx-9000"):
        pass
    with _native.cpu_level("baseline"):
        assert _native._C.cpu_level() == "baseline"
    assert _native._C.cpu_level() == _native.cpu_levels()[0]


@needs_native
@pytest.mark.parametrize("channels", [8, 5])
def test_threads_change_nothing(threads: int, channels: int) -> None:
    pairs = torch.arange(61) * 3  # 41,480 quads: several tasks a thread, and a last one that is not full
    assert torch.equal(bits(native(9, pairs, 0, 340, channels)), bits(normal_noise(9, pairs, 0, 340, channels)))


@needs_native
@pytest.mark.parametrize(("pairs", "stop", "channels"), [(0, 5, 8), (3, 2, 8), (3, 5, 0)])
def test_empty_requests_are_safe(pairs: int, stop: int, channels: int) -> None:
    got = native(0, torch.arange(pairs), 2, stop, channels)
    assert got.shape == normal_noise(0, torch.arange(pairs), 2, stop, channels).shape == (pairs, stop - 2, channels)


@needs_native
def test_last_positions_are_those_of_the_twin() -> None:
    start, stop = 2**32 - 5, 2**32
    assert torch.equal(bits(native(1, PAIRS, start, stop, 8)), bits(normal_noise(1, PAIRS, start, stop, 8)))


backends = pytest.mark.parametrize("noise", [normal_noise, pytest.param(native, marks=needs_native)])


@backends
@settings(max_examples=30, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_value_does_not_depend_on_what_it_is_asked_with(noise: Noise, data: st.DataObject) -> None:
    whole = normal_noise(4, torch.arange(20), 0, 30, 9)
    pairs = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=20))
    start = data.draw(st.integers(0, 29))
    stop = data.draw(st.integers(start + 1, 30))
    channels = data.draw(st.integers(1, 9))
    part = noise(4, torch.tensor(pairs), start, stop, channels)
    assert torch.equal(bits(part), bits(whole[pairs, start:stop, :channels]))


def test_a_million_values_are_standard_normal() -> None:
    x = normal_noise(2024, torch.arange(64), 0, 64, 256).double().flatten().numpy()
    n = len(x)
    assert n >= 10**6
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # mean and variance of x^power
        assert abs((x**power).mean() - want) < 4 * math.sqrt(variance / n), power
    assert stats.kstest(x, "norm").pvalue > 0.01
    for bound in (0.01, 1.0, 2.0, 3.0, 4.0, 4.5):
        expected = n * stats.norm.sf(bound)
        for count in ((x > bound).sum(), (x < -bound).sum()):
            assert abs(count - expected) < 4 * math.sqrt(expected), bound


@pytest.mark.parametrize("axis", ["seed", "high seed", "pair", "high pair", "position", "channel", "radius"])
def test_neighbours_are_independent(axis: str) -> None:
    base = torch.arange(64)
    x = normal_noise(5, base, 0, 64, 128)
    shifted = {
        "seed": lambda: (x, normal_noise(6, base, 0, 64, 128)),
        "high seed": lambda: (x, normal_noise(5 + 2**32, base, 0, 64, 128)),
        "pair": lambda: (x[1:], x[:-1]),
        "high pair": lambda: (x, normal_noise(5, base + 2**32, 0, 64, 128)),
        "position": lambda: (x[:, 1:], x[:, :-1]),
        "channel": lambda: (x[..., 1:], x[..., :-1]),
        "radius": lambda: (x[..., 0::2], x[..., 1::2]),  # the two that share a radius and an angle
    }
    a, b = (t.double().flatten() for t in shifted[axis]())
    for first, second in ((a, b), (a**2, b**2), (a.abs(), b), (a, b.abs())):
        correlation = torch.corrcoef(torch.stack((first, second)))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(len(a))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8, 32])
def test_cuda_gives_the_bits_of_the_cpu(channels: int) -> None:
    want = bits(normal_noise(BIG_SEED, PAIRS, 3, 700, channels))
    assert torch.equal(bits(normal_noise(BIG_SEED, PAIRS, 3, 700, channels, device="cuda").cpu()), want)
    assert _native.cuda_built(), "ddfast._C was built without CUDA"
    assert torch.equal(bits(native(BIG_SEED, PAIRS, 3, 700, channels, device="cuda")), want)
    assert torch.equal(bits(native(BIG_SEED, PAIRS[:1], 0, 0, channels, device="cuda")), want[:1, :0])
