"""The fused entry: what it combines, that chunks do not matter, and that memory stays bounded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from torch import Tensor

from ddfast import ops
from ddfast.errors import UserError
from ddfast.flow import CodebookFlow, LogitFilter, filter_logits, make_solver
from ddfast.flow.tokens import BAD_LOGITS, BAD_NOISE, guide, rows_per_chunk, solve_rows

N, V, C = 203, 96, 6
KEEP = LogitFilter(top_k=30, top_p=0.9)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cond, uncond, noise, codebook."""
    g = torch.Generator().manual_seed(0)
    shapes = ((N, V), (N, V), (N, C), (V, C))
    cond, uncond, noise, codebook = (torch.randn(*shape, generator=g).to(dtype) for shape in shapes)
    return 2 * cond, 2 * uncond, noise, codebook


def test_is_the_parts_put_together() -> None:
    cond, uncond, noise, codebook = inputs()
    got = solve_rows(cond, uncond, noise, codebook, guidance=2.5, filter=KEEP, solver=make_solver())
    logits = uncond + 2.5 * (cond - uncond)
    want = make_solver().solve(CodebookFlow(filter_logits(logits, KEEP), codebook), noise)
    assert got.tokens.dtype == torch.int64 and got.tokens.shape == (N,)
    assert int((got.tokens != want.tokens).sum()) <= 1
    assert int((got.evaluations != want.evaluations).sum()) <= 1
    assert bool(filter_logits(logits, KEEP).gather(1, got.tokens[:, None]).isfinite().all())


def test_guidance() -> None:
    inf = torch.inf
    cond, uncond = torch.tensor([[1.0, -inf, -inf, 0.1]]), torch.tensor([[3.0, -inf, 2.0, 0.1]])
    assert guide(cond, uncond, 2.0).tolist() == [[-1.0, -inf, -inf, cond[0, 3].item()]]
    assert guide(cond, None, 1.0).data_ptr() == cond.data_ptr()
    exact = (uncond.double() + 1.7 * (cond.double() - uncond.double()))[0, 0]
    assert guide(cond, uncond, 1.7)[0, 0] == exact.float()
    assert guide(cond.double(), uncond.double(), 1.7)[0, 0] == exact


def test_rows_that_cannot_be_solved_are_marked_and_leave_the_others_alone() -> None:
    cond, uncond, noise, codebook = (t.clone() for t in inputs())
    options: dict[str, Any] = {"guidance": 2.0, "filter": KEEP, "solver": make_solver()}
    good = solve_rows(cond, uncond, noise, codebook, **options)
    cond[3, 5], cond[50], noise[7, 1] = torch.nan, -torch.inf, torch.inf
    uncond[50] = -torch.inf
    got = solve_rows(cond, uncond, noise, codebook, chunk_bytes=14 * 4 * V * 20, **options)
    bad = [3, 7, 50]
    assert got.evaluations[bad].tolist() == [BAD_LOGITS, BAD_NOISE, BAD_LOGITS]
    assert got.tokens[bad].tolist() == [0, 0, 0] and bool(got.x[bad].isnan().all())
    rest = torch.ones(N, dtype=torch.bool).index_fill(0, torch.tensor(bad), False)
    assert torch.equal(got.tokens[rest], good.tokens[rest])
    with pytest.raises(UserError, match="row 3 of the guided logits"):
        ops.flow_tokens(cond, uncond, noise, codebook, **options)
    with pytest.raises(UserError, match="row 0 of noise has NaN or infinite"):
        ops.flow_tokens(cond[7:8], uncond[7:8], noise[7:8], codebook, **options)


@pytest.mark.parametrize("name", ["adams", "dpmpp-3m-lower"])
def test_chunks_do_not_matter(name: str) -> None:
    cond, uncond, noise, codebook = (t[:60] if len(t) == N else t for t in inputs(torch.float64))
    tokens = [
        solve_rows(
            cond, uncond, noise, codebook, guidance=1.5, filter=KEEP, solver=make_solver(name), chunk_bytes=chunk_bytes
        ).tokens
        for chunk_bytes in (1, 14 * 8 * V * 10, None)
    ]
    assert torch.equal(tokens[0], tokens[2]) and torch.equal(tokens[1], tokens[2])


