"""The door of the fused operations: paths agree, arguments are checked, and each operation is one node of a graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from torch import Tensor

from ddfast import _library, _native, ops
from ddfast.errors import UserError
from ddfast.flow import LogitFilter, make_solver
from ddfast.noise import normal_noise

N, V, C = 61, 96, 6
KEEP = LogitFilter(temperature=0.9, top_k=30, top_p=0.9)
OPTIONS: dict[str, Any] = {"guidance": 2.0, "filter": KEEP, "solver": make_solver()}
CPU = torch.device("cpu")

paths = pytest.mark.parametrize("path", ["torch", *(["native"] if _native.available() else [])])
needs_native = pytest.mark.skipif(not _native.available(), reason="ddfast._C is not built")


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """cond, uncond, noise, codebook; the logits in ``dtype``."""
    g = torch.Generator().manual_seed(0)
    shapes = {"cond": (N, V), "uncond": (N, V), "noise": (N, C), "codebook": (V, C)}
    made = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    made |= {name: (2 * made[name]).to(dtype) for name in ("cond", "uncond")}
    return {name: tensor.to(device) for name, tensor in made.items()}


def agree(got: ops.FlowResult, want: ops.FlowResult) -> None:
    """The same tokens, evaluations and end points, but for a few rows that rounding sends another way."""
    assert [t.dtype for t in vars(got).values()] == [torch.int64, want.x.dtype, torch.int32]
    got, want = (ops.FlowResult(*(t.cpu() for t in vars(result).values())) for result in (got, want))
    same = got.evaluations == want.evaluations
    assert int((~same).sum()) <= 1 and int((got.tokens != want.tokens).sum()) <= 1
    same &= got.tokens == want.tokens
    torch.testing.assert_close(got.x[same], want.x[same], atol=1e-4, rtol=1e-4)


# Paths


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flow_is_the_same_on_every_path(path: ops.Backend, dtype: torch.dtype) -> None:
    given = inputs(dtype)
    with ops.forced("torch"):
        want = ops.flow(**(given | {name: given[name].double() for name in ("cond", "uncond")}), **OPTIONS)
    with ops.forced(path):
        got = ops.flow(**given, **OPTIONS)
        assert torch.equal(ops.flow_tokens(**given, **OPTIONS), got.tokens)
    assert got.x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    agree(got, ops.FlowResult(want.tokens, want.x.to(got.x.dtype), want.evaluations))


@paths
def test_flow_without_guidance_and_of_no_rows(path: ops.Backend) -> None:
    given = inputs()
    with ops.forced(path):
        alone = ops.flow(**(given | {"uncond": None}), **(OPTIONS | {"guidance": 1.0}))
        agree(alone, ops.flow(**(given | {"uncond": given["cond"]}), **OPTIONS))
        empty = {name: tensor if name == "codebook" else tensor[:0] for name, tensor in given.items()}
        result = ops.flow(**empty, **OPTIONS)
    assert [list(t.shape) for t in vars(result).values()] == [[0], [0, C], [0]]


@paths
@pytest.mark.parametrize("name", ["euler", "exact"])
def test_other_solvers_run_on_every_path(path: ops.Backend, name: str) -> None:
    solver = make_solver(name)
    with ops.forced(path):
        got = ops.flow(**inputs(), **(OPTIONS | {"solver": solver}))
    assert int((got.tokens != ops.flow_tokens(**inputs(), **OPTIONS)).sum()) < N / 4


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [KEEP, LogitFilter(top_k=200, top_p=0.4, rule="llamagen"), LogitFilter()])
def test_filter_logits_is_the_same_on_every_path(path: ops.Backend, dtype: torch.dtype, keep: LogitFilter) -> None:
    logits = inputs(dtype)["cond"][:60].view(6, 10, V).transpose(0, 1)
    with ops.forced("torch"):
        want = ops.filter_logits(logits, keep)
    with ops.forced(path):
        got = ops.filter_logits(logits, keep)
        assert ops.filter_logits(logits[:, :0], keep).shape == (10, 0, V)
        assert torch.equal(ops.filter_logits(logits[3, 2], keep), got[3, 2])
    assert got.dtype == dtype and torch.equal(got.isfinite(), want.isfinite())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@paths
@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_noise_is_the_same_on_every_path(path: ops.Backend, seed: int) -> None:
    pairs = torch.tensor([[3, 9], [2**40, 9]])[:, 0]
    with ops.forced(path):
        assert torch.equal(ops.normal_noise(seed, pairs, 2, 9, 5), normal_noise(seed, pairs, 2, 9, 5))


@paths
def test_strides_do_not_matter_and_inputs_are_not_modified(path: ops.Backend) -> None:
    given = inputs()
    strided = {name: tensor.t().contiguous().t() for name, tensor in given.items()}
    before = {name: tensor.clone() for name, tensor in given.items()}
    with ops.forced(path):
        want, got = ops.flow(**given, **OPTIONS), ops.flow(**strided, **OPTIONS)
        filtered = ops.filter_logits(strided["cond"], KEEP)
        assert torch.equal(filtered, ops.filter_logits(given["cond"], KEEP))
    assert filtered.is_contiguous() and got.x.is_contiguous()
    agree(got, want)
    assert all(torch.equal(given[name], before[name]) for name in given)


_INTERPRETED = """
import torch
from ddfast import ops
from ddfast.flow import LogitFilter, make_solver
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
cond, uncond, codebook, noise = (torch.randn(*shape, generator=g) for shape in ((4, 40), (4, 40), (40, 3), (4, 3)))
keep, solver = LogitFilter(top_k=10, top_p=0.9), make_solver("adams", 4)
def run(path):
    with ops.forced(path):
        result = ops.flow(cond.t().contiguous().t(), uncond, noise, codebook, guidance=2.0, filter=keep, solver=solver)
        filtered, nearest = ops.filter_logits(cond.view(2, 2, 40), keep), ops.nearest_code(noise.half(), codebook)
        return *vars(result).values(), filtered, nearest
