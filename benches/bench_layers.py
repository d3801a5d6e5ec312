"""The fused operations between a transformer's matrix products, on the CPU: time a call, beside plain torch.

The sizes of VAR-d16's last scale (batch 4, guided) and of a LlamaGen-B step (batch 16, guided, its cache half full),
on all cores, each call on cold caches. "Plain torch" is the twin of ddfast/layers.py, or scaled_dot_product_attention
on the filled part of the cache. Beside it stands the time of a copy of as many bytes or of the bare arithmetic in
bfloat16, whichever is longer, measured in the same run; what works in place can take less than a copy.

    python benches/bench_layers.py      # half a minute on two cores
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, finish, hardware
from gpu_cases import (
    Arguments,
    Case,
    Clock,
    append_normed_case,
    append_rotated_case,
    decode_case,
    layer_case,
    measure_case,
    measure_ceilings,
    norm_case,
    normal,
    quantizer_case,
    rms_case,
    swiglu_case,
)

from ddfast import _native
from ddfast.kv_cache import KVCache

CPU = torch.device("cpu")


def cache_of(rows: int, heads: int, positions: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A layer's keys and values, laid out as the engine does on a CPU."""
    cache = KVCache(1, rows, heads, positions, width, dtype, CPU).layers(rows)[0]
    return cache.normal_(generator=torch.Generator().manual_seed(2))


def attention_case(rows: int, n: int, keys: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    """VAR's attention of a scale to all that the cache holds."""

    def make(rows: int) -> Arguments:
        k, v = cache_of(rows, heads, keys, width, dtype).unbind(0)
        qkv = normal(rows, n, 3, heads, width, dtype=dtype)
        out = torch.full((rows, n, heads, width), torch.nan, dtype=dtype)
        return {"q": qkv[:, :, 0], "k": k, "v": v, "scale": 1.0, "out": out}

    moved = 2.0 * dtype.itemsize * rows * heads * width * (n + keys)
    size = f"[{rows}, {n}, {heads}, {width}] to {keys} {str(dtype).removeprefix('torch.')}"
    return layer_case("attention", size, make, rows, moved, 4.0 * rows * heads * n * keys * width)


def cases(scale: int = 1) -> Iterator[Case]:
    """All operations; ``scale`` divides the batch and the width, for tests."""
    half, rows, heads = torch.bfloat16, 8 // scale, 16 // scale
    yield norm_case(rows, 256, 64 * heads, half)
    yield append_normed_case(rows, 256, heads, 64, 424, half)
    yield attention_case(rows, 256, 680, heads, 64, half)
    yield attention_case(rows, 256, 680, heads, 64, torch.float32)
    yield quantizer_case(rows // 2, 169, 16, 32, 256)
    rows, heads = 32 // scale, 12 // scale
    yield rms_case(rows, 64 * heads, half)
    yield append_rotated_case(rows, heads, 64, 256, half)
    yield decode_case(rows, heads, 64, 256, 127, half, cache_of)
    yield decode_case(rows, heads, 64, 256, 127, torch.float32, cache_of)
    yield swiglu_case(rows, 2048 // scale, half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "layers-cpu.json")
    args = parser.parse_args()
    clock = Clock(CPU, flush_megabytes=64)
    ceilings = measure_ceilings(clock, megabytes=256, size=2048)
    rows: list[dict[str, Any]] = []
    for case in cases():
        rows.append(measure_case(case, clock, ceilings))
        us, plain, bare = rows[-1]["us"]["fused"]["p50"], rows[-1]["times_plain"], rows[-1]["times_ceiling"]
        print(f"{case.name:55} {us:9.1f} us, plain torch takes {plain:6.1f} times as long, bare {1 / bare:6.2f}")
    peaks = {"copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9, "bf16_gflop_per_s": ceilings.bf16_flop_per_s / 1e9}
    level = _native.cpu_levels()[0]
    finish({"bench": "layers", "hardware": hardware(), "level": level, "peaks": peaks, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