def test_inputs_are_not_modified() -> None:
    cond, _, noise, codebook = given = inputs()
    cond[3, 5] = torch.nan
    before = [t.clone() for t in given]
    for path in ops.backends(cond.device, "flow")[:2]:
        with ops.forced(path):
            ops.flow(*given, guidance=2.0, filter=KEEP, solver=make_solver(), check=False)
            ops.flow(cond, None, noise, codebook, guidance=1.0, filter=KEEP, solver=make_solver(), check=False)
    for now, then in zip(given, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    cond, uncond, noise, codebook = inputs()
    options: dict[str, Any] = {"guidance": 2.0, "filter": KEEP, "solver": make_solver()}
    got = ops.flow_tokens(cond.to(dtype), uncond.to(dtype), noise, codebook, **options)
    want = ops.flow_tokens(cond.to(dtype).float(), uncond.to(dtype).float(), noise, codebook, **options)
    assert torch.equal(got, want)


def test_without_guidance() -> None:
    cond, _, noise, codebook = inputs()
    options: dict[str, Any] = {"filter": KEEP, "solver": make_solver()}
    alone = ops.flow_tokens(cond, None, noise, codebook, guidance=1.0, **options)
    assert int((alone != ops.flow_tokens(cond, cond, noise, codebook, guidance=3.0, **options)).sum()) <= 1
    empty = ops.flow_tokens(cond[:0], None, noise[:0], codebook, guidance=1.0, **options)
    assert empty.shape == (0,)


def test_rows_per_chunk() -> None:
    assert rows_per_chunk(1000, torch.float32, 1) == 1
    assert rows_per_chunk(1000, torch.float32, 2**30) == 2 * rows_per_chunk(1000, torch.float64, 2**30) + 1
    with pytest.raises(UserError, match="chunk_bytes must be above 0, not 0"):
        rows_per_chunk(1000, torch.float32, 0)


_PEAK = """
import resource, sys, torch
from ddfast import ops
from ddfast.flow import LogitFilter, make_solver
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cond, noise, codebook = torch.randn(6000, 4096), torch.randn(6000, 4), torch.randn(4096, 4)
def run(rows):
    ops.flow_tokens(cond[:rows], None, noise[:rows], codebook, guidance=1.0, filter=LogitFilter(top_k=500, top_p=0.9),
                    solver=make_solver("adams", 2))
with ops.forced(sys.argv[1]):
    run(2)
    before = peak()
    run(6000)
print((peak() - before) // 1024)
"""


@pytest.mark.parametrize("path", ["native", "torch"])
def test_memory_is_bounded(path: str) -> None:
    """6,000 rows of 4,096 logits would need about 900 MiB at once."""
    pytest.importorskip("resource")
    if path not in ops.backends(torch.device("cpu"), "flow"):
        pytest.skip(f"no {path} path here")
    run = subprocess.run([sys.executable, "-c", _PEAK, path], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(N, C + 1)}, r"noise must be \[203, 6\] .* not \[203, 7\]"),
        ({"codebook": torch.zeros(V + 1, C)}, "codebook must be"),
        ({"uncond": torch.zeros(N - 1, V)}, "uncond must be"),
        ({"cond": torch.zeros(2, 3, V)}, r"cond must be a matrix of .*, not torch.float32 \[2, 3, 96\]"),
        ({"cond": torch.zeros(N, V, dtype=torch.int64)}, "cond must be a matrix"),
        ({"guidance": float("nan")}, "guidance must be a finite number, not nan"),
        ({"uncond": None}, "guidance=2.0 needs unconditional logits"),
        ({"cond": torch.full((N, V), float("nan"))}, "row 0 of the guided logits .* overflow"),
        ({"uncond": torch.zeros(N, V, dtype=torch.bfloat16)}, "uncond is torch.bfloat16 but cond torch.float32"),
        ({"filter": LogitFilter(top_k=V + 1)}, "top_k=97 is larger than the vocabulary of 96"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    names = ("cond", "uncond", "noise", "codebook")
    arguments: dict[str, Any] = dict(zip(names, inputs(), strict=True))
    arguments |= {"guidance": 2.0, "filter": KEEP, "solver": make_solver()} | change
    with pytest.raises(UserError, match=message):
        ops.flow_tokens(**arguments)
