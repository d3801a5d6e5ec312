"""The Triton kernels against their torch twins: tiny problems in Triton's interpreter, real ones on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import kernel_cases as cases
import numpy as np
import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from kernel_cases import FILTERS, FLOW, SLOW, Case
from torch import Tensor

from ddfast.flow import LogitFilter, filter_logits
from ddfast.flow.nearest import nearest_code
from ddfast.flow.tokens import guide, solve_rows

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=[gpu, needs_gpu])])
def solved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels make of all cases."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "cuda":
        return {
            "flow": Asked(lambda name: cases.run_flow(FLOW[name], "cuda")),
            "filter": Asked(lambda name: cases.run_filter(name, "cuda")),
            "nearest": Asked(lambda name: cases.run_nearest(name, "cuda")),
        }
    if _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 fails with NumPy 2.4")
    folder = tmp_path_factory.mktemp("interpreter")

    @cache
    def interpreted(which: str) -> Any:
        command = [sys.executable, str(Path(cases.__file__)), str(folder / which), which]
        run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return torch.load(folder / which)

    def result(kind: str, name: str) -> Any:
        return interpreted("slow" if name in SLOW else "fast")[kind][name]

    return {kind: Asked(partial(result, kind)) for kind in ("flow", "filter", "nearest")}


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


class Asked(dict[str, Any]):
    """Results by the name of a case, each made when it is asked for: to make all would take minutes."""

    def __init__(self, run: Callable[[str], Any]) -> None:
        super().__init__()
        self._run = run

    def __missing__(self, name: str) -> Any:
        made = self._run(name)
        self[name] = tuple(part.cpu() for part in made) if isinstance(made, tuple) else made.cpu()
        return self[name]


def twin(case: Case, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, x and evaluations by torch in float64, from guided logits rounded to float32."""
    logits = guide(values["cond"], values.get("uncond"), case.guidance or 1.0)
    numbers = (values["noise"].double(), values["codebook"].double())
    result = solve_rows(logits.double(), None, *numbers, guidance=1.0, filter=case.keep, solver=case.solver)
    return result.tokens, result.x, result.evaluations


def named(names: Iterable[str]) -> Any:
    """A test of each; some are slow."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]
    return pytest.mark.parametrize("name", marked)


@named(FLOW)
def test_flow(solved: dict[str, Any], name: str) -> None:
    tokens, x, evaluations = solved["flow"][name]
    want_tokens, want_x, want_evaluations = twin(FLOW[name], FLOW[name].inputs())
    assert evaluations.tolist() == want_evaluations.tolist()
    assert tokens.tolist() == want_tokens.tolist()
    torch.testing.assert_close(x, want_x.float(), rtol=1e-3, atol=2e-4, equal_nan=True)


def test_flow_names_bad_rows(solved: dict[str, Any]) -> None:
    for name in ("bad rows", "tiles, bad rows", "tiles, bad rows, filtered"):
        tokens, x, evaluations = solved["flow"][name]
        assert (evaluations < 0).tolist() == [False, True, True, True, True, True, False]
        assert evaluations[1:6].tolist() == [-1, -1, -1, -2, -2]
        assert tokens[1:6].tolist() == [0] * 5 and bool(x[1:6].isnan().all())


@named(FILTERS)
def test_filter(solved: dict[str, Any], name: str) -> None:
    got = solved["filter"][name]
    want = filter_logits(cases.filter_inputs().double(), FILTERS[name])
    assert torch.equal(got > -torch.inf, want > -torch.inf)
    assert torch.equal(got, filter_logits(cases.filter_inputs(), FILTERS[name]))


@pytest.mark.parametrize("name", cases.nearest_inputs())
def test_nearest(solved: dict[str, Any], name: str) -> None:
    x, codebook = cases.nearest_inputs()[name]
    assert solved["nearest"][name].tolist() == nearest_code(x.double(), codebook.double()).tolist()


_MATHS = """
import torch, triton, triton.language as tl
from ddfast.kernels import maths
@triton.jit
def kernel(x, y, z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, maths.log_normal_cdf(tl.load(x + i)))
    tl.store(z + i, maths.expm1(tl.abs(tl.load(x + i)).to(tl.float32)))
