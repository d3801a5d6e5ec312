"""The field of the flow: stored probes of it, its equation taken literally, and every degenerate distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flow_helpers import golden_flow, one_thread  # noqa: F401 - a fixture
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow import CodebookFlow, make_solver

DTYPES = [torch.float32, torch.float64]


@pytest.mark.golden("dpm_solver_*")
def test_field_matches_golden_probes(golden: Any) -> None:
    flow, noise = golden_flow(golden)
    winners = flow.codebook[golden["out.ref.idx"]]
    for t, x in ((0.25, 0.8 * noise), (0.9, 0.3 * noise + 0.9 * winners)):
        mean, _ = flow.posterior(x / (1 - t), t / (1 - t))
        golden.close(mean, f"out.field.t{t}.D")


def test_posterior_is_bayes_rule() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(6, 40, generator=g, dtype=torch.float64).softmax(1)
    codebook = torch.randn(40, 3, generator=g, dtype=torch.float64)
    z, r = torch.randn(6, 3, generator=g, dtype=torch.float64), torch.rand(6, generator=g, dtype=torch.float64) * 3
    likelihood = (-0.5 * (z[:, None] - r[:, None, None] * codebook).square().sum(-1)).exp()
    want = p * likelihood / (p * likelihood).sum(1, keepdim=True)
    mean, weights = CodebookFlow(p.log() + 5.0, codebook).posterior(
        z, r
    )  # a constant added to log p is normalised away
    torch.testing.assert_close(weights, want)
    torch.testing.assert_close(mean, want @ codebook)


def test_rows_select_tokens() -> None:
    g = torch.Generator().manual_seed(1)
    flow = CodebookFlow(torch.randn(7, 20, generator=g), torch.randn(20, 4, generator=g))
    z = torch.randn(7, 4, generator=g)
    part = flow.rows(torch.tensor([5, 0, 3])).rows(torch.tensor([2, 0]))
    index = torch.tensor([3, 5])
    assert len(part) == 2 and torch.equal(part.log_p, flow.log_p[index])
    torch.testing.assert_close(part.posterior(z[index], 0.7)[1], flow.posterior(z, 0.7)[1][index])
    torch.testing.assert_close(flow.posterior(z, 0.0)[1], flow.log_p.exp())  # log p was not overwritten


def test_without_some_entries() -> None:
    g = torch.Generator().manual_seed(1)
    flow = CodebookFlow(torch.randn(7, 20, generator=g), torch.randn(20, 4, generator=g))
    gone = torch.rand(7, 20, generator=g) < 0.5
    weights = flow.without(gone).posterior(torch.zeros(7, 4), 0.0)[1]
    torch.testing.assert_close(weights, flow.log_p.masked_fill(gone, -torch.inf).softmax(1))
    assert bool(flow.log_p.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_against_the_definition(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(5, 300, generator=g, dtype=torch.float64)
    logits[:, 100:200] = -torch.inf
    logits[4, 7] += 25.0  # almost all of the mass on one token
    codebook = torch.randn(300, 6, generator=g, dtype=torch.float64) + 3
    p = logits.softmax(1)
    mean = p @ codebook
    variance = torch.einsum("nv,nvc->n", p, (codebook - mean[:, None]).square()) / 6
    entropy = torch.special.entr(p).sum(1)
    got = CodebookFlow(logits.to(dtype), codebook.to(dtype)).moments()
    tolerance: dict[str, float] = (
        {"rtol": 2e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    )
    torch.testing.assert_close(got.mean, mean.to(dtype), **tolerance)
    torch.testing.assert_close(got.std, variance.sqrt().to(dtype), **tolerance)
    torch.testing.assert_close(got.entropy, entropy.to(dtype), **tolerance)
    told = 3 * torch.log1p((got.scale * got.std).square())  # C/2 log(1 + R*^2 s^2) = H
    torch.testing.assert_close(told, got.entropy, **tolerance)


def degenerate_cases(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """log_p [4, V] and codebook [V, C] of distributions in which something vanishes."""
    g = torch.Generator().manual_seed(3)
    codebook = torch.randn(16, 4, generator=g, dtype=dtype)
    log_p = torch.full((4, 16), -torch.inf, dtype=dtype)
    one, two, rare = log_p.clone(), log_p.clone(), log_p.clone()
    one[torch.arange(4), torch.tensor([0, 3, 9, 15])] = 0.0
    two[:, [2, 5]] = 0.0
    rare[:, [2, 5]] = torch.tensor([0.0, -40.0], dtype=dtype)
    flat = torch.zeros(4, 16, dtype=dtype)
    twins = codebook.clone()
    twins[5] = twins[2]
    near = codebook.clone()
    near[5] = near[2] + 1e-4
    return {
        "one token": (one, codebook),
        "two tokens": (two, codebook),
        "a very rare second token": (rare, codebook),
        "two equal codes": (two, twins),
        "two close codes": (two, near),
        "all codes equal": (flat, codebook[:1].repeat(16, 1)),
        "all codes zero": (flat, torch.zeros_like(codebook)),
        "tiny codes": (flat, 1e-6 * codebook),
        "large codes": (flat, 1e4 * codebook),
        "one code in the vocabulary": (torch.zeros(4, 1, dtype=dtype), codebook[:1]),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(degenerate_cases(torch.float32)))
def test_degenerate_distributions(case: str, dtype: torch.dtype) -> None:
    log_p, codebook = degenerate_cases(dtype)[case]
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(4), dtype=dtype)
    flow = CodebookFlow(log_p, codebook)
    assert all(bool(torch.isfinite(value).all()) for value in flow.moments())
    for r in (0.0, 1.0, 1e6, 1e12):
        mean, weights = flow.posterior(noise, r)
        assert bool(torch.isfinite(mean).all() and torch.isfinite(weights).all())
        assert bool((weights[log_p == -torch.inf] == 0).all())
    for name in ("adams", "exact"):
        result = make_solver(name).solve(flow, noise)
        assert bool(torch.isfinite(result.x).all())
        assert bool((log_p.gather(1, result.tokens[:, None]) > -torch.inf).all()), name
    if case == "one token":
        assert make_solver().solve(flow, noise).tokens.tolist() == [0, 3, 9, 15]


@pytest.mark.parametrize("name", ["adams", "exact"])
@pytest.mark.parametrize("p", [0.5, 0.2, 0.01])
def test_two_tokens_take_their_quantiles(name: str, p: float) -> None:
    """In one dimension the flow keeps the order of points: the second code takes the lowest share p of the noise."""
    a = torch.tensor([0.6, -0.2, 0.3], dtype=torch.float64)
    noise = torch.randn(300, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    log_p = torch.tensor([[1 - p, p]], dtype=torch.float64).log().expand(300, 2)
    tokens = make_solver(name).solve(CodebookFlow(log_p, torch.stack([a, -a]) + 1), noise).tokens
    quantile = torch.special.ndtr(noise @ a / a.norm())
    assert torch.equal(tokens, (quantile < p).long())


@pytest.mark.parametrize("name", ["adams", "exact"])
def test_two_tokens_split_space_by_a_plane(name: str) -> None:
    """By symmetry, two equally likely codes at +a and -a share the noise by the sign of noise.a."""
    a = torch.tensor([[0.3, -0.1, 0.2]])
    noise = torch.randn(500, 3, generator=torch.Generator().manual_seed(5))
    tokens = make_solver(name).solve(CodebookFlow(torch.zeros(500, 2), torch.cat([a, -a])), noise).tokens
    assert torch.equal(tokens, (noise @ a[0] < 0).long())


@pytest.mark.parametrize(
    ("log_p", "codebook", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), r"\(2, 3\) and \(4, 2\)"),
        (torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, 2, dtype=torch.float16), "float16"),
        (torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64), "float32 and torch.float64"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.zeros(2, 2), "row 1 .* overflow"),
        (torch.tensor([[0.0, math.inf]]), torch.zeros(2, 2), "row 0"),
        (torch.full((1, 2), -math.inf), torch.zeros(2, 2), "row 0"),
    ],
)
def test_bad_input_is_refused(log_p: Tensor, codebook: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CodebookFlow(log_p, codebook)


def test_bad_noise_is_refused() -> None:
    flow = CodebookFlow(torch.zeros(2, 3), torch.randn(3, 2))
    for noise in (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.float64), torch.full((2, 2), math.nan)):
        for name in ("adams", "dpmpp-3m", "exact"):
            with pytest.raises(UserError, match="noise"):
                make_solver(name).solve(flow, noise)
