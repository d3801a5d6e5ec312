"""What a student's blocks compute between their products: C++, forwards and backwards, against the twins in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from torch import Tensor

from ddfast import _native, ops
from ddfast.models import fused, twins
from ddfast.models.attention import group_mask, grouped, masked

LEVELS = _native.cpu_levels()
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the largest value

pytestmark = pytest.mark.skipif(not LEVELS, reason="ddfast._C is not built")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, one_thread: None) -> Iterator[str]:  # noqa: F811
    """Each instruction set."""
    with _native.cpu_level(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(name: str, got: Tensor, want: Tensor) -> None:
    error, size = (got.double() - want).abs().max(), want.abs().max()
    assert error <= TOLERANCE[got.dtype] * size, (name, float(error), float(size))


def check(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Outputs and gradients of the C++ path against the twin's; the outputs."""

    def run(function: Any, change: Any) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        given = [change(a).requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
        out = function(*given)
        out = out if isinstance(out, tuple) else (out,)
        sum((o * normal(*o.shape, seed=i)).sum() for i, o in enumerate(out)).backward()
        return out, [a.grad for a in given if isinstance(a, Tensor)]

    with ops.forced("native"):
        out, grads = run(getattr(fused, name), lambda a: a.clone())
    want_out, want_grads = run(getattr(twins, name), lambda a: a.double())
    for i, pair in enumerate(zip(out, want_out, strict=True)):
        close(f"output {i}", *pair)
    for i, pair in enumerate(zip(grads, want_grads, strict=True)):
        close(f"gradient {i}", *pair)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 50, 20_000])
