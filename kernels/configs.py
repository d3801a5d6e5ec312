"""Which block sizes a kernel runs with: recorded per GPU in ``configs.json``, never searched for at run time.

A record names the GPU, the operation ("flow", "filter", "nearest"), vocab and channels (0 for "filter"), for "flow"
whether top-k or top-p is on, the number of rows it was measured with, and the config; ``tune.tune`` makes one. A
problem takes the record of its GPU and shape with the nearest number of rows, on a log scale. Without one it takes the
defaults below, which were chosen so that nothing spills, not by measurement.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from ddfast.errors import UserError
from ddfast.flow.filters import LogitFilter

RECORDS = Path(__file__).with_name("configs.json")
_LARGEST_BLOCK = 2**17  # a row of logits is one block in registers
_SMALL_TILES_VOCAB = 8192


@dataclass(frozen=True)
class RowsConfig:
    """Of ``flow.flow_kernel``: warps, programs a processor, entries at a time with and without their codes.

    max_registers: a limit a thread, beyond which values spill to memory; None is none.
    """

    num_warps: int
    per_sm: int
    block_k: int
    block_l: int
    max_registers: int | None = None


@dataclass(frozen=True)
class FilterConfig:
    """Of ``filters.filter_kernel``: warps and programs a processor, list entries at a time."""

    num_warps: int
    per_sm: int
    block_l: int


@dataclass(frozen=True)
class TilesConfig:
    """Of ``flow_tiles.tiles_kernel`` and ``nearest.nearest_kernel``: rows and codebook entries of a tile."""

    block_n: int
    block_v: int
    num_warps: int
    num_stages: int


Config = RowsConfig | FilterConfig | TilesConfig
_KINDS: dict[str, type[Config]] = {"rows": RowsConfig, "filter": FilterConfig, "tiles": TilesConfig}


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for, but for the number of rows."""

    gpu: str
    operation: str
    vocab: int
    channels: int = 0
    filtered: bool = False


def flow_config(gpu: str, vocab: int, channels: int, filter: LogitFilter, rows: int) -> RowsConfig | TilesConfig:  # noqa: A002
    """How the flow runs: row by row, or by tiles of rows."""
    filtered = filter.top_k > 0 or filter.cuts_mass
    config = _recorded(Problem(gpu, "flow", vocab, channels, filtered), rows) or default_flow(
        vocab, channels, filtered, rows
    )
    assert isinstance(config, RowsConfig | TilesConfig)
    return config


def filter_config(gpu: str, vocab: int, rows: int) -> FilterConfig:
    """How the filter runs."""
    config = _recorded(Problem(gpu, "filter", vocab), rows) or default_filter(vocab)
    assert isinstance(config, FilterConfig)
    return config


def nearest_config(gpu: str, vocab: int, channels: int, rows: int) -> TilesConfig:
    """How the search for the nearest code runs."""
    config = _recorded(Problem(gpu, "nearest", vocab, channels), rows) or default_nearest(channels)
    assert isinstance(config, TilesConfig)
    return config


def default_flow(vocab: int, channels: int, filtered: bool, rows: int) -> RowsConfig | TilesConfig:
    """Tiles for an unfiltered, large, narrow codebook once there are enough rows to fill a GPU with them."""
    if not filtered and vocab >= _SMALL_TILES_VOCAB and channels <= 16 and rows >= 4096:
        return default_tiles(channels)
    warps = min(8, _row_warps(vocab))
    block_k = max(16, min(128, 1024 * warps // triton.next_power_of_2(channels)))
    return RowsConfig(num_warps=warps, per_sm=max(1, 8 // warps), block_k=block_k, block_l=min(256, 64 * warps))


def default_tiles(channels: int) -> TilesConfig:
    """Tiles of the flow, fewer rows where codes are wide."""
    wide = channels > 16
    return TilesConfig(block_n=16 if wide else 32, block_v=64 if wide else 32, num_warps=4, num_stages=2)


def default_filter(vocab: int) -> FilterConfig:
    """As many warps as keep a row in registers."""
    warps = _row_warps(vocab)
    return FilterConfig(num_warps=warps, per_sm=max(1, 16 // warps), block_l=32 * warps)


def default_nearest(channels: int) -> TilesConfig:
    """Tiles of 64 x 64, narrower where the codes are wide."""
    wide = channels > 64
    return TilesConfig(block_n=32 if wide else 64, block_v=32 if wide else 64, num_warps=4, num_stages=2)


def _row_warps(vocab: int) -> int:
    """Warps such that each thread holds at most 32 entries of a row, or as few as 16 warps allow."""
    block = triton.next_power_of_2(vocab)
    if block > _LARGEST_BLOCK:
        raise UserError(f"the Triton kernels take at most {_LARGEST_BLOCK} logits a row, not {vocab}: force torch")
    return min(16, max(1, block // 1024))


def _recorded(problem: Problem, rows: int) -> Config | None:
    """The recorded configuration measured nearest to ``rows`` rows, if there is one."""
    records = _records().get(problem)
    if not records:
        return None
    return min(records, key=lambda record: (abs(math.log(record[0] / rows)), record[0]))[1]


@lru_cache(maxsize=1)
def _records() -> dict[Problem, list[tuple[int, Config]]]:
    """``configs.json`` by problem: rows and configuration."""
    found: dict[Problem, list[tuple[int, Config]]] = {}
    for record in json.loads(RECORDS.read_text()):
        key = Problem(**{name: record[name] for name in ("gpu", "operation", "vocab", "channels", "filtered")})
        config = _KINDS[record["kernel"]](**record["config"])
        found.setdefault(key, []).append((record["rows"], config))
    return found


def as_record(problem: Problem, rows: int, config: Config) -> dict[str, Any]:
    """An entry of ``configs.json``."""
    kernel = next(name for name, kind in _KINDS.items() if isinstance(config, kind))
    return {**asdict(problem), "rows": rows, "kernel": kernel, "config": asdict(config)}


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """The name under which a device's configurations are recorded."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where only the interpreter runs these kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
