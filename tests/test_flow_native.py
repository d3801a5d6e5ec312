"""The compiled flow and filter against their torch twins, on every instruction set this machine runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FAMILIES, draw
from torch import Tensor

from ddfast import _native, ops
from ddfast.flow import FlowResult, LogitFilter, filter_logits, make_solver
from ddfast.flow.tokens import BAD_LOGITS, BAD_NOISE, guide, solve_rows

pytestmark = pytest.mark.skipif(not _native.available(), reason="the compiled extension is not installed")

VAR = LogitFilter(top_k=900, top_p=0.95)
DENSE = LogitFilter(rule="llamagen")


@pytest.fixture(params=_native.cpu_levels(), autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test once an instruction set, with NaN in scratch and in outputs that are not yet written."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    with _native.cpu_level(request.param), _native.poisoned(), ops.forced("native"):
        yield
    torch.use_deterministic_algorithms(False)


def problem(n: int, vocab: int, channels: int, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cond, uncond [n, vocab], noise [n, channels], codebook [vocab, channels]."""
    g = torch.Generator().manual_seed(seed)
    cond = spread * torch.randn(n, vocab, generator=g)
    uncond = cond + 0.3 * torch.randn(n, vocab, generator=g)
    return cond, uncond, torch.randn(n, channels, generator=g), 0.7 * torch.randn(vocab, channels, generator=g)


@cache
def family(name: str, solver: str) -> tuple[Any, FlowResult]:
    """100 rows of a family and what torch makes of them, once for all instruction sets."""
    (p,) = draw(FAMILIES[name], 100, seed=5, chunk=100)
    return p, solve_rows(p.log_p, None, p.noise, p.codebook, guidance=1.0, filter=DENSE, solver=make_solver(solver))


@cache
def filtered(vocab: int, keep: LogitFilter) -> tuple[tuple[Tensor, ...], Tensor, FlowResult]:
    """60 rows of guided logits, what torch keeps of them and makes of them in float64, once for all levels."""
    cond, uncond, noise, codebook = problem(60, vocab, 32 if vocab == 4096 else 8, seed=vocab + keep.top_k)
    logits = guide(cond, uncond, 1.5).double()
    options: dict[str, Any] = {"guidance": 1.0, "filter": keep, "solver": make_solver()}
    want = solve_rows(logits, None, noise.double(), codebook, **options)
    return (cond, uncond, noise, codebook), filter_logits(logits, keep) > -torch.inf, want


@cache
def odd(vocab: int, channels: int, keep: LogitFilter) -> tuple[tuple[Tensor, ...], FlowResult]:
    """23 rows, and what torch makes of them, once for all instruction sets."""
    given = problem(23, vocab, channels, seed=100 * vocab + channels)
    return given, solve_rows(*given, guidance=2.0, filter=keep, solver=make_solver())


def agree(got: FlowResult, want: FlowResult, but: int = 0, atol: float = 2e-3) -> None:
    """Tokens, end points and evaluations of all but a few tokens, whose two best codes are as good as equally far."""
    same = (got.tokens == want.tokens) & (got.evaluations == want.evaluations)
    assert int((~same).sum()) <= but
    torch.testing.assert_close(got.x[same], want.x[same].float(), rtol=2e-3, atol=atol)


