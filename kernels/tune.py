"""Measure configurations on the GPU at hand. What is found goes to ``configs.json``; nothing here runs by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from ddfast.errors import UserError
from ddfast.flow import LogitFilter, make_solver
from ddfast.flow.multistep import AdamsSolver

from . import configs
from .filters import filter_rows
from .flow import flow_adams
from .nearest import nearest_code

Run = Callable[[Any], None]


def tune(
    operation: Literal["flow", "filter", "nearest"],
    device: torch.device,
    *,
    rows: int,
    vocab: int,
    channels: int = 0,
    filter: LogitFilter | None = None,  # noqa: A002 - the field's word
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The fastest of some dozens of configurations for a problem of random logits (a minute or two).

    rows, vocab, channels: N, V and C (0 for "filter"). filter: of "flow" and "filter"; None filters nothing. dtype: of
    the logits (guided for "flow") or of x.

    Returns what to record: an entry of ``configs.json``, and "microseconds", the median time of a call with it.
    """
    keep = filter or LogitFilter()
    run, candidates = _problem(operation, device, rows, vocab, channels, keep, dtype)
    timed = [(time, config) for config in candidates if (time := _time(run, config)) is not None]
    if not timed:
        raise UserError(f"no configuration of {operation} runs on {configs.device_name(device)} for V={vocab}")
    best, config = min(timed, key=lambda pair: pair[0])
    filtered = operation == "flow" and (keep.top_k > 0 or keep.cuts_mass)
    problem = configs.Problem(configs.device_name(device), operation, vocab, channels, filtered)
    return {**configs.as_record(problem, rows, config), "microseconds": round(1000 * best, 1)}


def _problem(
    operation: str,
    device: torch.device,
    rows: int,
    vocab: int,
    channels: int,
    keep: LogitFilter,
    dtype: torch.dtype,
) -> tuple[Run, list[configs.Config]]:
    """A call of the operation with a given configuration, and the configurations to try."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    if operation == "filter":
        logits, filtered = normal(rows, vocab, dtype=dtype), torch.empty(rows, vocab, device=device)
        return lambda config: filter_rows(logits, keep, filtered, config), list(_filter_candidates())
    tokens, codebook = torch.empty(rows, dtype=torch.int64, device=device), normal(vocab, channels)
    if operation == "nearest":
        points = normal(rows, channels, dtype=dtype)
        return lambda config: nearest_code(points, codebook, tokens, config), list(_tiles_candidates(stages=(1, 2, 3)))
    cond, uncond = (3 * normal(rows, vocab, dtype=dtype) for _ in range(2))
    noise, x = normal(rows, channels), torch.empty(rows, channels, device=device)
    evaluations, solver = torch.empty(rows, dtype=torch.int32, device=device), make_solver()
    assert isinstance(solver, AdamsSolver)
    found: list[configs.Config] = [*_rows_candidates(vocab, channels), *_tiles_candidates(stages=(2,))]
    return lambda config: flow_adams(
        cond, uncond, noise, codebook, 1.5, keep, solver, tokens, x, evaluations, config
    ), found


def _rows_candidates(vocab: int, channels: int) -> Iterator[configs.RowsConfig]:
    least = min(8, configs.default_filter(vocab).num_warps)
    # Few, since each takes seconds to compile: codes at a time by the entries they fill, list entries by warps.
    sizes = product((least, 2 * least), (1024, 2048, 4096), (32, 64), (None, 128))
    for warps, entries, block_l, registers in sizes:
        block_k = max(16, entries // triton.next_power_of_2(channels))
        fit = 65536 // ((registers or 224) * 32 * warps)  # programs whose registers a processor can hold
        yield configs.RowsConfig(warps, max(1, fit), block_k, block_l * warps, registers)


def _filter_candidates() -> Iterator[configs.FilterConfig]:
    for warps, per_sm, block_l in product((4, 8, 16), (1, 2, 4, 6), (32, 64, 128)):
        if warps * per_sm <= 32:
            yield configs.FilterConfig(warps, per_sm, block_l * warps)


def _tiles_candidates(stages: tuple[int, ...]) -> Iterator[configs.TilesConfig]:
    for block_n, block_v, warps, depth in product((16, 32, 64, 128), (32, 64, 128), (4, 8), stages):
        if block_n * block_v <= 8192:
            yield configs.TilesConfig(block_n, block_v, warps, depth)


def _time(run: Run, config: configs.Config) -> float | None:
    """Milliseconds of a call; None if the configuration does not fit the GPU."""
    try:
        return float(triton.testing.do_bench(lambda: run(config), return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return None
