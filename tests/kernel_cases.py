"""Problems for the Triton kernels, small enough for its interpreter; run as a script, it solves them there.

TRITON_INTERPRET is read when a kernel is defined, so the interpreter needs a process of its own:
``TRITON_INTERPRET=1 python kernel_cases.py results.pt slow`` for those of ``SLOW``, with ``fast`` for all others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.flow import LogitFilter, make_solver

POISON = -7


@dataclass(frozen=True)
class Case:
    """Random logits (on a grid of eighths, so that ties and equal rounding are exact), and what is done to them.

    fine: not on a grid. tiles: run by the kernel for tiles. real: with the block sizes of real problems.
    """

    vocab: int
    channels: int = 4
    keep: LogitFilter = LogitFilter()
    guidance: float | None = 1.5
    dtype: torch.dtype = torch.float32
    rows: int = 3  # of two programs, one has a second row
    spread: float = 2.0
    change: Callable[[dict[str, Tensor]], None] | None = None
    tiles: bool = False
    fine: bool = False
    real: bool = False

    def inputs(self) -> dict[str, Tensor]:
        """cond, uncond (absent without guidance), noise and codebook."""
        g = torch.Generator().manual_seed(self.vocab)
        names = ("cond",) if self.guidance is None else ("cond", "uncond")
        values = {name: self.spread * torch.randn(self.rows, self.vocab, generator=g) for name in names}
        values = {name: (v if self.fine else (8 * v).round() / 8).to(self.dtype) for name, v in values.items()}
        values["noise"] = torch.randn(self.rows, self.channels, generator=g)
        values["codebook"] = torch.randn(self.vocab, self.channels, generator=g)
        if self.change is not None:
            self.change(values)
        return values

    @property
    def solver(self) -> Any:
        """The default; without pruning for tiles, which do not prune."""
        return replace(make_solver(), prune=0.0) if self.tiles else make_solver()  # type: ignore[type-var]


def _impossible(values: dict[str, Tensor]) -> None:
    values["cond"][:, ::3] = -torch.inf
    values["uncond"][:, ::3] = -torch.inf
    values["cond"][:, 1] = -torch.inf


def _equal(values: dict[str, Tensor]) -> None:
    values["cond"][0] = 0.0
    values["uncond"][0] = 0.0
    values["cond"][1] = values["uncond"][1] = (torch.arange(values["cond"].shape[1]) % 3).to(values["cond"].dtype)


def _bad(values: dict[str, Tensor]) -> None:
    cond = values["cond"]
    cond[1, 5] = torch.nan
    cond[2, cond.shape[1] - 1] = torch.inf
    cond[3] = -torch.inf
    values["noise"][4, 1] = torch.inf
    values["noise"][5, 0] = torch.nan
    values["noise"][3, 0] = torch.nan  # both: the logits are named


def _peaked(values: dict[str, Tensor]) -> None:
    values["cond"][0, 7] += 30
    values["cond"][1, 2] += 12


def _duplicates(values: dict[str, Tensor]) -> None:
    values["codebook"][1::2] = values["codebook"][:-1:2][: len(values["codebook"][1::2])]


VAR, LLAMAGEN = LogitFilter(top_k=30, top_p=0.9), LogitFilter(0.7, 30, 0.8, "llamagen")
FLOW: dict[str, Case] = {
    "vocab between powers of two": Case(100, 5, VAR),
    "vocab a power of two": Case(128, 8, VAR),
    "no filter": Case(77, 3, guidance=None),
    "temperature": Case(70, 4, LogitFilter(temperature=1.3)),
    "llamagen": Case(60, 8, LLAMAGEN),
    "bfloat16": Case(90, 4, VAR, dtype=torch.bfloat16),
    "float16": Case(90, 4, LLAMAGEN, dtype=torch.float16),
    "one kept": Case(50, 4, LogitFilter(top_k=1)),
    "two kept": Case(51, 4, LogitFilter(top_k=2)),
    "all kept": Case(40, 4, LogitFilter(top_k=40, top_p=1.0)),
    "top-k above vocab": Case(41, 4, LogitFilter(top_k=1000, rule="llamagen")),
    "impossible tokens": Case(80, 4, VAR, change=_impossible),
    "ties": Case(64, 4, LogitFilter(top_k=20, top_p=0.5), change=_equal),
    "bad rows": Case(45, 4, VAR, rows=7, guidance=None, change=_bad),
    "peaked": Case(66, 4, LogitFilter(top_k=50), change=_peaked),
    "duplicate codes": Case(48, 4, change=_duplicates),
    "one code": Case(1, 3, guidance=None),
    "no rows": Case(30, 4, VAR, rows=0),
    "VAR": Case(4096, 32, LogitFilter(top_k=900, top_p=0.95), fine=True, real=True),
    "tiles": Case(77, 3, tiles=True, rows=18),
    "tiles, one temperature, bfloat16": Case(48, 8, LogitFilter(temperature=1.3), None, torch.bfloat16, tiles=True),
    "tiles, bad rows": Case(45, 4, rows=7, guidance=None, change=_bad, tiles=True),
    "tiles, impossible tokens": Case(50, 20, change=_impossible, tiles=True),
    "tiles, duplicate codes": Case(48, 4, change=_duplicates, tiles=True),
    "tiles, top-k": Case(77, 3, LogitFilter(top_k=30), tiles=True, rows=18),
    "tiles, top-p": Case(60, 8, LogitFilter(top_p=0.9), tiles=True),
    "tiles, VAR, bfloat16": Case(100, 5, VAR, dtype=torch.bfloat16, tiles=True),
    "tiles, llamagen, ties": Case(64, 4, LLAMAGEN, change=_equal, tiles=True),
    "tiles, bad rows, filtered": Case(45, 4, VAR, rows=7, guidance=None, change=_bad, tiles=True),
    "tiles, one kept": Case(50, 4, LogitFilter(top_k=1), tiles=True),
}
FILTERS: dict[str, LogitFilter] = {
    "off": LogitFilter(),
    "temperature": LogitFilter(temperature=0.7),
    "top-k": LogitFilter(top_k=9),
    "top-k 1": LogitFilter(top_k=1),
    "all": LogitFilter(top_k=70, top_p=1.0),
    "var": LogitFilter(1.1, 30, 0.9),
    "var, top-p alone": LogitFilter(top_p=0.51),
    "var, tiny top-p": LogitFilter(top_p=1e-9),
    "llamagen": LogitFilter(0.9, 30, 0.6, "llamagen"),
    "llamagen, top-p 0": LogitFilter(top_p=0.0, rule="llamagen"),
    "llamagen, top-k above vocab": LogitFilter(1e-9, 500, 0.7, "llamagen"),
}
SLOW = {
    *("vocab a power of two", "no filter", "temperature", "float16", "all kept", "top-k above vocab", "peaked"),
    *("duplicate codes", "tiles, duplicate codes", "tiles, top-k", "tiles, top-p", "tiles, VAR, bfloat16"),
    *("tiles, llamagen, ties", "all", "var, top-p alone", "var, tiny top-p", "llamagen, top-p 0"),
    "llamagen, top-k above vocab",
}
"""Cases that take the interpreter long, and whose kind another covers."""


def filter_inputs() -> Tensor:
    """[8, 70] float32: random, on a grid, all equal, two equal leaders, -inf, one finite, signed zeros, far apart."""
    g = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(8, 70, generator=g)
    logits[1] = logits[1].round()
    logits[2] = 0.25
    logits[3, 10] = logits[3, 60] = 20.0
    logits[4, ::2] = -torch.inf
    logits[5] = -torch.inf
    logits[5, 33] = -2.0
    logits[6] = torch.where(torch.arange(70) % 2 == 0, 0.0, -0.0)
    logits[7] *= 1e4
    return logits


def nearest_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """x and codebook by name; values on a grid, so that ties are exact."""
    g = torch.Generator().manual_seed(4)

    def grid(*shape: int) -> Tensor:
        return (4 * torch.randn(shape, generator=g)).round() / 4

    tied = grid(40, 3)
    tied[20:] = tied[:20]
    nan = grid(3, 4)
    nan[1, 2] = torch.nan
    return {
        "odd sizes": (grid(70, 5), grid(77, 5)),
        "bfloat16": (grid(9, 8).bfloat16(), grid(64, 8)),
        "float16, wide": (grid(5, 20).half(), grid(33, 20)),
        "ties": (grid(30, 3), tied),
        "one code": (grid(4, 4), grid(1, 4)),
        "NaN": (nan, grid(10, 4)),
        "no rows": (grid(0, 4), grid(10, 4)),
    }


def run_flow(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """tokens, x and evaluations of the kernel."""
    from ddfast.kernels import configs
    from ddfast.kernels.flow import flow_adams

    values = {name: value.to(device) for name, value in case.inputs().items()}
    tokens = torch.full((case.rows,), POISON, device=device)
    x = torch.full((case.rows, case.channels), torch.nan, device=device)
    evaluations = torch.full((case.rows,), POISON, dtype=torch.int32, device=device)
    tiny = configs.TilesConfig(16, 16, 4, 1) if case.tiles else configs.RowsConfig(1, 2, 16, 32)
    guided = (values["cond"], values.get("uncond"), values["noise"], values["codebook"], case.guidance or 1.0)
    flow_adams(*guided, case.keep, case.solver, tokens, x, evaluations, None if case.real else tiny)
    return tokens, x, evaluations


def run_filter(name: str, device: str = "cpu") -> Tensor:
    """The filtered logits of the kernel."""
    from ddfast.kernels import configs
    from ddfast.kernels.filters import filter_rows

    logits = filter_inputs().to(device)
    out = torch.full_like(logits, torch.nan)
    filter_rows(logits, FILTERS[name], out, configs.FilterConfig(1, 2, 32))
    return out


def run_nearest(name: str, device: str = "cpu") -> Tensor:
    """The indices the kernel finds."""
    from ddfast.kernels import configs
    from ddfast.kernels.nearest import nearest_code

    x, codebook = (tensor.to(device) for tensor in nearest_inputs()[name])
    out = torch.full((len(x),), POISON, device=device)
    nearest_code(x, codebook, out, configs.TilesConfig(16, 16, 4, 1))
    return out


def solve(slow: bool) -> dict[str, dict[str, Any]]:
    """What the kernels make of the slow cases, or of all others."""
    return {
        "flow": {name: run_flow(case) for name, case in FLOW.items() if (name in SLOW) == slow},
        "filter": {name: run_filter(name) for name in FILTERS if (name in SLOW) == slow},
        "nearest": {name: run_nearest(name) for name in nearest_inputs() if (name in SLOW) == slow},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(solve(sys.argv[2] == "slow"), Path(sys.argv[1]))
