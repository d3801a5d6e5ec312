"""Inference linears: every precision against a float64 product, odd shapes, errors; and the bench of their effect."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast import ops
from ddfast.errors import UserError
from ddfast.models import linear
from ddfast.models.linear import EMULATED, check_precision, make_linear

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(not linear._int8_runs(), reason="no AVX512-VNNI or no oneDNN")
precisions = pytest.mark.parametrize("precision", ["native", pytest.param("int8", marks=needs_int8), EMULATED])
UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def layer(
    n: int, k: int, dtype: torch.dtype = torch.float32, bias: bool = True, device: str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=g) * k**-0.5
    return weight.to(device, dtype), torch.randn(n, generator=g).to(device, dtype) if bias else None


def rows(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(device, dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return F.gelu(y, approximate="tanh") if gelu else y


def rounded(x: Tensor, largest: int) -> Tensor:
    """x in float64, each row rounded to a grid of 2 largest + 1 values."""
    step = x.double().abs().amax(-1, keepdim=True).clamp_min(1e-300) / largest
    return (x.double() / step).round() * step


@pytest.mark.parametrize("shape", [(1, 17), (5, 17), (2, 3, 17), (700, 17)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("dtype", list(UNIT))
def test_native_is_the_exact_product_rounded(
    shape: tuple[int, ...], bias: bool, gelu: bool, dtype: torch.dtype
) -> None:
    weight, b = layer(33, 17, dtype, bias)
    x = rows(*shape, dtype=dtype)
    y = make_linear(weight, b, gelu=gelu)(x)
    assert y.shape == (*shape[:-1], 33) and y.dtype == dtype
    want = exact(x, weight, b, gelu)
    # sums of 17 products of about 1/4, and outside oneDNN gelu rounds once more
    assert ((y.double() - want).abs() <= 4 * UNIT[dtype] * (1 + want.abs()) + 4e-7 * (dtype == torch.float32)).all()


@precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_dimensions_and_empty_batches(precision: str, dtype: torch.dtype) -> None:
    weight, bias = layer(48, 32, dtype)
    f = make_linear(weight, bias, precision=precision)
    x = rows(4, 5, 64, dtype=dtype)[:, :, ::2]
    flat = f(x.reshape(20, 32).contiguous())
    torch.testing.assert_close(f(x), flat.view(4, 5, 48), rtol=0, atol=0)
    torch.testing.assert_close(f(x.transpose(0, 1)), flat.view(4, 5, 48).transpose(0, 1), rtol=0, atol=0)
    assert f(x[:0]).shape == (0, 5, 48) and f(x[:, :0]).shape == (4, 0, 48) and f(x[:0]).dtype == dtype
    assert f(x[0, 0]).shape == (48,)


@needs_int8
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("size", [(33, 17), (128, 64), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_product_of_what_it_rounds_to(size: tuple[int, int], gelu: bool, dtype: torch.dtype) -> None:
    weight, bias = layer(*size, dtype)
    x = rows(600, size[1], dtype=dtype) * torch.logspace(-3, 3, 600).to(dtype)[:, None]  # no common scale would do
    y = make_linear(weight, bias, precision="int8", gelu=gelu)(x).double()
    want = exact(rounded(x, 127), rounded(weight, 127), bias, gelu)
    unit = max(UNIT[dtype], 2.0**-18)  # ties of the rounding fall either way
    flips = x.double().abs().amax(1, keepdim=True) / 127 * weight.double().abs().amax(1)
    off = (y - want).abs() > 4 * unit * (1 + want.abs())
    assert off.double().mean() < 0.02 and ((y - want).abs() <= 4 * unit * (1 + want.abs()) + 2 * flips).all()


@needs_int8
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_same_by_plain_torch(gelu: bool, dtype: torch.dtype) -> None:
    """Up to halves, which may be rounded either way."""
    weight, bias = layer(48, 32, dtype)
    f, x = make_linear(weight, bias, precision="int8", gelu=gelu), rows(600, 32, dtype=dtype)
    y = f(x)
    with ops.forced("torch"):
        want = make_linear(weight, bias, precision="int8", gelu=gelu)(x)
    off = (y - want).abs() > 2 * UNIT[dtype] * (1 + want.abs())
    assert off.double().mean() < 0.02 and (y - want).abs().max() < 0.05


@precisions
def test_weights_of_any_strides(precision: str) -> None:
    weight, bias = layer(48, 32)
    x = rows(5, 32)
    turned = make_linear(weight.t().contiguous().t(), bias, precision=precision)
    torch.testing.assert_close(turned(x), make_linear(weight, bias, precision=precision)(x))


@precisions
def test_error_is_a_small_share_of_the_result(precision: str) -> None:
    weight, bias = layer(256, 512, torch.float32, bias=False)
    x = rows(300, 512)
    want = exact(x, weight, bias, False)
    error = (make_linear(weight, bias, precision=precision)(x).double() - want).square().mean().sqrt()
    # a grid of 255 values over +-3.5 sigma for both factors; e4m3 rounds to 3 bits: 2^-4/sqrt(3) of each factor at most
    low, high = {"native": (0.0, 1e-6), "int8": (0.005, 0.02), EMULATED: (0.02, 0.05)}[precision]
    assert low <= float(error / want.square().mean().sqrt()) <= high


@precisions
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_is_seen_and_stays_in_its_row(precision: str, bad: float) -> None:
    weight, bias = layer(32, 16)
    f, x = make_linear(weight, bias, precision=precision), rows(6, 16)
    clean = f(x)
    x[2, 3] = bad
    y = f(x)
    others = torch.arange(6) != 2
    assert not y[2].isfinite().any()
    torch.testing.assert_close(y[others], clean[others], rtol=0, atol=0)


@pytest.mark.parametrize("precision", [pytest.param("int8", marks=needs_int8), EMULATED])
def test_quantised_zeros_are_the_bias_and_rows_do_not_meet(precision: str) -> None:
    weight, bias = layer(32, 16)
    weight[4] = 0
    f = make_linear(weight, bias, precision=precision)
    torch.testing.assert_close(f(torch.zeros(3, 16)), bias.expand(3, 32), rtol=0, atol=0)  # type: ignore[union-attr]
    x = rows(1100, 16)
    torch.testing.assert_close(f(x)[700:], f(x[700:]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(f(x)[:, 4], bias[4].expand(1100), rtol=0, atol=0)  # type: ignore[index]


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_onednn_the_weights_stay_plain(gelu: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = layer(33, 17, dtype)
    x = rows(9, 17, dtype=dtype)
    packed = make_linear(weight, bias, gelu=gelu)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = make_linear(weight, bias, gelu=gelu)
    assert isinstance(plain, linear.PlainLinear)
    torch.testing.assert_close(plain(x), packed(x), rtol=8 * UNIT[dtype], atol=8 * UNIT[dtype])


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_a_torch_without_the_private_ops_is_no_error(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ops:
        _is_mkldnn_bf16_supported = staticmethod(lambda: True)
        _reorder_linear_weight = _linear_pointwise = None

    delattr(Ops, missing)
    monkeypatch.setattr(torch.ops, "mkldnn", Ops)
    assert isinstance(make_linear(*layer(8, 8)), linear.PlainLinear)


def test_bfloat16_stays_plain_where_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert isinstance(make_linear(*layer(8, 8, torch.bfloat16)), linear.PlainLinear)


def test_packed_weights_are_copies() -> None:
    if not linear._packs(torch.float32):
        pytest.skip("needs oneDNN")
    weight, _ = layer(32, 64)
    f = make_linear(weight)
    before = f(rows(2, 64))
    weight.zero_()
    torch.testing.assert_close(f(rows(2, 64)), before, rtol=0, atol=0)


FREED = """
import torch
from ddfast.models.linear import make_linear

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

