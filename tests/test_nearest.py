"""The nearest code, on every path and every instruction set, against distances in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ddfast import _native, ops
from ddfast.errors import UserError
from ddfast.flow import nearest as twin

needs_native = pytest.mark.skipif(not _native.available(), reason="ddfast._C is not built")
Nearest = Callable[[Tensor, Tensor], Tensor]


def native(x: Tensor, codebook: Tensor) -> Tensor:
    """The compiled loop, into a buffer of values that are no index, fenced on both sides."""
    buffer = torch.full((len(x) + 8,), -7)
    _native.nearest_code(x, codebook, buffer[4:-4])
    assert (buffer[:4] == -7).all() and (buffer[-4:] == -7).all()
    return buffer[4:-4]


@pytest.fixture(params=[*_native.cpu_levels(), "torch"])
def nearest(request: pytest.FixtureRequest) -> Iterator[Nearest]:
    """Each instruction set's loop, then the twin."""
    if request.param == "torch":
        yield twin.nearest_code
    else:
        with _native.cpu_level(request.param), _native.poisoned():
            yield native


def random(n: int, v: int, c: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=g), torch.randn(v, c, generator=g)


def check_nearest(got: Tensor, x: Tensor, codebook: Tensor, slack: float = 1e-5) -> None:
    """Each choice is as near as the nearest, up to the rounding of float32 scores."""
    assert got.dtype == torch.int64 and got.shape == x.shape[:-1]
    distances = (x.double().unsqueeze(-2) - codebook.double()).square().sum(-1)
    excess = distances.gather(-1, got.unsqueeze(-1)).squeeze(-1) - distances.amin(-1)
    assert float(excess.max()) <= slack * float(distances.amin(-1).max() + codebook.double().square().sum(-1).max())
    assert float((got != distances.argmin(-1)).double().mean()) < 0.01


@pytest.mark.parametrize("channels", [1, 3, 8, 32])
@pytest.mark.parametrize("vocab", [1, 2, 15, 64, 65, 127, 1000])
def test_odd_sizes(nearest: Nearest, vocab: int, channels: int) -> None:
    x, codebook = random(53, vocab, channels, seed=vocab)
    check_nearest(nearest(x, codebook), x, codebook)


@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 47, 48, 49, 200])
def test_every_row_is_written_and_no_other(nearest: Nearest, rows: int) -> None:
    x, codebook = random(rows, 70, 4)
    if rows:
        check_nearest(nearest(x, codebook), x, codebook)
    else:
        assert nearest(x, codebook).shape == (0,)


def test_real_sizes(nearest: Nearest) -> None:
    for vocab, channels in ((4096, 32), (16384, 8)):
        x, codebook = random(100, vocab, channels)
        check_nearest(nearest(x, codebook), x, codebook)


def test_ties_go_to_the_lowest_index(nearest: Nearest) -> None:
    """Codes on a grid, twice: x in the middle of two is as far from both, and integers lose nothing in rounding."""
    codebook = torch.arange(100.0).repeat(2)[:, None] * torch.tensor([1.0, -2.0])
    x = torch.arange(99.0)[:, None] * torch.tensor([1.0, -2.0])
    assert nearest(x, codebook).tolist() == list(range(99))
    assert nearest(x + torch.tensor([0.5, -1.0]), codebook).tolist() == list(range(99))
    assert nearest(x, codebook.flip(0)).tolist() == [99 - i for i in range(99)]


def test_nan_gives_index_0_and_spoils_no_other_row(nearest: Nearest) -> None:
    x, codebook = random(20, 90, 5)
    clean = nearest(x, codebook)
    x[7, 2] = torch.nan
    assert nearest(x, codebook).tolist() == [0 if i == 7 else int(t) for i, t in enumerate(clean)]


def test_negative_scores_beat_the_filling_of_the_last_panel(nearest: Nearest) -> None:
    """Codes far away have scores far below 0, the score of a code of zeros."""
    codebook = torch.full((3, 2), 1e3) + torch.arange(3.0)[:, None]
    assert nearest(torch.zeros(9, 2), codebook).tolist() == [0] * 9


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    x, codebook = random(1001, 300, 8)
    want = twin.nearest_code(x.double(), codebook.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native(x, codebook), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", ops.backends(torch.device("cpu"), "nearest_code")[: 1 + _native.available()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_door_takes_any_shape_strides_and_dtype(path: ops.Backend, dtype: torch.dtype) -> None:
    x, codebook = random(60, 50, 6)
    x = x.to(dtype).view(6, 5, 2, 6).transpose(0, 2)
    with ops.forced(path):
        got = ops.nearest_code(x, codebook.t().contiguous().t())
        assert ops.nearest_code(x[0, 0, 0], codebook).shape == ()
        assert ops.nearest_code(x[:0], codebook).shape == (0, 5, 6)
        assert torch.equal(ops.nearest_code(x, codebook.half()), ops.nearest_code(x, codebook.half().double()))
    check_nearest(got, x, codebook)


_PEAK = """
import resource, sys, torch
from ddfast import ops
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
x, codebook = torch.randn(20000, 4), torch.randn(4096, 4)
with ops.forced(sys.argv[1]):
    ops.nearest_code(x[:2], codebook)
    before = peak()
    ops.nearest_code(x, codebook)
print((peak() - before) // 1024)
"""


@pytest.mark.parametrize("path", ops.backends(torch.device("cpu"), "nearest_code")[: 1 + _native.available()])
def test_memory_is_bounded(path: ops.Backend) -> None:
    """20,000 x 4,096 scores would take 312 MiB at once."""
    pytest.importorskip("resource")
    run = subprocess.run([sys.executable, "-c", _PEAK, path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64


@pytest.mark.parametrize(
    ("x", "codebook", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), r"x must be \[..., C\] .* not \[2, 3\] and \[5, 4\]"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "V, C > 0"),
        (torch.zeros(2, 3), torch.zeros(3), "codebook"),
        (torch.tensor(1.0), torch.zeros(3, 1), "x must be"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 3), "x must be floating, not torch.int64"),
        (torch.zeros(2, 3), torch.zeros(5, 3, dtype=torch.int64), "codebook must be floating"),
        (torch.zeros(2, 3), torch.zeros(5, 3, device="meta"), "x is on cpu but codebook on meta"),
    ],
)
def test_bad_input_is_refused(x: Tensor, codebook: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ops.nearest_code(x, codebook)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("vocab", "channels"), [(4096, 32), (16384, 8), (65, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu(vocab: int, channels: int, dtype: torch.dtype) -> None:
    x, codebook = random(777, vocab, channels)
    x = x.to(dtype)
    for path in ops.backends(torch.device("cuda"), "nearest_code"):
        with ops.forced(path):
            check_nearest(ops.nearest_code(x.cuda(), codebook.cuda()).cpu(), x, codebook)
