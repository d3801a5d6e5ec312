"""The transformer's fused operations: every path gives what the readable twin gives, and arguments are checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from torch import Tensor

from ddfast import _native, layers, ops
from ddfast.errors import UserError
from ddfast.kv_cache import KVCache
from ddfast.models.quantizer import MultiScaleQuantizer

LEVELS = _native.cpu_levels()
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

needs_native = pytest.mark.skipif(not LEVELS, reason="ddfast._C is not built")
pytestmark = needs_native


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, one_thread: None) -> Iterator[str]:  # noqa: F811
    """Each instruction set, with scratch full of NaN."""
    with _native.cpu_level(request.param), _native.poisoned():
        yield request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def both(name: str, make: Any, outputs: tuple[str, ...]) -> None:
    """Run an operation on the native path and as its twin in float64, each on arguments of its own; compare outputs."""
    got, want = make(), make()
    dtype = next(t.dtype for t in got.values() if isinstance(t, Tensor) and t.is_floating_point() and t.dtype in DTYPES)
    dtype = torch.bfloat16 if any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in got.values()) else dtype
    with ops.forced("native"):
        getattr(ops, name)(**got)
    wide = {k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in want.items()}
    getattr(layers, name)(*wide.values())
    for key in outputs:
        size = wide[key][wide[key].isfinite()].abs().max()
        assert bool((got[key].isnan() == wide[key].isnan()).all()), key  # what is not to be written stays as it was
        error = (got[key].double() - wide[key]).nan_to_num().abs().max()
        assert error <= TOLERANCE[dtype] * max(float(size), 1.0), (key, float(error), float(size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 18, 64, 96, 1024])
@pytest.mark.parametrize("rows, n", [(1, 1), (4, 3), (2, 40)])
def test_add_layer_norm(level: str, dtype: torch.dtype, dim: int, rows: int, n: int) -> None:
    mods = normal(6, rows + 1, dim, seed=1)[:, :rows]
    for branch in (None, normal(rows, n, dim, seed=2, dtype=dtype)):

        def make(branch: Tensor | None = branch) -> dict[str, Any]:
            gate = None if branch is None else mods[0]
            x = 3 * normal(rows, n, dim) + 1
            out = unwritten(rows, n, dim, dtype=dtype)
            return {"x": x, "branch": branch, "gate": gate, "scale": mods[1], "shift": mods[2], "eps": 1e-6, "out": out}

        both("add_layer_norm", make, ("x", "out"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 18, 768])
def test_add_rms_norm(level: str, dtype: torch.dtype, dim: int) -> None:
    for branch in (None, normal(5, 2, dim, seed=2, dtype=dtype)):

        def make(branch: Tensor | None = branch) -> dict[str, Any]:
            weight = normal(dim, seed=3)
            out = unwritten(5, 2, dim, dtype=dtype)
            return {"x": normal(5, 2, dim), "branch": branch, "weight": weight, "eps": 1e-5, "out": out}

        both("add_rms_norm", make, ("x", "out"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 18, 32, 64, 100])
def test_append_normed(level: str, dtype: torch.dtype, width: int) -> None:
    rows, heads = 3, 2
    for normed, (start, n) in itertools.product([True, False], [(0, 1), (3, 4), (6, 5)]):

        def make(normed: bool = normed, start: int = start, n: int = n) -> dict[str, Any]:
            whole = unwritten(2, rows + 1, heads, 11, width, dtype=dtype)  # the cache is the first rows of a larger one
            scale = normal(heads, seed=4).exp() if normed else None
            qkv = normal(rows, n, 3, heads, width, dtype=dtype)
            length = torch.tensor([start], dtype=torch.int32)
            return {"qkv": qkv, "scale": scale, "cache": whole[:, :rows], "length": length}

        both("append_normed", make, ("qkv", "cache"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 18, 64, 100])
def test_append_rotated(level: str, dtype: torch.dtype, width: int) -> None:
    for (heads, kv_heads), (start, n) in itertools.product([(2, 2), (4, 2), (3, 1)], [(0, 1), (5, 4)]):

        def make(heads: int = heads, kv_heads: int = kv_heads, start: int = start, n: int = n) -> dict[str, Any]:
            cache = unwritten(2, 3, kv_heads, 9, width, dtype=dtype)
            qkv = normal(3, n, heads + 2 * kv_heads, width, dtype=dtype)
            length = torch.tensor([start], dtype=torch.int32)
            rope = normal(10, width // 2, 2, seed=5)
            return {"qkv": qkv, "heads": heads, "rope": rope, "cache": cache, "length": length}

        both("append_rotated", make, ("qkv", "cache"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 5, 18, 32, 64, 100, 130])
def test_attention(level: str, dtype: torch.dtype, width: int) -> None:
    shapes = [(1, 1), (1, 37), (2, 129), (3, 3), (9, 14), (26, 65), (49, 128)]
    for (n, keys), (heads, kv_heads) in itertools.product(shapes, [(2, 2), (4, 2), (3, 1)]):
        q = normal(2, n, heads + 1, width, seed=1, dtype=dtype)[:, :, 1:]
        cache = normal(2, 3, kv_heads, keys + 3, width, seed=2, dtype=dtype)
        cache[:, :, :, keys:] = torch.nan
        k, v = cache[0, :2, :, :keys], cache[1, :2, :, :keys]
        given = {"q": q, "k": k, "v": v, "scale": 2 * width**-0.5}
        empty = unwritten(2, n, heads, width, dtype=dtype)
        both("attention", lambda given=given, empty=empty: given | {"out": empty.clone()}, ("out",))


def test_attention_survives_scores_of_any_size_and_shows_those_that_overflow(level: str) -> None:
    """Scores far apart leave one key; NaN and infinity do not vanish in the softmax."""
    for n in (1, 7):
        q, k, v = normal(1, n, 1, 16), normal(1, 1, 70, 16, seed=1), normal(1, 1, 70, 16, seed=2)
        out = unwritten(1, n, 1, 16)
        ops.attention(q, 1e4 * k, v, 1.0, out)
        best = (q[0, :, 0] @ k[0, 0].T).argmax(1)
        torch.testing.assert_close(out[0, :, 0], v[0, 0, best])
        for bad in (torch.nan, torch.inf):
            spoilt = k.clone()
            spoilt[0, 0, 66, 3] = bad
            ops.attention(q, spoilt, v, 1.0, out)
            assert bool(out.isnan().any(-1).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 4, 15, 39])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_decode_attention(level: str, dtype: torch.dtype, length: int, heads: int, kv_heads: int) -> None:
    def make() -> dict[str, Any]:
        cache = normal(2, 3, kv_heads, 40, 64, seed=2, dtype=dtype)
        cache[:, :, :, length + 1 :] = torch.nan
        at = torch.tensor([length], dtype=torch.int32)
        q = normal(3, heads + 1, 64, seed=1, dtype=dtype)[:, 1:]
        return {"q": q, "cache": cache, "length": at, "scale": 0.125, "out": unwritten(3, heads, 64, dtype=dtype)}

    both("decode_attention", make, ("out",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 16, 100, 2048])
def test_swiglu(level: str, dtype: torch.dtype, hidden: int) -> None:
    def make() -> dict[str, Any]:
        return {"gate_up": 20 * normal(3, 2, 2 * hidden, dtype=dtype), "out": unwritten(3, 2, hidden, dtype=dtype)}

    both("swiglu", make, ("out",))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 18), (2, 5, 64), (40, 1025), (0, 7)])
def test_quantize_rows(level: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Each code is the nearest to x / scale; nothing is written behind the last row."""
    x = normal(*shape, dtype=dtype) * torch.logspace(-4, 3, shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    codes = torch.zeros(shape[0] + 1, *shape[1:], dtype=torch.uint8)
    scale, want = unwritten(*shape[:-1], 1), unwritten(*shape[:-1], 1)
    ops.quantize_rows(x, codes[:-1], scale)
    layers.quantize_rows(x, torch.empty_like(codes[:-1]), want)
    assert torch.equal(scale, want)
    ratio = x.double() / scale
    assert ((codes[:-1].double() - 128 - ratio).abs() <= 0.5 + 1e-4).all() and not codes[-1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_halves_go_to_the_even_code(level: str, dtype: torch.dtype) -> None:
    x = torch.arange(-254, 255).div(2).to(dtype)  # 127 sets a scale of 1
    codes, scale = torch.zeros(509, dtype=torch.uint8), unwritten(1)
    ops.quantize_rows(x, codes, scale)
    assert scale == 1 and torch.equal(codes.float(), x.float().round() + 128)
    assert [int(codes[254 + i]) for i in (-3, -1, 0, 1, 3)] == [126, 128, 128, 128, 130]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_scale(level: str, dtype: torch.dtype) -> None:
    """Zeros, numbers too small or too large, and those that are none; each row by itself."""
    x = normal(6, 37, dtype=dtype)
    x[0] = 0
    x[1] *= 1e-39
    x[2] *= 3e37
    x[3, 36] = torch.nan
    x[4, 2] = -torch.inf
    codes, scale = torch.zeros(6, 37, dtype=torch.uint8), unwritten(6, 1)
    ops.quantize_rows(x, codes, scale)
    assert bool((codes[0] == 128).all()) and bool((codes[1] == 128).all())
    assert scale[:2].tolist() == [[2.0**-126]] * 2 and scale[3].isnan() and scale[4] == torch.inf
    for row in (2, 5):
        alone = torch.zeros(37, dtype=torch.uint8)
        ops.quantize_rows(x[row], alone, torch.empty(1))
        assert torch.equal(codes[row], alone) and int((alone.int() - 128).abs().max()) == 127


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("m, n", [(1, 1), (3, 18), (0, 4), (70, 1025)])
@pytest.mark.parametrize("gelu", [True, False])
def test_scale_rows(level: str, dtype: torch.dtype, m: int, n: int, gelu: bool) -> None:
    product, scale, bias = 50 * normal(m, n), normal(m, 1, seed=1).abs() / 10, normal(n, seed=2)
    out, want = unwritten(m, n, dtype=dtype), unwritten(m, n).double()
    ops.scale_rows(product, scale, bias, gelu, out)
    layers.scale_rows(product.double(), scale.double(), bias.double(), gelu, want)
    torch.testing.assert_close(out.double(), want, rtol=TOLERANCE.get(dtype, 1e-3), atol=2e-6)
    if dtype == torch.float32:
        ops.scale_rows(product, scale, bias, gelu, product)
        assert torch.equal(product, out)


@pytest.mark.parametrize("gelu", [True, False])
def test_scale_rows_at_the_ends_of_the_range(level: str, gelu: bool) -> None:
    product = torch.tensor([[-1e30, -300.0, -20.0, -0.0, 300.0, 1e30, torch.inf, torch.nan]]).repeat(1, 3)
    out = unwritten(1, 24)
    ops.scale_rows(product, torch.ones(1, 1), torch.zeros(24), gelu, out)
    want = torch.nn.functional.gelu(product, approximate="tanh") if gelu else product
    torch.testing.assert_close(out, want, atol=1e-7, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("channels", [2, 8, 32, 70])
@pytest.mark.parametrize("patch_nums", [(1, 2, 3, 4), (1, 3, 7), (2, 5, 16), (1,)])
def test_quantizer_step_is_the_quantizers(level: str, channels: int, patch_nums: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(11, channels, patch_nums).double().requires_grad_(False)
    side, batch = patch_nums[-1], 3
    want = quantizer.empty_f_hat(batch)
    f_hat = torch.zeros(batch, side * side, channels)
    for scale, pn in enumerate(patch_nums):
        tokens = torch.randint(11, (batch, pn * pn))
        want, following = quantizer.embed_step(scale, tokens, want)
        (up, down), (taps, bias) = quantizer.matrices(scale), quantizer.taps(scale)
        out = None if down is None else unwritten(batch, len(down), channels)
        fixed = [None if t is None else t.float() for t in (quantizer.codebook, up, taps, bias, down)]
        codebook, up, taps, bias, down = fixed
        ratio = quantizer.quant_resi.ratio
        ops.quantizer_step(tokens, codebook, up, taps, bias, ratio, f_hat, down, out)
        torch.testing.assert_close(f_hat.double(), want.flatten(2).transpose(1, 2), atol=2e-5, rtol=2e-5)
        if following is not None:
            torch.testing.assert_close(out.double(), following.flatten(2).transpose(1, 2), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("n, keys", [(1, 300), (40, 130)])
def test_threads_change_nothing(n: int, keys: int) -> None:
    """Few rows and many: how heads are parted among threads is not seen."""
    before = torch.get_num_threads()
    found = []
    for rows, threads in ((1, 1), (1, 3), (5, 1), (5, 4)):
        torch.set_num_threads(threads)
        try:
            q, k, v = normal(5, n, 6, 64), normal(5, 3, keys, 64, seed=1), normal(5, 3, keys, 64, seed=2)
            out = unwritten(rows, n, 6, 64)
            ops.attention(q[:rows], k[:rows], v[:rows], 0.5, out)
            h = unwritten(rows, n, 384)
            mods = normal(2, rows, 384)
            ops.add_layer_norm(out.view(rows, n, 384).clone(), None, None, mods[0] * 0, mods[1] * 0, 1e-6, h)
            found.append((out[0], h[0]))
        finally:
            torch.set_num_threads(before)
    for out, h in found:
        assert torch.equal(out, found[0][0]) and torch.equal(h, found[0][1])


# Arguments


def cached(**changes: Any) -> dict[str, Any]:
    made = {
        "qkv": normal(4, 2, 3, 2, 8),
        "scale": torch.ones(2),
        "cache": torch.zeros(2, 4, 2, 10, 8),
        "length": torch.tensor([3], dtype=torch.int32),
    }
    return made | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"length": torch.tensor([9], dtype=torch.int32)}, "cache holds 10 positions: 2 more do not fit at length 9"),
        ({"length": torch.tensor([-1], dtype=torch.int32)}, "do not fit at length -1"),
        ({"length": torch.tensor([3])}, "length must be int32 .* not torch.int64"),
        ({"cache": torch.zeros(2, 6, 2, 10, 8)}, "cache is of a batch of 6 rows, but 4 are given"),
        (
            {"cache": torch.zeros(2, 4, 2, 10, 8, dtype=torch.bfloat16)},
            "cache must be torch.float32, not torch.bfloat16",
        ),
        ({"cache": torch.zeros(2, 4, 2, 8, 10).transpose(3, 4)}, "cache must have stride 1"),
        ({"cache": torch.zeros(2, 4, 3, 10, 8)}, r"cache must be \[2, 4, 2, 10, 8\]"),
        ({"qkv": normal(4, 3, 2, 2, 8).transpose(1, 2)}, "qkv must be contiguous"),
        ({"qkv": normal(4, 2, 3, 2, 8).to(torch.int64)}, "qkv must be one of .* not torch.int64"),
        ({"qkv": normal(4, 2, 3, 2, 8, dtype=torch.bfloat16)}, "cache must be torch.bfloat16, not torch.float32"),
        ({"scale": torch.ones(3)}, r"scale must be \[2\], not \[3\]"),
    ],
)
def test_append_normed_names_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    given = cached(**changes)
    before = given["cache"].clone()
    with pytest.raises(UserError, match=message):
        ops.append_normed(**given)
    assert torch.equal(given["cache"], before)


def test_the_others_name_what_does_not_fit() -> None:
    length = torch.zeros(1, dtype=torch.int32)
    x, out, mods = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), torch.zeros(2, 8)
    cache = torch.zeros(2, 2, 2, 5, 8)
    calls: list[tuple[str, tuple[Any, ...], str]] = [
        ("add_layer_norm", (x.bfloat16(), None, None, mods, mods, 1e-6, out), "x must be torch.float32"),
        ("add_layer_norm", (x, out, None, mods, mods, 1e-6, out), "gate goes with branch"),
        ("add_layer_norm", (x, None, None, mods[:1], mods, 1e-6, out), r"scale must be \[2, 8\]"),
        ("add_layer_norm", (x, None, None, mods, mods, 1e-6, out.transpose(0, 1)), "x must be|out must be"),
        ("add_rms_norm", (x, None, mods, 1e-6, out), r"weight must be \[8\]"),
        ("add_rms_norm", (x, out.bfloat16(), mods[0], 1e-6, out), "branch must be torch.float32"),
        ("append_rotated", (torch.zeros(2, 1, 6, 8), 2, torch.zeros(4, 4, 2), cache, length), "rope must be .* T >= 5"),
        ("append_rotated", (torch.zeros(2, 1, 6, 7), 2, torch.zeros(5, 3, 2), cache[..., :7], length), "turns pairs"),
        ("append_rotated", (torch.zeros(2, 1, 7, 8), 2, torch.zeros(5, 4, 2), cache, length), "qkv must be"),
        (
            "attention",
            (torch.zeros(2, 1, 3, 8), cache[0], cache[1], 1.0, torch.zeros(2, 1, 3, 8)),
            "k must be .* divisor",
        ),
        ("attention", (torch.zeros(2, 1, 2, 8), cache[0], cache[1, :1], 1.0, torch.zeros(2, 1, 2, 8)), "v must be"),
        (
            "decode_attention",
            (torch.zeros(3, 2, 8), cache, length, 1.0, torch.zeros(3, 2, 8)),
            "cache is of a batch of 2",
        ),
        (
            "decode_attention",
            (torch.zeros(2, 2, 8), cache, length + 5, 1.0, torch.zeros(2, 2, 8)),
            "do not fit at length 5",
        ),
        ("quantize_rows", (x, out, torch.zeros(2, 3, 1)), "codes must be one of torch.uint8, .*not torch.float32"),
        ("quantize_rows", (x.int(), out.byte(), torch.zeros(2, 3, 1)), "x must be one of .*not torch.int32"),
        ("quantize_rows", (x[..., :0], out.byte(), torch.zeros(2, 3, 1)), r"x must be .* K > 0, not \[2, 3, 0\]"),
        ("quantize_rows", (x[..., ::2], out.byte()[..., ::2], torch.zeros(2, 3, 1)), "codes must have stride 1"),
        ("quantize_rows", (x.mT.contiguous().mT, out.byte(), torch.zeros(2, 3, 1)), "x must be contiguous"),
        ("quantize_rows", (x, out.byte(), torch.zeros(2, 3)), r"scale must be \[2, 3, 1\], not \[2, 3\]"),
        ("quantize_rows", (x, out.byte(), torch.zeros(2, 3, 1).half()), "scale must be torch.float32"),
        ("scale_rows", (x, mods[:, :1], mods[0], True, out), r"out must be \[M, N\]"),
        ("scale_rows", (mods.half(), mods[:, :1], mods[0], True, mods.half()), "product must be torch.float32"),
        ("scale_rows", (mods, torch.zeros(2, 1), mods[0, :7], True, mods), r"bias must be \[8\], not \[7\]"),
        ("scale_rows", (mods, torch.zeros(2), mods[0], True, mods), r"scale must be \[2, 1\]"),
        ("scale_rows", (mods, mods[:, :1], mods[0], True, mods), "scale must be contiguous"),
        ("swiglu", (torch.zeros(2, 7), torch.zeros(2, 3)), "gate_up must have an even"),
        ("swiglu", (torch.zeros(2, 6), torch.zeros(2, 2)), r"out must be \[2, 3\]"),
    ]
    for name, arguments, message in calls:
        with pytest.raises(UserError, match=message):
            getattr(ops, name)(*arguments)