for got, want in zip(run("triton"), run("torch")):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
"""


def test_triton_is_reached_through_the_door() -> None:
    if "triton" not in ops.backends(CPU, "flow"):
        pytest.skip("Triton is not installed")
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", _INTERPRETED], env=interpreted, check=True)


def test_the_best_path_is_taken_unless_one_is_forced() -> None:
    best = "native" if _native.available() else "torch"
    for operation in ("flow", "filter_logits", "nearest_code", "normal_noise"):
        assert ops.backend(CPU, operation) == ops.backends(CPU, operation)[0] == best
        with ops.forced("torch"):
            assert ops.backend(CPU, operation) == "torch"
        assert ops.backend(CPU, operation) == best
    with pytest.raises(RuntimeError, match="thrown"), ops.forced("torch"):
        raise RuntimeError("thrown")
    assert ops.backend(CPU, "flow") == best


def test_a_path_that_is_not_there_is_an_error() -> None:
    with ops.forced("triton"), pytest.raises(UserError, match="normal_noise has no path 'triton' for cpu tensors"):
        ops.normal_noise(0, torch.arange(2), 0, 1, 4)


@paths
def test_results_have_no_gradient(path: ops.Backend) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    with ops.forced(path):
        assert not ops.flow(**given, **OPTIONS).x.requires_grad
        assert not ops.filter_logits(given["cond"], KEEP).requires_grad


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(N, C + 1)}, r"noise must be \[61, 6\] .* not \[61, 7\]"),
        ({"codebook": torch.zeros(V + 1, C)}, "codebook must be"),
        ({"uncond": torch.zeros(N - 1, V)}, "uncond must be"),
        ({"uncond": torch.zeros(N, V, dtype=torch.bfloat16)}, "uncond is torch.bfloat16 but cond torch.float32"),
        ({"cond": torch.zeros(2, 3, V)}, r"cond must be a matrix of .*, not torch.float32 \[2, 3, 96\]"),
        ({"cond": torch.zeros(N, V, dtype=torch.int64)}, "cond must be a matrix of"),
        ({"noise": torch.zeros(N, C, device="meta")}, "noise is on meta but cond on cpu"),
        ({"guidance": float("nan")}, "guidance must be a finite number, not nan"),
        ({"uncond": None}, "guidance=2.0 needs unconditional logits"),
        ({"filter": LogitFilter(top_k=V + 1)}, "top_k=97 is larger than the vocabulary of 96"),
    ],
)
def test_flow_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    for operation in (ops.flow, ops.flow_tokens):
        with pytest.raises(UserError, match=message):
            operation(**(inputs() | OPTIONS | change))


@pytest.mark.parametrize(
    ("logits", "keep", "message"),
    [
        (
            torch.zeros(2, 4, dtype=torch.bfloat16),
            LogitFilter(),
            "logits must be float32 or float64, not torch.bfloat16",
        ),
        (torch.tensor(1.0), LogitFilter(), r"logits must be \[..., V\] with V > 0, not \[\]"),
        (torch.zeros(2, 0), LogitFilter(), r"not \[2, 0\]"),
        (torch.zeros(2, 4), LogitFilter(top_k=5), "top_k=5 is larger than the vocabulary of 4"),
    ],
)
def test_filter_logits_refuses_what_does_not_fit(logits: Tensor, keep: LogitFilter, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ops.filter_logits(logits, keep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, torch.arange(2), 0, 4, 8), "seed is -1"),
        ((2**64, torch.arange(2), 0, 4, 8), "seed is 18446744073709551616"),
        ((0, torch.zeros(2), 0, 4, 8), r"pairs must be int64 \[B\], not torch.float32 \[2\]"),
        ((0, torch.arange(2), 5, 4, 8), "positions 5..4"),
        ((0, torch.arange(2), 0, 2**32 + 1, 8), "positions 0..4294967297"),
        ((0, torch.arange(2), 0, 4, 0), "channels is 0"),
    ],
)
def test_normal_noise_refuses_what_does_not_fit(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ops.normal_noise(*arguments)


@paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("cond", 17, torch.nan, "row 17 of the guided logits has NaN"),
        ("uncond", 5, torch.inf, "row 5 of the guided logits"),
        ("cond", slice(9, None), -torch.inf, "row 9 of the guided logits"),
        ("noise", 60, torch.nan, "row 60 of noise"),
        ("noise", 0, -torch.inf, "row 0 of noise"),
    ],
)
def test_bad_rows_are_named(
    path: ops.Backend, dtype: torch.dtype, name: str, row: int | slice, value: float, message: str
) -> None:
    given = inputs(dtype)
    given[name][row] = value
    with ops.forced(path):
        with pytest.raises(UserError, match=message):
            ops.flow_tokens(**given, **OPTIONS)
        result = ops.flow(**given, **OPTIONS, check=False)
    bad = result.evaluations < 0
    assert torch.equal(bad.nonzero()[:, 0], torch.arange(N)[row].reshape(-1))
    assert (result.evaluations[bad] == (-2 if name == "noise" else -1)).all()
    assert (result.tokens[bad] == 0).all() and result.x[bad].isnan().all() and result.x[~bad].isfinite().all()


@paths
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e20])
def test_a_codebook_that_is_not_finite_is_refused(path: ops.Backend, value: float) -> None:
    given = inputs()
    given["codebook"][17, 2] = value
    with ops.forced(path), pytest.raises(UserError, match="codebook row 17 is not finite, or overflows"):
        ops.flow(**given, **OPTIONS)


# Graphs


def every_operation(cond: Tensor, uncond: Tensor, noise: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    result = ops.flow(cond, uncond, noise, codebook, **OPTIONS)
    drawn = ops.normal_noise(2**64 - 5, result.tokens, 0, 2, 4)
    return result.tokens, result.x, ops.nearest_code(result.x, codebook), ops.filter_logits(cond, KEEP), drawn


def nodes(graph: torch.fx.Graph) -> list[str]:
    return sorted(str(node.target) for node in graph.nodes if str(node.target).startswith(("ddfast", "aten")))


EACH_ONCE = [f"ddfast.{name}.default" for name in ("filter_logits", "flow", "nearest_code", "normal_noise")]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break_each_is_one_node(dynamic: bool) -> None:
    graphs: list[list[str]] = []

    def keep_graph(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(nodes(module.graph))
        return module.forward

    torch.compiler.reset()
    given = tuple(inputs().values())
    compiled = torch.compile(every_operation, fullgraph=True, backend=keep_graph, dynamic=dynamic)
    for got, want in zip(compiled(*given), every_operation(*given), strict=True):
        assert torch.equal(got, want)
    assert graphs == [EACH_ONCE]


def test_a_compiled_flow_follows_a_change_of_settings() -> None:
    def evaluations(solver: ops.Solver, keep: LogitFilter) -> Tensor:
        return ops.flow(**given, guidance=2.0, filter=keep, solver=solver).evaluations

    torch.compiler.reset()
    given = inputs()
    compiled = torch.compile(evaluations, fullgraph=True, backend="eager")
    for nfe, keep in ((10, KEEP), (4, KEEP), (4, LogitFilter(top_k=3)), (10, KEEP)):
        assert torch.equal(compiled(make_solver("adams", nfe), keep), evaluations(make_solver("adams", nfe), keep))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_free_number_of_rows_each_is_one_node(strict: bool) -> None:
    class Everything(torch.nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return every_operation(*given)

    given = tuple(inputs().values())
    rows = {0: torch.export.Dim("rows", min=2, max=1000)}
    shapes = {"given": (rows, rows, rows, None)}
    program = torch.export.export(Everything(), given, dynamic_shapes=shapes, strict=strict)
    assert [name for name in nodes(program.graph) if "sym_size" not in name] == EACH_ONCE
    fewer = (*(tensor[:7] for tensor in given[:3]), given[3])
    for got, want in zip(program.module()(*fewer), every_operation(*fewer), strict=True):
        assert torch.equal(got, want)


def operator_calls() -> list[Any]:
    given = inputs()
    logits, noise, codebook = given["cond"][:5], given["noise"][:5], given["codebook"]
    solver = _library.encode_solver(make_solver("adams", 4))
    settings = (1.0, 0.9, 20, None, "var", solver)
    operators = torch.ops.ddfast
    calls = [
        (operators.flow, (logits, logits, noise, codebook, *settings)),
        (operators.flow, (logits.double(), None, noise.t().contiguous().t(), codebook, *settings)),
        (operators.filter_logits, (logits.t(), 0.9, 3, 0.5, "llamagen")),
        (operators.nearest_code, (noise.view(5, 2, 3).transpose(0, 1), codebook[:, :3])),
        (operators.nearest_code, (noise.double(), codebook)),
        (operators.normal_noise, (-1, torch.arange(3), 2, 5, 7)),
    ]
    return [
        pytest.param(operator.default, arguments, id=f"{i}-{operator}") for i, (operator, arguments) in enumerate(calls)
    ]


@pytest.mark.parametrize(("operator", "arguments"), operator_calls())
@paths
def test_operators_are_what_they_were_registered_as(
    path: ops.Backend, operator: Any, arguments: tuple[Any, ...]
) -> None:
    with ops.forced(path):
        torch.library.opcheck(operator, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_flow_and_filter_on_a_gpu(dtype: torch.dtype) -> None:
    want = ops.flow(**inputs(dtype), **OPTIONS)
    kept = ops.filter_logits(inputs()["cond"], KEEP).isfinite()
    for path in ops.backends(torch.device("cuda"), "flow"):
        with ops.forced(path):
            agree(ops.flow(**inputs(dtype, "cuda"), **OPTIONS), want)
            assert torch.equal(ops.filter_logits(inputs(device="cuda")["cond"], KEEP).isfinite().cpu(), kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bad_rows_on_a_gpu() -> None:
    given = inputs(device="cuda")
    given["cond"][11, 3] = torch.nan
    with pytest.raises(UserError, match="row 11 of the guided logits"):
        ops.flow(**given, **OPTIONS)
    assert (ops.flow(**given, **OPTIONS, check=False).evaluations < 0).nonzero().tolist() == [[11]]