@pytest.mark.parametrize(
    ("vocab", "keep"),
    [(4096, VAR), (16384, DENSE), (16384, LogitFilter(top_k=2000, rule="llamagen")), (16384, LogitFilter(top_k=8000))],
)
def test_kept_sets_and_tokens_equal_the_float64_twin(vocab: int, keep: LogitFilter) -> None:
    (cond, uncond, noise, codebook), kept, want = filtered(vocab, keep)
    logits = guide(cond, uncond, 1.5)
    assert torch.equal(ops.filter_logits(logits, keep) > -torch.inf, kept)
    options: dict[str, Any] = {"guidance": 1.0, "filter": keep, "solver": make_solver()}
    got = ops.flow(logits, None, noise, codebook, **options)
    agree(got, want)
    options["guidance"] = 1.5
    assert torch.equal(got.tokens, ops.flow_tokens(cond, uncond, noise, codebook, **options))


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 11, 16, 32, 40])
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 63, 64, 65, 130])
def test_odd_sizes(vocab: int, channels: int) -> None:
    for keep in (DENSE, LogitFilter(top_k=(vocab + 1) // 2, top_p=0.9)):
        given, want = odd(vocab, channels, keep)
        agree(ops.flow(*given, guidance=2.0, filter=keep, solver=make_solver()), want, but=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [50, 128])
def test_half_precision_logits(dtype: torch.dtype, vocab: int) -> None:
    cond, uncond, noise, codebook = problem(40, vocab, 6, seed=1)
    cond[:, 7], uncond[:, 7] = -torch.inf, -torch.inf
    cond[:, 8] = uncond[:, 8] = -1e-7  # subnormal as float16
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    options: dict[str, Any] = {"guidance": 2.0, "filter": LogitFilter(top_k=30, top_p=0.9), "solver": make_solver()}
    got = ops.flow(cond, uncond, noise, codebook, **options)
    want = ops.flow(cond.float(), uncond.float(), noise, codebook, **options)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.x, want.x)


def test_every_element_of_half_precision_is_read_right() -> None:
    """All 65,536 patterns: with one finite logit a row, only the others' being -inf, NaN or finite decides."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
        value = bits.view(dtype)
        cond = torch.stack([value, torch.zeros_like(value)], 1)
        noise, codebook = torch.full((len(value), 1), 0.1), torch.tensor([[1.0], [-1.0]])
        options: dict[str, Any] = {"guidance": 1.0, "filter": DENSE, "solver": make_solver()}
        got = ops.flow(cond, None, noise, codebook, check=False, **options)
        want = solve_rows(cond, None, noise, codebook, **options)
        assert torch.equal(got.tokens, want.tokens)
        assert torch.equal(got.evaluations < 0, want.evaluations < 0)


def test_bad_rows_are_marked_and_leave_the_others_alone() -> None:
    cond, uncond, noise, codebook = problem(40, 70, 5, seed=2)
    options: dict[str, Any] = {"guidance": 2.0, "filter": LogitFilter(top_k=30), "solver": make_solver()}
    good = ops.flow(cond, uncond, noise, codebook, **options)
    cond[3, 69], cond[11, 0], cond[12], noise[7, 4] = torch.nan, torch.inf, -torch.inf, torch.nan
    uncond[12] = -torch.inf
    got = ops.flow(cond, uncond, noise, codebook, check=False, **options)
    bad = [3, 7, 11, 12]
    assert got.evaluations[bad].tolist() == [BAD_LOGITS, BAD_NOISE, BAD_LOGITS, BAD_LOGITS]
    assert got.tokens[bad].tolist() == [0] * 4 and bool(got.x[bad].isnan().all())
    rest = [i for i in range(40) if i not in bad]
    assert torch.equal(got.tokens[rest], good.tokens[rest]) and torch.equal(got.x[rest], good.x[rest])


@pytest.mark.parametrize("size", [1e-12, 1e12, 1e18])
def test_codes_of_any_size(size: float) -> None:
    """The flow of large codes is that of small ones after a moment, and the other way round."""
    cond, _, noise, codebook = problem(100, 40, 4, seed=11)
    options: dict[str, Any] = {"guidance": 1.0, "filter": DENSE, "solver": make_solver()}
    agree(
        ops.flow(cond, None, noise, size * codebook, **options),
        solve_rows(cond.double(), None, noise.double(), size * codebook.double(), **options),
        but=1,
    )


def test_impossible_tokens_and_equal_codes() -> None:
    cond, _, noise, codebook = problem(300, 40, 4, seed=3)
    cond[:, ::2] = -torch.inf
    codebook[21] = codebook[5]
    cond[:, 21] = cond[:, 5] + 1.0
    cond[:100, 5:] = -torch.inf  # rows with two, and with one token left
    cond[:50, 3:] = -torch.inf
    options: dict[str, Any] = {"guidance": 1.0, "filter": DENSE, "solver": make_solver()}
    got = ops.flow(cond, None, noise, codebook, **options)
    agree(got, solve_rows(cond, None, noise, codebook, **options), but=1)
    assert bool(cond.gather(1, got.tokens[:, None]).isfinite().all()) and not bool((got.tokens == 5)[100:].any())


def test_peaked_and_far_reaching_logits() -> None:
    """Log-weights that run past what exp can hold, from far outliers and from peaked distributions."""
    cond, _, noise, codebook = problem(200, 300, 8, seed=4, spread=30.0)
    codebook[10:20] *= 30
    for keep in (DENSE, LogitFilter(top_k=100, top_p=0.999)):
        options: dict[str, Any] = {"guidance": 1.0, "filter": keep, "solver": make_solver("adams", 20)}
        want = solve_rows(cond.double(), None, noise.double(), codebook.double(), **options)
        agree(ops.flow(cond, None, noise, codebook, **options), want, but=2, atol=2e-2)


@pytest.mark.parametrize("channels", [5, 8, 32])
def test_noise_from_far_out(channels: int) -> None:
    """A code that was as good as impossible takes over from one evaluation to the next, by more than 2^128."""
    cond, _, noise, codebook = problem(100, 64, channels, seed=12)
    options: dict[str, Any] = {"guidance": 1.0, "filter": DENSE, "solver": make_solver()}
    want = solve_rows(cond.double(), None, 300 * noise.double(), codebook.double(), **options)
    got = ops.flow(cond, None, 300 * noise, codebook, **options)
    assert bool(got.x.isfinite().all())
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.evaluations, want.evaluations)


@pytest.mark.parametrize("name", ["var-geo", "llama-geo", "llama-sharp", "small"])
@pytest.mark.parametrize("solver", ["adams", "precise"])
def test_families(name: str, solver: str) -> None:
    p, want = family(name, solver)
    options: dict[str, Any] = {"guidance": 1.0, "filter": DENSE, "solver": make_solver(solver)}
    agree(ops.flow(p.log_p, None, p.noise, p.codebook, **options), want, but=1)


def test_frequencies_match_p() -> None:
    """Pearson's statistic of 200,000 tokens against p, whose 39 degrees of freedom have mean 39 and deviation 8.8."""
    cond, _, _, codebook = problem(1, 40, 8, seed=6, spread=1.0)
    total = 200_000
    noise = torch.randn(total, 8, generator=torch.Generator().manual_seed(7))
    tokens = ops.flow_tokens(
        cond.expand(total, -1), None, noise, codebook, guidance=1.0, filter=DENSE, solver=make_solver()
    )
    want = total * cond[0].double().softmax(0)
    statistic = float(((torch.bincount(tokens, minlength=40) - want).square() / want).sum())
    assert statistic < 39 + 5 * 8.8


_rows = st.lists(
    st.one_of(st.integers(-24, 24).map(lambda i: i / 8), st.floats(-1e4, 1e4, width=32), st.just(-torch.inf)),
    min_size=1,
    max_size=150,
).filter(lambda row: max(row) > -torch.inf)


@settings(max_examples=300, deadline=None)
@given(
    _rows,
    st.sampled_from(["var", "llamagen"]),
    st.integers(0, 150),
    st.one_of(st.none(), st.floats(0.0, 1.0)),
    st.sampled_from([1.0, 0.7, 3.0]),
)
def test_filter_equals_its_twin_on_any_row(row: list[float], rule: str, k: int, p: float | None, t: float) -> None:
    logits = torch.tensor([row])
    keep = LogitFilter(t, min(k, len(row)), p, rule)
    got, want = ops.filter_logits(logits, keep), filter_logits(logits, keep)
    both = (got > -torch.inf) & (want > -torch.inf)
    assert bool(both.any()) and torch.equal(got[both], want[both])
    differing = ((got > -torch.inf) != (want > -torch.inf))[0]
    if bool(differing.any()):  # only where the mass of what is more probable lands on the cut to within rounding
        left = filter_logits(logits, LogitFilter(t, min(k, len(row)), None, rule))[0].double().softmax(0)
        order = left.sort(descending=True, stable=True).indices
        before = torch.empty_like(left).index_copy_(0, order, left[order].cumsum(0) - left[order])
        assert p is not None and bool(((before[differing] - p).abs() < 1e-12).all())


@pytest.mark.parametrize("rule", ["var", "llamagen"])
def test_filter_with_many_ties(rule: str) -> None:
    g = torch.Generator().manual_seed(8)
    logits = torch.randint(-8, 9, (400, 333), generator=g) / 4
    for k, p in ((0, 0.31), (50, None), (100, 0.83), (333, 0.97)):
        keep = LogitFilter(1.0, k, p, rule)
        assert torch.equal(ops.filter_logits(logits, keep), filter_logits(logits, keep)), (k, p)


def test_filter_takes_any_leading_shape() -> None:
    logits = torch.randn(3, 5, 77, generator=torch.Generator().manual_seed(9))
    keep = LogitFilter(top_k=20, top_p=0.8)
    assert torch.equal(ops.filter_logits(logits, keep), filter_logits(logits, keep))


def test_threads_change_nothing() -> None:
    cond, uncond, noise, codebook = problem(101, 500, 8, seed=10)
    options: dict[str, Any] = {"guidance": 1.5, "filter": VAR_SMALL, "solver": make_solver()}
    one = ops.flow(cond, uncond, noise, codebook, **options)
    torch.set_num_threads(2)
    two = ops.flow(cond, uncond, noise, codebook, **options)
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.x, two.x)
    alone = ops.flow(cond[37:38], uncond[37:38], noise[37:38], codebook, **options)
    assert torch.equal(alone.x, one.x[37:38])


VAR_SMALL = LogitFilter(top_k=110, top_p=0.95)
