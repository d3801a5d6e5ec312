"""DPM-Solver++ against the states and tokens that the public code computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_helpers import golden_flow, one_thread  # noqa: F401 - a fixture

from ddfast.flow import CodebookFlow, make_solver
from ddfast.flow.dpm import DPMSolver

BAR = 31 / 32  # share of tokens that must equal the exact flow's


def variant_solver(variant: dict[str, Any]) -> DPMSolver:
    """The solver of one stored run; the public code counts s = 1 - t, from noise to data."""
    assert (variant["algorithm_type"], variant["method"], variant["solver_type"]) == (
        "dpmsolver++",
        "multistep",
        "dpmsolver",
    )
    return DPMSolver(
        nfe=variant["steps"] + variant["denoise_to_zero"],
        order=variant["order"],
        skip=variant["skip_type"],
        t_start=1 - variant["s_start"],
        t_end=1 - variant["s_end"],
        lower_order_end="short" if variant["lower_order_final"] else "never",
        denoise=variant["denoise_to_zero"],
    )


@pytest.mark.golden("dpm_solver_*")
def test_public_runs_are_reproduced(golden: Any) -> None:
    flow, noise = golden_flow(golden)
    for variant in golden.config["variants"]:
        name, solver = f"out.{variant['name']}", variant_solver(variant)
        golden.close(1 - torch.tensor(solver.times(), dtype=torch.float64), f"{name}.timesteps")
        states = torch.stack(list(solver.states(flow, noise)))
        if f"{name}.states" in golden:
            golden.close(states, f"{name}.states")
        if f"{name}.x" in golden:
            golden.close(states[-1], f"{name}.x")
        tokens = flow.nearest(states[-1])
        assert torch.equal(tokens, golden[f"{name}.idx"])
        agreeing = int((tokens == golden["out.ref.idx"]).sum())
        assert agreeing == golden.config["tokens_equal_to_reference"][variant["name"]]  # the overshoot included


@pytest.mark.golden("dpm_solver_*")
def test_named_setting_is_the_paper_s(golden: Any) -> None:
    flow, noise = golden_flow(golden)
    for variant in golden.config["variants"]:
        usual = {"order": 3, "skip_type": "time_uniform", "s_start": 0.999, "s_end": 0.001, "denoise_to_zero": False}
        if usual.items() <= variant.items():
            result = make_solver("dpmpp-3m", variant["steps"]).solve(flow, noise)
            assert torch.equal(result.tokens, golden[f"out.{variant['name']}.idx"])
            assert result.nfe == variant["steps"]


@pytest.mark.golden("dpm_solver_*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_solver_gives_the_exact_token(golden: Any, dtype: torch.dtype) -> None:
    flow = CodebookFlow(golden["in.p"].log().to(dtype), golden["in.codebook"].to(dtype))
    result = make_solver().solve(flow, golden["in.noise"].to(dtype))
    assert (result.tokens == golden["out.ref.idx"]).double().mean() >= BAR
    assert result.nfe <= 10


@pytest.mark.golden("dpm_solver_*")
def test_exact_solver(golden: Any) -> None:
    flow, noise = golden_flow(golden)
    solver = make_solver("exact")
    robust = golden["out.ref.robust"].bool()
    assert torch.equal(solver.solve(flow, noise).tokens[robust], golden["out.ref.idx"][robust])
    for t, x in list(zip(golden["out.ref.t"].tolist(), golden["out.ref.states"], strict=True))[::2]:
        torch.testing.assert_close(solver.state(flow, noise, t), x, rtol=1e-7, atol=1e-7)