x = torch.cat([torch.linspace(-40, 40, 448), torch.logspace(-8, 4, 32), -torch.logspace(-8, 4, 32)]).double()
y, z = torch.empty_like(x), torch.empty(512)
kernel[(1,)](x, y, z, 512)
want = torch.special.log_ndtr(x)
print(float(((y - want).abs() / want.abs().clamp_min(1)).max()))
want = torch.expm1(x.abs().float())
print(float(((z - want).abs() / want)[(want > 0) & want.isfinite()].max()))
"""


@needs_triton
def test_maths(tmp_path: Path) -> None:
    """The source of a jitted function must lie in a file, so this one is written to one."""
    script = tmp_path / "maths.py"
    script.write_text(_MATHS)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    log_cdf, expm1 = map(float, run.stdout.split())
    assert log_cdf < 3e-8 and expm1 < 1e-6


REAL = {
    "VAR bf16": Case(4096, 32, LogitFilter(top_k=900, top_p=0.95), dtype=torch.bfloat16, rows=1000),
    "VAR fp32": Case(4096, 32, LogitFilter(top_k=900, top_p=0.95), rows=1000, fine=True),
    "LlamaGen": Case(16384, 8, LogitFilter(rule="llamagen"), rows=300, fine=True),
    "LlamaGen top-k 2000": Case(16384, 8, LogitFilter(top_k=2000, rule="llamagen"), rows=300, fine=True),
    "LlamaGen top-k 8000": Case(16384, 8, LogitFilter(top_k=8000, rule="llamagen"), rows=300, fine=True),
    "LlamaGen tiles": Case(16384, 8, LogitFilter(rule="llamagen"), rows=4200, fine=True, tiles=True),
    "VAR tiles": Case(4096, 32, LogitFilter(top_k=900, top_p=0.95), rows=1000, fine=True, tiles=True),
}


def _launch(case: Case, values: dict[str, Tensor], out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Run the flow with the configuration of the GPU, or by tiles."""
    from ddfast.kernels import configs
    from ddfast.kernels.flow import flow_adams

    guided = (values["cond"], values.get("uncond"), values["noise"], values["codebook"], case.guidance or 1.0)
    tiles = configs.default_tiles(case.channels) if case.tiles else None
    flow_adams(*guided, case.keep, case.solver, *out, config=tiles)


def _outputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.full((case.rows,), cases.POISON, device="cuda")
    x = torch.full((case.rows, case.channels), torch.nan, device="cuda")
    return tokens, x, torch.full((case.rows,), cases.POISON, dtype=torch.int32, device="cuda")


@gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("name", REAL)
def test_flow_at_real_size(name: str) -> None:
    """Tokens as in float64 but for a few near ties; twice the same bits."""
    case = REAL[name]
    values = {key: value.cuda() for key, value in case.inputs().items()}
    first, second = _outputs(case), _outputs(case)
    _launch(case, values, first)
    _launch(case, values, second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    part = {key: value if key == "codebook" else value[:300] for key, value in values.items()}
    tokens, x, evaluations = twin(case, part)
    assert int((first[0][:300] != tokens).sum()) <= 1
    assert int((first[2][:300] != evaluations).sum()) <= 3
    close = ((first[1][:300] - x).abs() < 1e-3).all(dim=1)
    assert int((~close).sum()) <= 3


@gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("name", ["VAR fp32", "LlamaGen tiles", "VAR tiles"])
def test_cuda_graph(name: str) -> None:
    """A captured call follows what its inputs hold when it is replayed."""
    case = REAL[name]
    values = {key: value.cuda() for key, value in case.inputs().items()}
    out = _outputs(case)
    _launch(case, values, out)  # compiles, and copies the solver's tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _launch(case, values, out)
    values["cond"].copy_(values["cond"].flip(0))
    values["noise"].mul_(-1)
    for tensor in out:
        tensor.fill_(cases.POISON)
    graph.replay()
    want = _outputs(case)
    _launch(case, values, want)
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


@gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("vocab", [4096, 16384, 5000])
@pytest.mark.parametrize("rule", ["var", "llamagen"])
def test_filter_at_real_size(vocab: int, rule: str) -> None:
    from ddfast.kernels.filters import filter_rows

    logits = 3 * torch.randn(500, vocab, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    out = torch.full_like(logits, torch.nan)
    keep = LogitFilter(top_k=900, top_p=0.95, rule=rule)
    filter_rows(logits, keep, out)
    want = filter_logits(logits.double(), keep)
    assert int(((out > -torch.inf) != (want > -torch.inf)).sum()) <= 2  # float32 masses at the cut
    both = (out > -torch.inf) & (want > -torch.inf)
    assert torch.equal(out[both], logits[both])


@gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("shape", [(4096, 32), (16384, 8), (1000, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_at_real_size(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The distance found is the smallest, up to float32 rounding."""
    from ddfast.kernels import nearest

    g = torch.Generator("cuda").manual_seed(0)
    codebook = torch.randn(shape, generator=g, device="cuda")
    x = torch.randn(2000, shape[1], generator=g, device="cuda").to(dtype)
    out = torch.full((2000,), cases.POISON, device="cuda")
    nearest.nearest_code(x, codebook, out)
    distance = torch.cdist(x.double(), codebook.double())
    best = distance.amin(dim=1)
    assert bool((distance.gather(1, out[:, None])[:, 0] <= best * (1 + 1e-5)).all())
    assert float((out == distance.argmin(dim=1)).double().mean()) > 0.998


def test_defaults_are_the_configurations_without_records() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from ddfast.kernels import configs

    keep = LogitFilter(top_k=900)
    assert configs.flow_config("no such GPU", 4096, 32, keep, 100) == configs.default_flow(4096, 32, True, 100)
    assert isinstance(configs.flow_config("no such GPU", 16384, 8, LogitFilter(), 10_000), configs.TilesConfig)
    assert isinstance(configs.flow_config("no such GPU", 16384, 8, keep, 10_000), configs.RowsConfig)


def test_the_record_of_the_nearest_number_of_rows_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    import json

    from ddfast.kernels import configs

    problem = configs.Problem("a GPU", "flow", 64, 8, True)
    known = {100: configs.RowsConfig(1, 1, 16, 32), 10_000: configs.RowsConfig(2, 1, 16, 64)}
    records = [configs.as_record(problem, rows, config) for rows, config in known.items()]
    monkeypatch.setattr(configs, "RECORDS", tmp_path / "configs.json")
    configs.RECORDS.write_text(json.dumps(records))
    configs._records.cache_clear()
    try:
        for rows, measured in ((1, 100), (900, 100), (1100, 10_000), (10**6, 10_000)):
            assert configs.flow_config("a GPU", 64, 8, LogitFilter(top_k=5), rows) == known[measured]
        assert configs.flow_config("a GPU", 64, 4, LogitFilter(top_k=5), 9) == configs.default_flow(64, 4, True, 9)
    finally:
        configs._records.cache_clear()


def test_the_recorded_file_is_readable() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from ddfast.kernels import configs

    assert all(rows > 0 for records in configs._records().values() for rows, _ in records)


def test_rows_too_long_are_refused() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from ddfast.errors import UserError
    from ddfast.kernels import configs

    with pytest.raises(UserError, match="at most 131072 logits a row, not 200000"):
        configs.default_filter(200_000)


def test_the_package_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import ddfast.kernels; import ddfast.ops"
    subprocess.run([sys.executable, "-c", code], check=True)