weight = torch.randn(3072, 3072)  # over 32 MiB, which malloc always gives back
f = make_linear(weight)
f(torch.randn(2, 3072))
start = resident()
held = [make_linear(weight) for _ in range(4)]
print(resident() - start, f.nbytes)
del held
print(resident() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_packed_weights_are_freed() -> None:
    """In a process of its own, whose memory nothing else has used before."""
    if not linear._packs(torch.float32):
        pytest.skip("needs oneDNN")
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=120, check=True)
    held, each, left = map(int, done.stdout.split())
    assert held > 3.5 * each and left < each


@pytest.mark.parametrize(
    ("precision", "dtype", "nbytes"),
    [
        ("native", torch.float32, 4 * (32 * 16 + 32)),
        ("native", torch.bfloat16, 2 * (32 * 16 + 32)),
        pytest.param("int8", torch.bfloat16, 32 * 16 + 3 * 4 * 32, marks=needs_int8),
    ],
)
def test_nbytes(precision: str, dtype: torch.dtype, nbytes: int) -> None:
    assert make_linear(*layer(32, 16, dtype), precision=precision).nbytes == nbytes


def test_fp8_leaves_sizes_off_16_native() -> None:
    assert isinstance(make_linear(*layer(32, 24), precision=EMULATED), linear._native(*layer(8, 8), False).__class__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight must be floating \[N, K\].*\[4\]"),
        ({"weight": torch.ones(4, 0)}, r"weight must be .*\[4, 0\]"),
        ({"weight": torch.ones(4, 4, dtype=torch.int8)}, "weight must be floating .*int8"),
        ({"weight": torch.ones(4, 3), "bias": torch.ones(3)}, r"bias must be torch.float32 \[4\].*\[3\]"),
        ({"weight": torch.ones(4, 3), "bias": torch.ones(4).half()}, "bias must be torch.float32.*float16"),
        ({"weight": torch.ones(4, 3), "bias": torch.ones(4, device="meta")}, "weight is on cpu but bias on meta"),
        ({"weight": torch.ones(4, 3), "precision": "int4"}, "precision 'int4' is not known; use native, int8, fp8"),
        ({"weight": torch.ones(4, 3), "precision": "fp8"}, "fp8 needs a CUDA device, not cpu; use int8"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_linear(**arguments)


def test_check_precision_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for dtype in UNIT:
        check_precision("native", CPU, dtype)
        check_precision(EMULATED, CPU, dtype)
    with pytest.raises(UserError, match="int8 is for the CPU, not cuda:0; use fp8"):
        check_precision("int8", cuda, torch.bfloat16)
    monkeypatch.setattr(linear, "_int8_runs", lambda: True)
    check_precision("int8", CPU, torch.bfloat16)
    with pytest.raises(UserError, match="int8 needs a teacher in float32.*float64"):
        check_precision("int8", CPU, torch.float64)
    monkeypatch.setattr(linear, "_int8_runs", lambda: False)
    with pytest.raises(UserError, match="int8 needs a CPU with AVX512-VNNI"):
        check_precision("int8", CPU, torch.bfloat16)
    with pytest.raises(UserError, match="fp8 needs a teacher in bfloat16, not torch.float32: choose --dtype bfloat16"):
        check_precision("fp8", cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"capability 8.9 .* cuda:0 has 8.0"):
        check_precision("fp8", cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_precision("fp8", cuda, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_native(gelu: bool, dtype: torch.dtype) -> None:
    for bias, m in product((True, False), (0, 1, 37)):
        weight, b = layer(96, 64, dtype, bias, "cuda")
        x = rows(m, 64, dtype=dtype, device="cuda")
        want = exact(x, weight, b, gelu)
        bound = 8 * UNIT[dtype] * (1 + want.abs()) + 1e-4 * gelu  # tanh's gelu is 5e-4 off erf's at its worst
        assert ((make_linear(weight, b, gelu=gelu)(x).double() - want).abs() <= bound).all(), (bias, m)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gelu", [True, False])
def test_cuda_fp8_is_its_twin(gelu: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs capability 8.9")
    for bias, m in product((True, False), (0, 1, 37, 256)):
        weight, b = layer(96, 64, torch.bfloat16, bias, "cuda")
        x = rows(m, 64, dtype=torch.bfloat16, device="cuda")
        got, want = (make_linear(weight, b, precision=p, gelu=gelu)(x) for p in ("fp8", EMULATED))
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6, msg=lambda text: f"{bias}, {m}: {text}")  # noqa: B023


def test_the_bench_runs(tmp_path: Path) -> None:
    bench = Path(__file__).parents[1] / "benches" / "bench_precision.py"
    out = tmp_path / "precision.json"
    run = subprocess.run(
        [sys.executable, str(bench), "--quick", "--out", str(out)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    rows_ = json.loads(out.read_text())["rows"]
    assert {row["teacher"] for row in rows_} == {"digits-var", "digits-llamagen"}
    for row in rows_:
        exact = (row["dtype"], row["precision"]) == ("float32", "native")
        assert row["kl_p99"] >= row["kl_mean"] >= 0 and 0.5 < row["agreement"] <= 1
        assert (row["kl_mean"] < 1e-9) == exact and (not exact or row["agreement"] == 1), row
    assert "| digits-var |" in run.stdout
