"""The CUDA kernels of the transformer's fused operations: their bodies on the host, the kernels on a GPU, and what the
compiler makes of them. As a program, runs each kernel once on a GPU, for compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddfast import _native, _native_cuda, layers, ops
from ddfast.errors import UserError

Make = Callable[[], dict[str, Any]]

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 2e-5,
    torch.bfloat16: 4e-3,
    torch.float16: 6e-4,
}  # of the largest value: half an ulp or more

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_native = pytest.mark.skipif(not _native.available(), reason="ddfast._C is not built")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_native), pytest.param("cuda", marks=[gpu, needs_gpu])]
)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def at_length(length: int) -> Tensor:
    return torch.tensor([length], dtype=torch.int32)


def moved(arguments: dict[str, Any], device: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Tensors on a device with their strides kept, the floating ones in another type if one is given."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
        whole = whole.to(device, dtype if value.is_floating_point() else None, copy=True)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: move(value) for name, value in arguments.items()}


def check(name: str, device: str, make: Make, outputs: tuple[str, ...], **more: Any) -> None:
    """Run a kernel and, in float64, its twin, and compare outputs. What is not to be written must stay NaN."""
    made = make()
    got, want = moved(made, device), moved(made, device, torch.float64)
    getattr(_native_cuda, name)(**got, **more)
    getattr(layers, name)(*want.values())
    for key in outputs:
        assert torch.equal(got[key].isnan(), want[key].isnan()), key
        error = (got[key].double() - want[key]).nan_to_num().abs().max()
        largest = want[key].nan_to_num().abs().max()
        assert error <= TOLERANCE[got[key].dtype] * max(1.0, float(largest)), (key, float(error), float(largest))


def check_all(name: str, device: str, makes: dict[str, Make], outputs: tuple[str, ...], **more: Any) -> None:
    """:func:`check` of each; what fails is named, and stops no other."""
    problems = []
    for case, make in makes.items():
        try:
            check(name, device, make, outputs, **more)
        except AssertionError as error:
            problems.append(f"{case}: {error}".partition("\n")[0])
    assert not problems, f"{len(problems)} of {len(makes)}: " + "; ".join(problems)


def each(make: Callable[..., dict[str, Any]], **lists: list[Any]) -> dict[str, Make]:
    """The arguments that ``make`` gives for every combination of its own, by name."""
    found: dict[str, Make] = {}
    for values in product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        found[", ".join(f"{key} {value}" for key, value in chosen.items())] = partial(make, **chosen)
    return found


# Norms


def norm_inputs(rows: int, n: int, dim: int, dtype: torch.dtype, branch: bool) -> dict[str, Any]:
    """Modulations are parts of a larger tensor, as in the model."""
    mods = normal(rows, 6, dim, seed=1)
    return {
        "x": 3 * normal(rows, n, dim) + 1,
        "branch": normal(rows, n, dim, seed=2, dtype=dtype) if branch else None,
        "gate": mods[:, 0] if branch else None,
        "scale": mods[:, 2],
        "shift": mods[:, 4],
        "eps": 1e-6,
        "out": unwritten(rows, n, dim, dtype=dtype),
    }


def rms_inputs(rows: int, n: int, dim: int, dtype: torch.dtype, branch: bool) -> dict[str, Any]:
    made = norm_inputs(rows, n, dim, dtype, branch)
    return {key: made[key] for key in ("x", "branch")} | {
        "weight": normal(dim, seed=3),
        "eps": 1e-5,
        "out": made["out"],
    }


@devices
@dtypes
@pytest.mark.parametrize("inputs", [norm_inputs, rms_inputs])
def test_norms(device: str, dtype: torch.dtype, inputs: Callable[..., dict[str, Any]]) -> None:
    """Rows that a thread, a warp, and 4 and 16 warps hold in registers, and longer ones; of one and four numbers a
    pack."""
    name = "add_layer_norm" if inputs is norm_inputs else "add_rms_norm"
    dims = [1, 18, 31, 64, 100, 1024, 1025, 1920, 4100, 20_000]
    for rows, n in ((1, 1), (3, 5)):
        makes = each(partial(inputs, rows, n, dtype=dtype), dim=dims, branch=[True, False])
        check_all(name, device, makes, ("x", "out"))


@devices
def test_variance_is_not_lost_beside_a_large_mean(device: str) -> None:
    """The difference of the squares' mean and the mean's square would be off by a tenth here."""
    given = moved(norm_inputs(2, 3, 512, torch.float32, False) | {"x": 2000 + normal(2, 3, 512)}, device)
    _native_cuda.add_layer_norm(**given)
    x, scale, shift = given["x"].double(), given["scale"][:, None], given["shift"][:, None]
    want = torch.nn.functional.layer_norm(x, (512,), eps=1e-6) * (1 + scale) + shift
    assert (given["out"] - want).abs().max() < 0.01


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_round_as_in_torch(device: str, dtype: torch.dtype) -> None:
    """With scale -1 a norm gives its shift: every value of the type, the middles between them and what is near."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite()].float().sort().values
    middles = (values[1:] + values[:-1]) / 2
    extreme = torch.tensor([torch.inf, torch.nan, 3e38, 65519.99, 65520.0, 1e-40, 2.0**-25, 2.0**-24])
    near = [torch.nextafter(middles, torch.tensor(to)) for to in (torch.inf, -torch.inf)]
    shift = torch.cat([values, middles, *near, extreme, -extreme])[None]
    out = unwritten(1, 1, shift.shape[1], dtype=dtype)
    given = {"x": normal(*out.shape), "branch": None, "gate": None, "scale": -torch.ones_like(shift), "shift": shift}
    given = moved(given | {"eps": 1e-5, "out": out}, device)
    _native_cuda.add_layer_norm(**given)
    want, got = (shift[0] + 0.0).to(dtype), given["out"][0, 0].cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# Caches