def test_gelu(level: str, dtype: torch.dtype, count: int) -> None:
    check("gelu", normal(count, seed=1, dtype=dtype) * 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, n, dim", [(1, 1, 5), (3, 33, 50), (2, 70, 96)])
def test_gated_sum(level: str, dtype: torch.dtype, rows: int, n: int, dim: int) -> None:
    mods = normal(rows, 3, dim, seed=3).unsqueeze(2).unbind(1)
    check("gated_sum", normal(rows, n, dim, seed=1), normal(rows, n, dim, seed=2, dtype=dtype), mods[1])


@pytest.mark.parametrize("rows, n, dim", [(1, 1, 5), (3, 33, 50), (2, 70, 96)])
@pytest.mark.parametrize("shared", [False, True])
def test_modulated_norm(level: str, rows: int, n: int, dim: int, shared: bool) -> None:
    """``shared``: one modulation for all images."""
    mods = normal(1 if shared else rows, 2, 1, dim, seed=3)
    x = 2 * normal(rows, n, dim, seed=1) + 1
    check("modulated_norm", x, mods[:, 0], mods[:, 1], 1e-6)
    with torch.autocast("cpu", torch.bfloat16), ops.forced("native"):
        low = fused.modulated_norm(x, mods[:, 0].bfloat16(), mods[:, 1], 1e-6)
    assert low.dtype == torch.bfloat16  # a matrix product follows
    close("under autocast", low, twins.modulated_norm(x.double(), mods[:, 0].bfloat16().double(), mods[:, 1], 1e-6))


@pytest.mark.parametrize("rows, n, dim", [(1, 1, 5), (3, 33, 50), (2, 70, 96)])
def test_rms_norm(level: str, rows: int, n: int, dim: int) -> None:
    x, weight = 2 * normal(rows, n, dim, seed=1) + 1, normal(dim, seed=2)
    check("rms_norm", x, weight, 1e-5)
    with torch.autocast("cpu", torch.bfloat16), ops.forced("native"):
        low = fused.rms_norm(x, weight, 1e-5)
    assert low.dtype == torch.bfloat16
    close("under autocast", low, twins.rms_norm(x.double(), weight.double(), 1e-5))


def test_norms_under_autocast_to_float16_are_the_twins() -> None:
    x, mod = normal(2, 3, 8, seed=1), normal(2, 1, 8, seed=2)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(fused.modulated_norm(x, mod, mod, 1e-6), twins.modulated_norm(x, mod, mod, 1e-6))
        assert torch.equal(fused.rms_norm(x, mod[0, 0], 1e-6), twins.rms_norm(x, mod[0, 0], 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 50, 20_000])
def test_swiglu(level: str, dtype: torch.dtype, count: int) -> None:
    check("swiglu", 4 * normal(count, seed=1, dtype=dtype), normal(count, seed=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, n, heads, kv_heads, width", [(1, 1, 1, 1, 2), (2, 33, 4, 2, 32), (3, 40, 2, 2, 50)])
def test_rotated_heads(
    level: str, dtype: torch.dtype, rows: int, n: int, heads: int, kv_heads: int, width: int
) -> None:
    angle = normal(n, width // 2, seed=3)
    rope = torch.stack([angle.cos(), angle.sin()], dim=-1)
    qkv = normal(rows, n, heads + 2 * kv_heads, width, seed=1, dtype=dtype).requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    with ops.forced("native"):
        got = fused.rotated_heads(qkv, heads, rope)
    want = twins.rotated_heads(wide, heads, rope.double())
    for out in (got, want):
        torch.autograd.backward(out, [normal(*o.shape, seed=i, dtype=dtype).to(o.dtype) for i, o in enumerate(out)])
    assert qkv.grad is not None and wide.grad is not None
    for i, pair in enumerate(zip((*got, qkv.grad), (*want, wide.grad), strict=True)):
        assert pair[0].shape == pair[1].shape
        close(str(i), *pair)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, n, heads, width", [(1, 1, 1, 3), (2, 33, 3, 32), (2, 40, 2, 50)])
def test_normed_heads(level: str, dtype: torch.dtype, rows: int, n: int, heads: int, width: int) -> None:
    qkv = normal(rows, n, 3, heads, width, seed=1, dtype=dtype)
    q, _, v = check("normed_heads", qkv, normal(heads, seed=2).abs() + 1)
    assert q.dtype == torch.float32 and v.dtype == dtype  # scores are float32


def test_a_query_of_zeros_has_a_finite_gradient(level: str) -> None:
    qkv = torch.zeros(1, 2, 3, 1, 4, requires_grad=True)
    with ops.forced("native"):
        q, k, v = fused.normed_heads(qkv, torch.ones(1))
    (q.sum() + k.sum() + v.sum()).backward()
    assert q.eq(0).all() and qkv.grad is not None and qkv.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 30, 64, 213])
def test_softmax_rows(level: str, dtype: torch.dtype, keys: int) -> None:
    batch, n, length = 3, 5, 9
    scores, whole = 30 * normal(batch, n, keys, seed=1), 30 * normal(batch, length, 1, seed=2)
    dp, carried = normal(batch, n, keys, seed=3, dtype=dtype), normal(batch, length, 1, seed=4)

    def run(change: Any, low: torch.dtype, forced: Any) -> tuple[Tensor, ...]:
        own = change(whole)[:, 2 : 2 + n]
        p, own_p, lse = (
            torch.full_like(t, torch.nan, dtype=kind)
            for t, kind in ((scores, low), (whole, own.dtype), (whole, own.dtype))
        )
        low_p, ds = torch.full_like(p, torch.nan), dp.to(low, copy=True)
        at = slice(2, 2 + n)
        with ops.forced(forced):
            fused.softmax_rows(change(scores), own, p, own_p[:, at], lse[:, at])
            fused.softmax_rows_gradient(change(scores), lse[:, at], ds, change(carried)[:, at], 0.5, low_p)
        assert own_p[:, :2].isnan().all() and lse[:, 2 + n :].isnan().all()  # what is others' stays as it was
        return p, own_p[:, at], lse[:, at], low_p, ds

    wanted = run(lambda t: t.double(), torch.float64, "torch")
    for i, pair in enumerate(zip(run(lambda t: t.clone(), dtype, "native"), wanted, strict=True)):
        close(str(i), *pair)
    assert torch.allclose(wanted[0].sum(-1, keepdim=True) + wanted[1], torch.ones(()).double())


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 20, 36])
def test_what_is_not_finite_shows(level: str, odd: float, place: int) -> None:
    """A loss that is not finite ends training: no loop may hide it."""
    x = normal(1, 1, 37, seed=1)
    x[..., place] = odd
    ones = torch.ones(1, 1, 37)
    with ops.forced("native"):
        assert not fused.gated_sum(ones, x, ones).isfinite().all()
        assert fused.modulated_norm(x, ones, ones, 1e-6).isnan().any()
        assert fused.rms_norm(x, ones[0, 0], 1e-6).isnan().any()
        assert not fused.swiglu(x, x).isfinite().all()
        assert not fused.gelu(x).isfinite().all()
        own, p = torch.zeros(1, 1, 1), torch.zeros(1, 1, 37)
        fused.softmax_rows(x, own, p, own.clone(), own.clone())
        assert p.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, gate = normal(3, 200, 64, seed=1).requires_grad_(), normal(3, 1, 64, seed=2).requires_grad_()
            branch = normal(3, 200, 64, seed=3, dtype=dtype)
            y = fused.gated_sum(fused.modulated_norm(x, gate, gate, 1e-6), branch, gate)
            y.backward(normal(3, 200, 64, seed=4))
            results.append((y.detach(), x.grad, gate.grad))
    finally:
        torch.set_num_threads(before)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_by_groups(level: str, dtype: torch.dtype) -> None:
    """The form for long rows, its gradient too, against a dense mask."""
    groups = (1, 1, 4, 9, 16, 36, 100)
    q, k, v = (normal(2, 3, sum(groups), 8, seed=i, dtype=dtype) for i in range(3))
    attends = (grouped(groups, torch.device("cpu")), masked(group_mask(groups, torch.device("cpu"))))
    results = []
    for attend, kind in zip(attends, (dtype, torch.float64), strict=True):
        given = [t.to(kind).clone().requires_grad_() for t in (q, k, v)]
        out = attend(*given, 0.7)
        out.backward(normal(*out.shape, seed=9).to(kind))
        results.append((out, *(t.grad for t in given)))
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert got is not None and want is not None
        error = float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max())
        assert error <= 2 * TOLERANCE[dtype], (i, error)
