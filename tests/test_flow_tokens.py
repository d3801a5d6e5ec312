"""The fused entry: what it combines, that chunks do not matter, and that memory stays bounded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow import CodebookFlow, LogitFilter, filter_logits, flow_tokens, make_solver
from ddfast.flow.tokens import rows_per_chunk

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
    got = flow_tokens(cond, uncond, noise, codebook, guidance=2.5, filter=KEEP, solver=make_solver())
    logits = uncond + 2.5 * (cond - uncond)
    want = make_solver().solve(CodebookFlow(filter_logits(logits, KEEP), codebook), noise).tokens
    assert got.dtype == torch.int64 and got.shape == (N,)
    assert int((got != want).sum()) <= 1
    assert bool(filter_logits(logits, KEEP).gather(1, got[:, None]).isfinite().all())


@pytest.mark.parametrize("name", ["adams", "dpmpp-3m-lower"])
def test_chunks_do_not_matter(name: str) -> None:
    cond, uncond, noise, codebook = (t[:60] if len(t) == N else t for t in inputs(torch.float64))
    tokens = [
        flow_tokens(
            cond, uncond, noise, codebook, guidance=1.5, filter=KEEP, solver=make_solver(name), chunk_bytes=chunk_bytes
        )
        for chunk_bytes in (1, 12 * 8 * V * 10, None)
    ]
    assert torch.equal(tokens[0], tokens[2]) and torch.equal(tokens[1], tokens[2])


def test_inputs_are_not_modified() -> None:
    given = inputs()
    before = [t.clone() for t in given]
    flow_tokens(*given, guidance=2.0, filter=KEEP, solver=make_solver())
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    cond, uncond, noise, codebook = inputs()
    options: dict[str, Any] = {"guidance": 2.0, "filter": KEEP, "solver": make_solver()}
    got = flow_tokens(cond.to(dtype), uncond.to(dtype), noise, codebook, **options)
    want = flow_tokens(cond.to(dtype).float(), uncond.to(dtype).float(), noise, codebook, **options)
    assert torch.equal(got, want)


def test_without_guidance() -> None:
    cond, _, noise, codebook = inputs()
    options: dict[str, Any] = {"filter": KEEP, "solver": make_solver()}
    alone = flow_tokens(cond, None, noise, codebook, guidance=1.0, **options)
    assert int((alone != flow_tokens(cond, cond, noise, codebook, guidance=3.0, **options)).sum()) <= 1
    empty = flow_tokens(cond[:0], None, noise[:0], codebook, guidance=1.0, **options)
    assert empty.shape == (0,)


def test_rows_per_chunk() -> None:
    assert rows_per_chunk(1000, torch.float32, 1) == 1
    assert rows_per_chunk(1000, torch.float32, 2**30) == 2 * rows_per_chunk(1000, torch.float64, 2**30) + 1
    with pytest.raises(UserError, match="chunk_bytes must be above 0, not 0"):
        rows_per_chunk(1000, torch.float32, 0)


_PEAK = """
import resource, torch
from ddfast.flow import LogitFilter, flow_tokens, make_solver
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cond, noise, codebook = torch.randn(6000, 4096), torch.randn(6000, 4), torch.randn(4096, 4)
def run(rows, chunk_bytes):
    flow_tokens(cond[:rows], None, noise[:rows], codebook, guidance=1.0, filter=LogitFilter(top_k=500, top_p=0.9),
                solver=make_solver("adams", 2), chunk_bytes=chunk_bytes)
run(2, 2**20)
before = peak()
run(6000, 16 * 2**20)
print((peak() - before) // 1024)
"""


def test_memory_is_bounded() -> None:
    """6,000 rows of 4,096 logits would need about 900 MiB at once; with 16 MiB chunks far less."""
    pytest.importorskip("resource")
    run = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(N, C + 1)}, r"noise must be \[203, 6\] .* not \[203, 7\]"),
        ({"codebook": torch.zeros(V + 1, C)}, "codebook must be"),
        ({"uncond": torch.zeros(N - 1, V)}, "uncond must be"),
        ({"cond": torch.zeros(2, 3, V)}, r"cond must be a floating matrix, not torch.float32 \[2, 3, 96\]"),
        ({"cond": torch.zeros(N, V, dtype=torch.int64)}, "cond must be a floating matrix"),
        ({"guidance": float("nan")}, "guidance must be a finite number, not nan"),
        ({"uncond": None}, "guidance=2.0 needs unconditional logits"),
        ({"cond": torch.full((N, V), float("nan"))}, "overflow"),
        ({"filter": LogitFilter(top_k=V + 1)}, "top_k=97 is larger than the vocabulary of 96"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    names = ("cond", "uncond", "noise", "codebook")
    arguments: dict[str, Any] = dict(zip(names, inputs(), strict=True))
    arguments |= {"guidance": 2.0, "filter": KEEP, "solver": make_solver()} | change
    with pytest.raises(UserError, match=message):
        flow_tokens(**arguments)