def normed_inputs(
    rows: int, n: int, heads: int, width: int, start: int, positions: int, dtype: torch.dtype, normed: bool = True
) -> dict[str, Any]:
    """The cache is the first rows of a larger one."""
    return {
        "qkv": normal(rows, n, 3, heads, width, dtype=dtype),
        "scale": normal(heads, seed=4) if normed else None,
        "cache": unwritten(2, rows + 1, heads, positions, width, dtype=dtype)[:, :rows],
        "length": at_length(start),
    }


def rotated_inputs(
    rows: int, n: int, heads: int, kv_heads: int, width: int, start: int, positions: int, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "qkv": normal(rows, n, heads + 2 * kv_heads, width, dtype=dtype),
        "heads": heads,
        "rope": normal(positions + 1, width // 2, 2, seed=5),
        "cache": unwritten(2, rows + 1, kv_heads, positions, width, dtype=dtype)[:, :rows],
        "length": at_length(start),
    }


@devices
@dtypes
def test_append_normed(device: str, dtype: torch.dtype) -> None:
    def inputs(place: tuple[int, int], **given: Any) -> dict[str, Any]:
        return normed_inputs(rows=3, n=place[1], heads=2, start=place[0], positions=11, dtype=dtype, **given)

    widths, places = [2, 5, 8, 18, 64, 100, 130, 256], [(0, 1), (3, 4), (6, 5)]
    makes = each(inputs, width=widths, normed=[True, False], place=places)
    check_all("append_normed", device, makes, ("qkv", "cache"))


@devices
@dtypes
def test_append_rotated(device: str, dtype: torch.dtype) -> None:
    def inputs(width: int, heads: tuple[int, int], place: tuple[int, int]) -> dict[str, Any]:
        return rotated_inputs(3, place[1], *heads, width, place[0], 11, dtype)

    widths, places = [2, 8, 18, 64, 100, 130, 256], [(0, 1), (3, 4), (6, 5)]
    makes = each(inputs, width=widths, heads=[(2, 2), (4, 2), (3, 1)], place=places)
    check_all("append_rotated", device, makes, ("qkv", "cache"))


@devices
def test_tables_may_begin_anywhere_but_pairs_at_even_places(device: str) -> None:
    """A pack that does not lie at a multiple of its size would end all work on a GPU."""
    given = moved(rotated_inputs(2, 3, 2, 2, 64, 0, 11, torch.bfloat16), device)
    rope = torch.zeros(given["rope"].numel() + 1, device=device)[1:].view_as(given["rope"]).copy_(given["rope"])
    qkv = given["qkv"].clone()
    _native_cuda.append_rotated(**given | {"rope": rope})
    want = moved(rotated_inputs(2, 3, 2, 2, 64, 0, 11, torch.bfloat16), device)
    _native_cuda.append_rotated(**want)
    assert torch.equal(given["qkv"], want["qkv"]) and not torch.equal(given["qkv"], qkv)
    odd = torch.zeros(qkv.numel() + 1, dtype=qkv.dtype, device=device)[1:].view_as(qkv)
    with pytest.raises(UserError, match="qkv begins"):
        _native_cuda.append_rotated(**given | {"qkv": odd})
    decode = moved(decode_inputs(2, 2, 2, 8, 16, 3, torch.bfloat16), device)
    odd = torch.zeros(2, 2, 9, dtype=torch.bfloat16, device=device)[:, :, :8]
    with pytest.raises(UserError, match="q begins, or has strides, at odd"):
        _native_cuda.decode_attention(**decode | {"q": odd})


@devices
def test_a_vector_of_zeros_has_no_direction(device: str) -> None:
    given = moved(normed_inputs(1, 2, 2, 16, 0, 4, torch.float32), device)
    given["qkv"][:, 1] = 0
    given["scale"][1] = 0
    _native_cuda.append_normed(**given)
    assert not given["qkv"][:, 1].any() and not given["cache"][:, :, :, 1].any()
    assert not given["qkv"][0, 0, 0, 1].any() and bool(given["qkv"][0, 0, 0, 0].any())


@devices
@pytest.mark.parametrize("name", ["append_normed", "append_rotated"])
def test_nothing_is_written_past_the_end_of_the_cache(device: str, name: str) -> None:
    """Positions that do not fit are left out, those that do are there; the next row and head stay as they were."""

    def run(start: int, n: int) -> Tensor:
        if name == "append_normed":
            made = normed_inputs(2, n, 2, 8, start, 11, torch.float32)
        else:
            made = rotated_inputs(2, n, 2, 2, 8, start, 11, torch.float32)
        made["qkv"] = normal(2, 5, 6, 8)[:, :n].reshape(made["qkv"].shape).contiguous()
        given = moved(made, device)
        getattr(_native_cuda, name)(**given)
        return given["cache"].cpu()

    for start in (8, 10, 11, 12, 2**31 - 1, -1):
        there, fit = run(start, 5), max(0, min(5, 11 - start))
        if start < 0:
            assert bool(there[:, :, :, 5 + start :].isnan().all())
        else:
            want = run(start, fit) if fit else torch.full_like(there, torch.nan)
            torch.testing.assert_close(there, want, equal_nan=True)
            assert int((~there.isnan()).sum()) == 2 * 2 * 2 * fit * 8


# Attention


def decode_inputs(
    rows: int, heads: int, kv_heads: int, width: int, positions: int, length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """q lies in qkv, the cache is the first rows of a larger one, and what is not filled is NaN."""
    cache = normal(2, rows + 1, kv_heads, positions, width, seed=2, dtype=dtype)
    cache[:, :, :, length + 1 :] = torch.nan
    return {
        "q": normal(rows, heads + 2 * kv_heads, width, seed=1, dtype=dtype)[:, :heads],
        "cache": cache[:, :rows],
        "length": at_length(length),
        "scale": 2 * width**-0.5,
        "out": unwritten(rows, heads, width, dtype=dtype),
    }


@devices
@dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1), (10, 2)])
def test_decode_attention(device: str, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """Alone, and split into parts of which some have no keys."""
    inputs = partial(decode_inputs, rows=2, heads=heads, kv_heads=kv_heads, positions=77, dtype=dtype)
    makes = each(inputs, width=[2, 8, 18, 64, 100, 128, 130, 200, 256], length=[0, 1, 40, 76])
    for splits in (1, 2, 3, 7):
        _native_cuda._parts.cache_clear()
        check_all("decode_attention", device, makes, ("out",), splits=splits)


@devices
def test_parts_that_are_not_written_are_not_read(device: str) -> None:
    """The scratch between the two launches may hold anything."""
    given = moved(decode_inputs(2, 4, 2, 16, 64, 20, torch.float32), device)
    _native_cuda.decode_attention(**given, splits=1)
    want = given["out"].clone()
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    parts = _native_cuda._parts(torch.device(given["q"].device), stream, 1024)
    parts.fill_(torch.nan)
    _native_cuda.decode_attention(**given, splits=4)
    torch.testing.assert_close(given["out"], want)
    assert 0 < int((~parts.isnan()).sum()) == 2 * 4 * 2 * 18  # 21 keys in two parts of at most 16


@devices
def test_scores_far_apart_leave_one_key_and_nan_shows(device: str) -> None:
    given = moved(decode_inputs(1, 2, 1, 16, 80, 79, torch.float32) | {"scale": 1e4}, device)
    _native_cuda.decode_attention(**given, splits=3)
    k, v = given["cache"][:, 0, 0]
    torch.testing.assert_close(given["out"][0], v[(given["q"][0] @ k.T).argmax(1)])
    given["cache"][0, 0, 0, 70, 3] = torch.nan
    _native_cuda.decode_attention(**given, splits=3)
    assert bool(given["out"].isnan().all())


@needs_native
@pytest.mark.parametrize("width", [7, 258])
def test_widths_the_kernels_cannot_do_are_named(width: int) -> None:
    with pytest.raises(UserError, match=f"q has heads of width {width}"):
        _native_cuda.decode_attention(**decode_inputs(1, 1, 1, width, 4, 2, torch.float32))


# The others


@devices
@dtypes
def test_swiglu(device: str, dtype: torch.dtype) -> None:
    def inputs(hidden: int, rows: tuple[int, ...]) -> dict[str, Any]:
        gate_up = (30 * normal(*rows, 2 * hidden)).to(dtype)
        return {"gate_up": gate_up, "out": unwritten(*rows, hidden, dtype=dtype)}

    check_all("swiglu", device, each(inputs, hidden=[1, 6, 100, 128, 5001], rows=[(3,), (2, 5)]), ("out",))


def code_inputs(rows: tuple[int, ...], width: int, dtype: torch.dtype, codes: torch.dtype) -> dict[str, Any]:
    x = normal(*rows, width) * normal(*rows, 1, seed=1).exp()
    filled = torch.zeros(*rows, width, dtype=torch.uint8) if codes == torch.uint8 else unwritten(*rows, width)
    return {"x": x.to(dtype), "codes": filled.to(codes), "scale": unwritten(*rows, 1)}


def value(codes: Tensor) -> Tensor:
    return codes.double() - 128 if codes.dtype == torch.uint8 else codes.double()


code_types = pytest.mark.parametrize("codes", [torch.uint8, torch.float8_e4m3fn])


# Rows that 1, 4 and 16 warps hold in registers, and longer ones; of one number a pack and of as many as fit.
@devices
@dtypes
@code_types
def test_quantize_rows(device: str, dtype: torch.dtype, codes: torch.dtype) -> None:
    """Each code is the nearest to x / scale, and the scale is the twin's."""
    widths = (1, 18, 64, 1000, 1024, 1025, 4100, 5120, 20_000, 40_000)
    for rows, width in product([(1,), (2, 3)], widths):
        got = moved(code_inputs(rows, width, dtype, codes), device)
        want = moved(code_inputs(rows, width, dtype, codes), device)
        _native_cuda.quantize_rows(**got)
        layers.quantize_rows(**want)
        assert torch.equal(got["scale"], want["scale"])
        ratio = got["x"].double() / got["scale"]
        gap = 1.0 if codes == torch.uint8 else ratio.abs().clamp_min(2.0**-6).log2().floor().exp2() / 8
        assert ((value(got["codes"]) - ratio).abs() <= (0.5 + 1e-4) * gap).all()
        assert (got["codes"].float() != want["codes"].float()).double().mean() < 0.01  # halves, which may go either way


@devices
@code_types
def test_codes_round_as_in_torch(device: str, codes: torch.dtype) -> None:
    """With a scale of 1: every code, the middles between them and what is near; small and not a number."""
    every = torch.arange(256, dtype=torch.uint8).view(codes)
    values = value(every).float()
    values = values[values.isfinite() & (values != -128)].unique()
    middles = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(to)) for to in (torch.inf, -torch.inf)]
    x = torch.cat([values, middles, *near, torch.tensor([1e-40, -1e-40, 2.0**-11, -0.0])])[None]
    for some in (x, x[:, : x.shape[1] // 8 * 8]):
        given = {"x": some.clone(), "codes": torch.zeros(some.shape).to(codes), "scale": unwritten(1, 1)}
        got, want = moved(given, device), moved(given, device)
        _native_cuda.quantize_rows(**got)
        layers.quantize_rows(**want)
        assert float(got["scale"]) == 1 and torch.equal(got["codes"].view(torch.uint8), want["codes"].view(torch.uint8))


@devices
@dtypes
@code_types
def test_rows_without_a_scale(device: str, dtype: torch.dtype, codes: torch.dtype) -> None:
    """Zeros, numbers that are none, and the largest there are; each row by itself."""
    for width in (37, 64, 5120):
        made = code_inputs((5,), width, dtype, codes)
        made["x"][0] = 0
        made["x"][1, -1] = torch.nan
        made["x"][2, 2] = -torch.inf
        made["x"][3] *= torch.finfo(dtype).max / made["x"][3].abs().max().float() / 2
        given = moved(made, device)
        _native_cuda.quantize_rows(**given)
        scale, got = given["scale"].flatten().cpu(), value(given["codes"]).cpu()
        assert scale[0] == 2.0**-126 and not got[0].any() and scale[1].isnan() and scale[2] == torch.inf
        assert bool((got[3:].abs().amax(1) == layers.CODE_LIMITS[codes]).all())
        if codes != torch.uint8:
            assert got[1:3].isnan().any(1).all()


def quantizer_inputs(
    batch: int, side: int, n: int, channels: int, outputs: int | None, kernel: int = 3
) -> dict[str, Any]:
    size = side * side
    return {
        "tokens": torch.randint(0, 50, (batch, n), generator=torch.Generator().manual_seed(6)),
        "codebook": normal(50, channels, seed=7),
        "up": normal(size, n, seed=8) if n != size else None,
        "taps": normal(kernel * kernel, channels, channels, seed=9) / channels,
        "bias": normal(channels, seed=10),
        "ratio": 0.3,
        "f_hat": normal(batch, size, channels, seed=11),
        "down": None if outputs is None else normal(outputs, size, seed=12) / size,
        "out": None if outputs is None else unwritten(batch, outputs, channels),
    }


@devices
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_quantizer_step(device: str, kernel: int) -> None:
    def inputs(batch: int, channels: int, scale: tuple[int, int, int | None]) -> dict[str, Any]:
        side, n, outputs = scale
        return quantizer_inputs(batch, side, n, channels, outputs, kernel)

    channels, scales = [1, 6, 8, 32], [(1, 1, 1), (4, 1, 4), (4, 9, 16), (7, 16, 36)]
    check_all("quantizer_step", device, each(inputs, batch=[1, 3], channels=channels, scale=scales), ("f_hat", "out"))
    last = each(inputs, batch=[1, 3], channels=channels, scale=[(5, 25, None), (8, 64, None)])
    check_all("quantizer_step", device, last, ("f_hat",))


# Real sizes, on a GPU


def real_cases() -> dict[str, tuple[str, Make, tuple[str, ...]]]:
    """VAR-d16 and LlamaGen-L at batch 64, guided; the same with other widths and shared keys; batch 1."""
    half = torch.bfloat16
    return {
        "VAR norm": ("add_layer_norm", lambda: norm_inputs(128, 256, 1024, half, True), ("x", "out")),
        "VAR-d30 norm": ("add_layer_norm", lambda: norm_inputs(128, 16, 1920, half, True), ("x", "out")),
        "VAR append": ("append_normed", lambda: normed_inputs(128, 256, 16, 64, 424, 680, half), ("qkv", "cache")),
        "Llama norm": ("add_rms_norm", lambda: rms_inputs(128, 1, 1024, half, True), ("x", "out")),
        "Llama append": (
            "append_rotated",
            lambda: rotated_inputs(128, 1, 16, 16, 64, 255, 256, half),
            ("qkv", "cache"),
        ),
        "Llama decode": ("decode_attention", lambda: decode_inputs(128, 16, 16, 64, 256, 255, half), ("out",)),
        "Llama decode 1": ("decode_attention", lambda: decode_inputs(2, 16, 16, 64, 256, 130, half), ("out",)),
        "Llama-3B decode": ("decode_attention", lambda: decode_inputs(32, 32, 32, 100, 256, 255, half), ("out",)),
        "shared decode": ("decode_attention", lambda: decode_inputs(8, 32, 8, 128, 2048, 1500, half), ("out",)),
        "Llama swiglu": (
            "swiglu",
            lambda: {"gate_up": normal(128, 1, 5632, dtype=half), "out": unwritten(128, 1, 2816, dtype=half)},
            ("out",),
        ),
        **{
            f"quantizer {n}": (
                "quantizer_step",
                lambda n=n, m=m: quantizer_inputs(64, 16, n, 32, m),  # type: ignore[misc]
                ("f_hat",) if m is None else ("f_hat", "out"),
            )
            for n, m in ((1, 4), (169, 256), (256, None))
        },
        "a wide quantizer": ("quantizer_step", lambda: quantizer_inputs(8, 32, 64, 128, 256), ("f_hat", "out")),
    }


@gpu
@needs_gpu
@pytest.mark.parametrize("name", real_cases())
def test_real_sizes(name: str) -> None:
    operation, make, outputs = real_cases()[name]
    check(operation, "cuda", make, outputs)


@gpu
@needs_gpu
def test_attention_of_every_scale_reads_the_cache_where_it_lies() -> None:
    """torch's, in whatever way it chooses for bfloat16 and these strides; a CUDA graph of it gives the same bits."""
    cache, stop, wrong = normal(2, 8, 16, 680, 64, dtype=torch.bfloat16).cuda(), 0, {}
    for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16):
        n, stop = side * side, stop + side * side
        cache[:, :, :, stop:] = torch.nan
        cache[:, :, :, :stop] = normal(2, 8, 16, stop, 64, seed=side).cuda()
        q = normal(8, n, 3, 16, 64, seed=n, dtype=torch.bfloat16).cuda()[:, :, 0]
        out, replayed = (torch.full((8, n, 16, 64), torch.nan, dtype=q.dtype, device="cuda") for _ in range(2))
        k, v = cache[:, :, :, :stop]
        ops.attention(q, k, v, 0.3, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.attention(q, k, v, 0.3, replayed)
        graph.replay()
        want = torch.softmax(0.3 * q.double().transpose(1, 2) @ k.double().mT, -1) @ v.double()
        error = float((out.double() - want.transpose(1, 2)).abs().max())
        if not (error < 0.03 and torch.equal(out, replayed)):
            wrong[side] = error, float((out != replayed).float().mean())
    assert not wrong


def step_inputs() -> tuple[dict[str, Any], dict[str, Any]]:
    """A step of LlamaGen's attention, keys shared and split."""
    given = moved(rotated_inputs(2, 1, 4, 2, 64, 0, 256, torch.bfloat16), "cuda")
    more = {"q": given["qkv"][:, 0, :4], "cache": given["cache"], "length": given["length"], "scale": 0.125}
    return given, more | {"out": unwritten(2, 4, 64, dtype=torch.bfloat16).cuda()}


def take_step(appended: dict[str, Any], attended: dict[str, Any], new: Tensor) -> None:
    appended["qkv"].copy_(new.index_select(0, appended["length"])[0])
    _native_cuda.append_rotated(**appended)
    _native_cuda.decode_attention(**attended)
    appended["length"].add_(1)


@gpu
@needs_gpu
def test_one_graph_serves_every_step() -> None:
    """Replayed at each length it gives the bits of the calls; past the end of the cache it writes nothing."""
    new = normal(258, 2, 1, 8, 64, dtype=torch.bfloat16).cuda()
    eager, replayed = step_inputs(), step_inputs()
    take_step(*replayed, new)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take_step(*replayed, new)
    replayed[0]["length"].zero_()
    for _ in range(256):
        take_step(*eager, new)
        graph.replay()
        assert torch.equal(eager[1]["out"], replayed[1]["out"])
    full = replayed[0]["cache"].clone()
    graph.replay()
    assert torch.equal(full, replayed[0]["cache"]) and torch.equal(full, eager[0]["cache"])


@gpu
@needs_gpu
def test_calls_allocate_nothing_and_do_not_wait() -> None:
    cases = [moved(make(), "cuda") for _, make, _ in real_cases().values()]
    names = [name for name, _, _ in real_cases().values()]

    def run() -> None:
        for name, given in zip(names, cases, strict=True):
            getattr(_native_cuda, name)(**given)

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@gpu
@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    """Every access is within a tensor's own memory, and none to shared memory races with another."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", sys.executable, __file__]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def run_each_kernel() -> None:
    """Every operation once or more on a GPU, with rows and positions that fill no block."""
    for dtype in DTYPES:
        calls: list[tuple[str, dict[str, Any]]] = []
        for dim in (100, 1024, 1920, 9000):
            calls.append(("add_layer_norm", norm_inputs(3, 5, dim, dtype, True)))
            calls.append(("add_rms_norm", rms_inputs(3, 5, dim, dtype, True)))
        for width in (18, 64, 100):
            calls.append(("append_normed", normed_inputs(3, 5, 3, width, 8, 11, dtype)))  # more than fit
            calls.append(("append_rotated", rotated_inputs(3, 5, 4, 2, width, 8, 11, dtype)))
            calls.append(("decode_attention", decode_inputs(3, 3, 3, width, 77, 76, dtype)))
            calls.append(("decode_attention", decode_inputs(3, 10, 2, width, 200, 150, dtype)))
        calls.append(("swiglu", {"gate_up": normal(3, 202, dtype=dtype), "out": unwritten(3, 101, dtype=dtype)}))
        for codes in layers.CODE_LIMITS:
            for width in (100, 1024, 5120, 40_001):
                calls.append(("quantize_rows", code_inputs((3, 5), width, dtype, codes)))
        calls.append(("quantizer_step", quantizer_inputs(3, 7, 16, 8, 36)))
        calls.append(("quantizer_step", quantizer_inputs(40, 16, 256, 32, None)))
        for name, given in calls:
            getattr(_native_cuda, name)(**moved(given, "cuda"))
    torch.cuda.synchronize()


# Compiled, which needs no GPU


@pytest.mark.parametrize(
    ("source", "kernels"), [("noise.cu", 1), pytest.param("layers.cu", 100, marks=pytest.mark.slow)]
)
def test_every_kernel_compiles_without_spills(source: str, kernels: int, tmp_path: Path) -> None:
    """For sm_80 and sm_90, without a warning."""
    path = ROOT / "csrc" / "cuda" / source
    if shutil.which("nvcc") is None or not path.exists():
        pytest.skip("needs nvcc and the sources")
    kinds = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    command = ["nvcc", "-std=c++17", "-O3", *kinds, "--threads=2", "-fatbin", "-Xptxas=-v", str(path)]
    run = subprocess.run([*command, "-o", str(tmp_path / "kernels.fatbin")], capture_output=True, text=True)
    assert run.returncode == 0 and "warning" not in run.stderr, run.stderr
    pattern = r"Compiling entry function '(\w+)' for '(\w+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill"
    found = re.findall(pattern, run.stderr)
    assert [kernel for kernel in found if kernel[2:] != ("0", "0")] == []
    for arch in ("sm_80", "sm_90"):
        assert sum(kind == arch for _, kind, *_ in found) >= kernels


if __name__ == "__main__":
    run_each_kernel()
