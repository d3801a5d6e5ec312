"""Normals a second: the compiled Philox noise on one thread and on all, its torch twin, and torch.randn, in one run.

    python benches/bench_noise.py [--pairs 256] [--out benches/results/noise-cpu.json]

The buffer is [pairs, 680, 32] float32, the noise of VAR pairs. ``fill_`` of it is the ceiling of any generator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _common import RESULTS, finish, hardware, measure

from ddfast import _native
from ddfast.noise import normal_noise

POSITIONS, CHANNELS = 680, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256, help="batch of pairs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "noise-cpu.json", help="JSON file (default %(default)s)")
    args = parser.parse_args()
    if not _native.available():
        parser.error("ddfast._C is not built: pip install -e .")

    threads = torch.get_num_threads()
    pairs = torch.arange(args.pairs)
    out = torch.empty(args.pairs, POSITIONS, CHANNELS)
    few = pairs[: max(1, args.pairs // 16)]  # the twin is slow, and its rate does not depend on the batch

    def native() -> None:
        _native.normal_noise(0, pairs, 0, POSITIONS, CHANNELS, out)

    def rate(name: str, run: Callable[[], object], threads: int, numel: int) -> dict[str, float | int | str]:
        torch.set_num_threads(threads)
        time = measure(run)
        row = {"name": name, "threads": threads, "normals_per_s": numel / time["median_s"]}
        row |= {"gb_per_s": 4 * numel / time["median_s"] / 1e9} | time
        print(f"{name:22} {threads:3} threads {numel / time['median_s'] / 1e6:9.1f} M/s {row['gb_per_s']:7.2f} GB/s")
        return row

    rows = []
    for count in sorted({1, threads}):
        for level in _native.cpu_levels():
            with _native.cpu_level(level):
                rows.append(rate(f"C++ {level}", native, count, out.numel()))
        twin_numel = few.numel() * POSITIONS * CHANNELS
        rows.append(rate("torch twin", lambda: normal_noise(0, few, 0, POSITIONS, CHANNELS), count, twin_numel))
        rows.append(rate("torch.randn", lambda: torch.randn(out.shape, out=out), count, out.numel()))
        rows.append(rate("fill_ (ceiling)", lambda: out.fill_(1.0), count, out.numel()))
    torch.set_num_threads(threads)
    shape = {"pairs": args.pairs, "positions": POSITIONS, "channels": CHANNELS, "dtype": "float32"}
    finish({"bench": "noise", "hardware": hardware(), "shape": shape, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