def test_quantizer_step_names_what_does_not_fit() -> None:
    good: dict[str, Any] = {
        "tokens": torch.zeros(2, 1, dtype=torch.int64),
        "codebook": torch.zeros(5, 3),
        "up": torch.zeros(4, 1),
        "taps": torch.zeros(9, 3, 3),
        "bias": torch.zeros(3),
        "ratio": 0.5,
        "f_hat": torch.zeros(2, 4, 3),
        "down": torch.zeros(4, 4),
        "out": torch.zeros(2, 4, 3),
    }
    ops.quantizer_step(**good)
    for changes, message in (
        ({"up": None}, "up may be None only where tokens fill the map: 1 tokens, 4 positions"),
        ({"tokens": torch.zeros(2, 1)}, "tokens must be int64"),
        ({"taps": torch.zeros(4, 3, 3)}, "taps must be .* k odd"),
        ({"f_hat": torch.zeros(2, 5, 3)}, "f_hat must be .* square"),
        ({"out": None}, "out goes with down"),
        ({"down": torch.zeros(4, 4).bfloat16()}, "down must be torch.float32"),
    ):
        with pytest.raises(UserError, match=message):
            ops.quantizer_step(**(good | changes))


def test_a_full_kv_cache_says_so() -> None:
    cache = KVCache(2, 3, 1, 5, 4, torch.float32, torch.device("cpu"))
    cache.advance(5)
    assert cache.start == int(cache.length) == 5
    with pytest.raises(UserError, match="holds 5 positions: 1 more do not fit after 5"):
        cache.advance(1)
    cache.clear()
    assert cache.start == int(cache.length) == 0 and [t.shape[1] for t in cache.layers(2)] == [2, 2]


@pytest.mark.parametrize("positions", [4, 4096])
def test_a_cpu_cache_has_its_heads_side_by_side(positions: int) -> None:
    """In ordinary memory, and, where it is large, in a mapping of its own that is given back with the tensor."""
    cache = KVCache(2, 3, 4, positions, 32, torch.bfloat16, torch.device("cpu"))
    data = cache.data_N2RHLd
    assert data.shape == (2, 2, 3, 4, positions, 32) and data.stride()[3:] == (32, 4 * 32, 1)
    data.fill_(1.5)
    layers = cache.layers(3)
    del cache, data
    assert bool((layers[1] == 1.5).all())
