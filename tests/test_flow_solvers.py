"""Solvers by what they are for: the exact flow's token, the right frequencies, a setting that can be written down."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from problems import FAMILIES, Family, Problem, draw
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow import (
    DEFAULT_NFE,
    DEFAULT_SOLVER,
    SOLVERS,
    CodebookFlow,
    FlowResult,
    LogitFilter,
    filter_logits,
    make_solver,
    solver_from_dict,
)
from ddfast.flow.dpm import DPMSolver
from ddfast.flow.multistep import AdamsSolver, _integral_weights, adams_tables
from ddfast.flow.reference import ExactSolver
from ddfast.flow.schedules import adams_knots, time_knots
from ddfast.flow.solver import ActiveRows

REFERENCE = ExactSolver(rtol=1e-5, certain=1e-5)  # against rtol 1e-7, not one token in 3,000 differs


@pytest.mark.parametrize(
    ("name", "seed", "bar"),
    [
        ("var-0.3", 1, 0.99),
        ("var-0.5", 2, 0.99),
        ("var-1.0", 3, 0.99),
        ("var-geo", 4, 0.99),
        pytest.param("llama-iid", 5, 0.99, marks=pytest.mark.slow),
        pytest.param("llama-geo", 6, 0.99, marks=pytest.mark.slow),
        pytest.param("llama-k2000", 7, 0.99, marks=pytest.mark.slow),
        ("var-sharp", 8, 0.99),
        ("llama-sharp", 9, 0.99),
    ],
)
def test_default_solver_agrees_with_the_exact_flow(name: str, seed: int, bar: float) -> None:
    (problem,) = draw(FAMILIES[name], 200, seed, chunk=200)
    flow = CodebookFlow(problem.log_p, problem.codebook)
    want = REFERENCE.solve(flow, problem.noise).tokens
    got = make_solver().solve(flow, problem.noise)
    assert (got.tokens == want).double().mean() >= bar
    assert got.nfe < 10


def test_more_evaluations_agree_more_often() -> None:
    family = Family(512, 8, 0.0, 0.3, LogitFilter(rule="llamagen"), (5.0, 400.0))
    (problem,) = draw(family, 2000, 1, chunk=2000)
    flow = CodebookFlow(problem.log_p, problem.codebook)
    want = REFERENCE.solve(flow, problem.noise).tokens
    share = [
        float((make_solver("adams", n).solve(flow, problem.noise).tokens == want).double().mean())
        for n in (2, 4, 8, 20)
    ]
    assert share == sorted(share) and share[0] > 0.8 and share[-1] > 0.998


def test_float32_agrees_with_float64() -> None:
    (problem,) = draw(FAMILIES["small"], 2000, 2, chunk=2000)
    single = make_solver().solve(CodebookFlow(problem.log_p, problem.codebook), problem.noise)
    double = make_solver().solve(
        CodebookFlow(problem.log_p.double(), problem.codebook.double()), problem.noise.double()
    )
    assert (single.tokens == double.tokens).double().mean() >= 0.999
    assert single.x.dtype == torch.float32 and double.x.dtype == torch.float64


SHORTCUTS = {"certain": 0.0, "pair": 0.0, "prune": 0.0}


@cache
def at_length() -> tuple[Problem, FlowResult]:
    """20,000 small problems and what the default solver makes of them when it takes no shortcut."""
    (problem,) = draw(FAMILIES["small"], 20_000, 3, chunk=20_000)
    solver: Any = make_solver()
    return problem, replace(solver, **SHORTCUTS).solve(CodebookFlow(problem.log_p, problem.codebook), problem.noise)


def test_stopping_early_changes_nothing_that_matters() -> None:
    (problem, late), solver = at_length(), make_solver()
    assert isinstance(solver, AdamsSolver)
    early = solver.solve(CodebookFlow(problem.log_p, problem.codebook), problem.noise)
    assert (early.tokens != late.tokens).double().mean() <= 1e-3
    assert late.nfe > 0.99 * len(solver.knots) and early.nfe < 0.6 * late.nfe


@pytest.mark.parametrize("name", ["certain", "pair", "prune"])
def test_each_shortcut_saves_and_costs_next_to_nothing(name: str) -> None:
    (problem, full), solver = at_length(), make_solver()
    alone = replace(solver, **SHORTCUTS | {name: getattr(solver, name)})
    short = alone.solve(CodebookFlow(problem.log_p, problem.codebook), problem.noise)
    assert (short.tokens != full.tokens).double().mean() <= 1e-3
    assert name == "prune" or short.nfe < 0.8 * full.nfe


def test_pruned_entries_are_those_that_hardly_weigh() -> None:
    """What is let go together has at most its share of the weight, and what stays an equal part of it or more each."""
    (problem,) = draw(FAMILIES["small"], 200, 8, chunk=200)
    flow = CodebookFlow(problem.log_p, problem.codebook)
    active = ActiveRows(flow, problem.noise)
    p, share = flow.log_p.exp(), torch.linspace(0.0, 0.2, 200)
    left = active.prune(p, share)
    kept = active._flow.log_p > -torch.inf
    assert torch.equal(left, kept.sum(1)) and bool(kept[0].all()) and bool((left < kept.shape[1])[-50:].any())
    assert bool(((p * ~kept).sum(1) <= share).all())
    assert bool((p.masked_fill(~kept, torch.inf).amin(1) * kept.shape[1] >= share).all())


def _problem(vocab: int, channels: int, keep: LogitFilter, seed: int) -> tuple[Tensor, Tensor]:
    """One distribution p [V] (float64, zeros where filtered) and a codebook [V, C]."""
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(1, vocab, generator=g)
    return filter_logits(logits, keep).double().softmax(1)[0], 0.5 * torch.randn(vocab, channels, generator=g)


@pytest.mark.parametrize(
    ("vocab", "channels", "keep"),
    [
        (16, 4, LogitFilter(rule="llamagen")),
        (64, 8, LogitFilter(rule="llamagen", top_k=40)),
        pytest.param(512, 16, LogitFilter(top_k=112, top_p=0.95), marks=pytest.mark.slow),
    ],
)
def test_frequencies_match_p(vocab: int, channels: int, keep: LogitFilter) -> None:
    """Total variation of 200,000 tokens against p, in units of what 200,000 perfect draws would show."""
    p, codebook = _problem(vocab, channels, keep, seed=vocab)
    total, chunk = 200_000, 2000
    noise = torch.randn(total, channels, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(vocab, dtype=torch.int64)
    for part in noise.split(chunk):
        flow = CodebookFlow(p.log().float().expand(chunk, -1), codebook)
        counts += torch.bincount(make_solver().solve(flow, part).tokens, minlength=vocab)
    assert int(counts[p == 0].sum()) == 0
    draws = np.random.default_rng(0).multinomial(total, p.numpy(), size=300) / total
    floor = float(np.abs(draws - p.numpy()).sum(axis=1).mean() / 2)
    assert float((counts / total - p).abs().sum() / 2) <= 1.2 * floor


def test_peaked_distributions_draw_from_their_tail() -> None:
    """Where one token has 0.9 to 0.999 of the mass, the others still come up as often as the exact flow has them."""
    g = torch.Generator().manual_seed(4)
    n, vocab = 6000, 64
    codebook, tail = torch.randn(vocab, 8, generator=g), torch.randn(n, vocab, generator=g).softmax(1)
    rest = 10 ** -(1 + 2 * torch.rand(n, 1, generator=g))
    p = rest * tail
    p[:, 5] += 1 - rest[:, 0]
    noise = torch.randn(n, 8, generator=g)
    flow = CodebookFlow(p.log(), codebook)
    want, got = REFERENCE.solve(flow, noise).tokens, make_solver().solve(flow, noise).tokens
    assert int((want != 5).sum()) > 100
    assert (want != got).sum() <= 0.03 * (want != 5).sum()


def test_adams_tables_reach_back_no_further_than_there_is_history() -> None:
    solver = AdamsSolver((0.2, 0.5, 0.9), predictor=2, corrector=3)
    predict, correct = (torch.tensor(table) for table in adams_tables(solver))
    assert predict.shape == correct.shape == (3, 3)
    assert (predict != 0).tolist() == [[True, False, False], [True, True, False], [True, True, False]]
    assert (correct != 0).tolist() == [[True, True, False], [True, True, True], [True, True, True]]
    steps = torch.tensor([0.0, *solver.knots]).add(solver.offset).log().diff()
    torch.testing.assert_close(predict.sum(1), steps)  # a constant slope is integrated exactly
    torch.testing.assert_close(correct.sum(1), steps)


def test_adams_weights_integrate_polynomials() -> None:
    nodes = [0.4, 0.1, -0.3, -0.9]
    weights = _integral_weights(nodes, 0.1, 0.7)
    for power in range(4):
        got = sum(w * x**power for w, x in zip(weights, nodes, strict=True))
        assert got == pytest.approx((0.7 ** (power + 1) - 0.1 ** (power + 1)) / (power + 1))


def test_a_gaussian_codebook_costs_nothing() -> None:
    """One code: D is constant, the preconditioned slope vanishes, and every solver ends exactly on it."""
    codebook, noise = torch.tensor([[0.5, -1.0]]), torch.randn(3, 2, generator=torch.Generator().manual_seed(6))
    x = list(DPMSolver(20, t_start=0.0, t_end=0.9).states(CodebookFlow(torch.zeros(3, 1), codebook), noise))[-1]
    torch.testing.assert_close(x, 0.1 * noise + 0.9 * codebook.expand(3, 2))
    result = make_solver("adams", 2).solve(CodebookFlow(torch.zeros(3, 1), codebook), noise)
    assert result.tokens.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", list(SOLVERS))
def test_settings_survive_json(name: str) -> None:
    solver = make_solver(name)
    values = solver.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert solver_from_dict(json.loads(json.dumps(values))) == solver
    assert hash(solver) == hash(make_solver(name))
    assert solver.kind in solver.describe()


def test_defaults_exist() -> None:
    assert make_solver() == make_solver(DEFAULT_SOLVER, DEFAULT_NFE[DEFAULT_SOLVER])
    assert make_solver("adams", 9) != make_solver("adams", 10)
    assert set(DEFAULT_NFE) == set(SOLVERS) - {"exact"}


@pytest.mark.parametrize(
    ("name", "seed"), [("var-geo", 11), ("small", 13), pytest.param("llama-k2000", 12, marks=pytest.mark.slow)]
)
def test_precise_setting_agrees_on_every_problem_here(name: str, seed: int) -> None:
    (problem,) = draw(FAMILIES[name], 200, seed, chunk=200)
    flow = CodebookFlow(problem.log_p, problem.codebook)
    got = make_solver("precise").solve(flow, problem.noise)
    assert int((got.tokens != REFERENCE.solve(flow, problem.noise).tokens).sum()) == 0
    assert got.nfe < 25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_solver("ddim", 10), "solver 'ddim' does not exist: use one of adams, precise, dpmpp-3m"),
        (lambda: make_solver("adams", 1), "'adams' takes a whole number of evaluations from 2 to 64, not 1"),
        (lambda: make_solver("dpmpp-3m", 2), "'dpmpp-3m' takes .* from 3"),
        (lambda: make_solver("euler", True), "not True"),
        (lambda: make_solver("exact", 10), "leave nfe=10 out"),
        (lambda: DPMSolver(10, order=4), "order must be 1, 2 or 3, not 4"),
        (lambda: DPMSolver(10, skip="quadratic"), "skip 'quadratic' does not exist: use one of time_uniform, logSNR"),
        (lambda: DPMSolver(10, skip="logSNR", t_start=0.0), "t_start = 0"),
        (lambda: DPMSolver(10, t_end=1.0), "t_start < t_end < 1"),
        (
            lambda: DPMSolver(10, lower_order_end="yes"),
            "lower_order_end must be one of never, short, always, not 'yes'",
        ),
        (lambda: AdamsSolver(()), "knots"),
        (lambda: AdamsSolver((0.5, 0.4)), "ascending"),
        (lambda: AdamsSolver((0.5,), offset=0.0), "offset must be above 0"),
        (lambda: AdamsSolver((0.5,), predictor=7), "1-6"),
        (lambda: AdamsSolver((0.5,), pair=0.5), r"pair must lie in \[0, 0.5\), not 0.5"),
        (lambda: AdamsSolver((0.5,), prune=-1.0), r"prune must lie in \[0, 0.5\), not -1.0"),
        (lambda: ExactSolver(rtol=0.0), r"rtol must lie in \[1e-12, 1e-2\], not 0.0"),
        (lambda: ExactSolver(r_max=0.5), "r_max"),
        (lambda: solver_from_dict({"kind": "adams"}), "no solver is described"),
        (lambda: solver_from_dict({"kind": "magic"}), "kinds are adams, dpm, exact"),
    ],
)
def test_bad_settings_name_value_and_fix(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_exact_state_refuses_t_outside_the_flow() -> None:
    with pytest.raises(UserError, match="t must lie"):
        ExactSolver().state(CodebookFlow(torch.zeros(1, 2), torch.eye(2)), torch.zeros(1, 2), 1.0)


@pytest.mark.parametrize("nfe", [2, 3, 10, 64])
def test_knots(nfe: int) -> None:
    knots = adams_knots(nfe)
    steps = np.diff([0.0, *knots])
    assert len(knots) == nfe and (steps > 0).all() and steps[0] == steps.min()
    times = time_knots("time_uniform", 0.0, 0.99, nfe)
    assert times[0] == 0.0 and times[-1] == pytest.approx(0.99) and len(times) == nfe + 1


def test_problems_do_not_depend_on_how_many_are_drawn() -> None:
    few, many = (torch.cat([p.log_p for p in draw(FAMILIES["small"], n, 7, chunk=50)]) for n in (60, 100))
    assert torch.equal(few, many[:60])
    perplexity = torch.special.entr(many.softmax(1)).sum(1).exp()
    low, high = FAMILIES["small"].perplexity
    assert bool((perplexity > low * 0.99).all() and (perplexity < high * 1.01).all())
