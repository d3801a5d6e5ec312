"""Logits to tokens on a CPU core: exactness against the float64 twin, speed against plain torch and a floor, memory.

    python benches/bench_flow.py            # about two minutes on one core
    python benches/bench_flow.py --quick    # a smoke run of 10 seconds

Guided logits are fresh problems of benches/problems.py. The plain formulation (benches/naive.py: sort-based filter, ten
dense evaluations) takes turns with the fused one, at its best chunk size. Times are CPU time of one thread, means over
the setting's families; "min" is the least of the repetitions. The floor is the time that the arithmetic a token needs
would take at the rate of this core's best matrix product, plus the time to read its logits once from memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import naive
import torch
from _common import RESULTS, compare, finish, hardware
from flow_cases import SETTINGS, Guided, Setting, count_work, guided_problem
from torch import Tensor

from ddfast import _native, ops
from ddfast.flow import LogitFilter, Solver, filter_logits, make_solver
from ddfast.flow.tokens import guide, solve_rows

SHARP = {"var": "var-sharp", "llamagen": "llama-sharp"}
NAIVE_ROWS = (32, 128, 512)  # chunk sizes to choose from
NUDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

Figures = dict[str, Any]


# Exactness


def exactness(setting: Setting, families: Iterable[str], rows: int, seed: int) -> Figures:
    """How many kept sets and tokens of ``rows`` fresh rows a family are those of the float64 twin."""
    same_sets = same_tokens = total = 0
    nudges = []
    for number, family in enumerate(families):
        for start in range(0, rows, 500):
            count = min(500, rows - start)
            problem = guided_problem(family, count, seed + 1000 * number + start, setting.guidance)
            logits = guide(problem.cond, problem.uncond, setting.guidance)
            kept = ops.filter_logits(logits, setting.filter) > -torch.inf
            same_sets += int((kept == (filter_logits(logits.double(), setting.filter) > -torch.inf)).all(1).sum())
            solver = make_solver()
            got = fused(problem, setting, solver)
            want = twin_tokens(logits, problem.noise, problem.codebook, setting.filter)
            total += count
            same_tokens += int((got == want).sum())
            for row in (got != want).nonzero()[:, 0].tolist():
                nudges.append(least_nudge(logits[row], problem.noise[row], problem.codebook, setting.filter, got[row]))
    return {
        "rows": total,
        "kept_sets_percent": 100 * same_sets / total,
        "tokens_percent": 100 * same_tokens / total,
        "ties": nudges,
    }


def twin_tokens(logits: Tensor, noise: Tensor, codebook: Tensor, keep: LogitFilter) -> Tensor:
    """Tokens of guided logits [N, V], by the torch twin in float64."""
    options: Figures = {"guidance": 1.0, "filter": keep, "solver": make_solver()}
    return solve_rows(logits.double(), None, noise.double(), codebook.double(), **options).tokens


def least_nudge(logits: Tensor, noise: Tensor, codebook: Tensor, keep: LogitFilter, token: Tensor) -> float | None:
    """How little the noise must move for the float64 twin to give ``token`` too; None if more than NUDGES.

    logits [V], noise [C]. The noise, of deviation 1 a channel, moves in 64 directions. A tie moves by a few units of
    float32's rounding.
    """
    directions = torch.randn(64, len(noise), generator=torch.Generator().manual_seed(0)).double()
    directions = torch.nn.functional.normalize(directions, dim=1)
    for nudge in NUDGES:
        moved = noise.double() + nudge * directions
        if bool((twin_tokens(logits.expand(64, -1), moved, codebook, keep) == token).any()):
            return nudge
    return None


# Speed


def fused(problem: Guided, setting: Setting, solver: Solver) -> Tensor:
    return ops.flow_tokens(*problem.tensors, guidance=setting.guidance, filter=setting.filter, solver=solver)


def at_level(level: str, run: Callable[[], object]) -> object:
    """Run with one instruction set."""
    with _native.cpu_level(level):
        return run()


def best_naive(problem: Guided, setting: Setting) -> int:
    """The chunk size at which the plain formulation is fastest."""
    runs = {str(rows): partial(plain, problem, setting, rows) for rows in NAIVE_ROWS}
    times = compare(runs, repeats=2)
    return int(min(times, key=lambda rows: times[rows]["min_s"]))


def plain(problem: Guided, setting: Setting, rows: int) -> Tensor:
    return naive.flow_tokens(*problem.tensors, guidance=setting.guidance, filter=setting.filter, rows=rows)


def speed(setting: Setting, rows: int, repeats: int, seed: int, peaks: Figures) -> Figures:
    """Microseconds a token of every path, the share of the floor, and how much faster than plain torch the best is.

    rows: fused; a quarter as many run through the plain formulation.
    """
    solver, by_family, works = make_solver(), [], []
    chunk = 0
    for number, family in enumerate(setting.families):
        problem = guided_problem(family, rows, seed + number, setting.guidance)
        few = problem.rows(max(1, rows // 4))
        chunk = chunk or best_naive(few, setting)
        runs: dict[str, Callable[[], object]] = {"plain torch": partial(plain, few, setting, chunk)}
        for level in _native.cpu_levels():
            runs[level] = partial(at_level, level, partial(fused, problem, setting, solver))
        half = problem.to("cpu", torch.bfloat16)
        runs["bfloat16 logits"] = partial(fused, half, setting, solver)
        times = compare(runs, repeats=repeats)
        sizes = {name: len(few) if name == "plain torch" else rows for name in runs}
        by_family.append(
            {name: {k[:-2]: 1e6 * s / sizes[name] for k, s in t.items()} for name, t in times.items()}
            | {"two threads": two_threads(problem, setting, solver, repeats)}
        )
        works.append(count_work(few, setting, solver))
    microseconds = {
        name: {key: fmean(family[name][key] for family in by_family) for key in ("min", "median")}
        for name in by_family[0]
    }
    best = _native.cpu_levels()[0]
    floor = fmean(floor_us(work.flop(setting.vocab, setting.channels), setting, 4, peaks) for work in works)
    return {
        "setting": setting.describe(),
        "solver": solver.to_dict(),
        "rows": rows,
        "plain_rows_a_chunk": chunk,
        "microseconds_a_token": microseconds,
        "by_family_us": {
            family: figures[best]["min"] for family, figures in zip(setting.families, by_family, strict=True)
        },
        "work_a_token": [asdict(work) for work in works],
        "floor_us": floor,
        "share_of_floor": floor / microseconds[best]["min"],
        "times_plain_torch": microseconds["plain torch"]["median"] / microseconds[best]["median"],
    }


def two_threads(problem: Guided, setting: Setting, solver: Solver, repeats: int) -> Figures:
    """Microseconds of wall time a token on two threads."""
    torch.set_num_threads(2)
    run = {"": partial(fused, problem, setting, solver)}
    seconds = compare(run, repeats=repeats, clock=time.perf_counter)[""]
    torch.set_num_threads(1)
    return {key[:-2]: 1e6 * value / len(problem) for key, value in seconds.items()}


def floor_us(flop: float, setting: Setting, itemsize: int, peaks: Figures) -> float:
    """Microseconds a token at the core's peak: its arithmetic, and reading cond and uncond once."""
    arithmetic = flop / (1e3 * peaks["gflop_per_s"])
    return arithmetic + 2 * itemsize * setting.vocab / (1e3 * peaks["read_gb_per_s"])


def measure_peaks(megabytes: int) -> Figures:
    """What one core does at best: GFLOP/s of a float32 matrix product, GB/s of reading memory."""
    x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
    name, product = "oneDNN, packed weights", partial(torch.nn.functional.linear, x, weight)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
        product = partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")
        product()
    except (AttributeError, RuntimeError):  # private operators of torch
        name, product = "torch.nn.functional.linear", partial(torch.nn.functional.linear, x, weight)
    buffer = torch.ones(megabytes * 2**18)
    times = compare({"product": product, "read": buffer.sum}, repeats=5)
    return {
        "gflop_per_s": 2e-9 * 256 * 1024 * 1024 / times["product"]["min_s"],
        "product": f"256 x 1024 x 1024 float32, {name}",
        "read_gb_per_s": 4e-9 * buffer.numel() / times["read"]["min_s"],
        "read": f"torch.sum of {megabytes} MiB",
    }


# Memory

_PEAK_MEMORY = """
import resource, sys, torch
from ddfast import ops
from ddfast.flow import LogitFilter, make_solver
torch.set_num_threads(1)
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows, vocab, channels = map(int, sys.argv[1:])
cond, uncond = (torch.empty(rows, vocab, dtype=torch.bfloat16) for _ in range(2))
for part in (*cond.split(64), *uncond.split(64)):
    part.normal_(std=2)
noise, codebook = torch.randn(rows, channels), torch.randn(vocab, channels)
def run(rows):
    return ops.flow_tokens(cond[:rows], uncond[:rows], noise[:rows], codebook, guidance=1.5,
                           filter=LogitFilter(top_k=vocab // 4, top_p=0.95), solver=make_solver())
run(2)
before = peak()
tokens = run(rows)
print(peak() - before - tokens.nbytes - noise.nbytes)
"""


def extra_megabytes(rows: int, vocab: int = 4096, channels: int = 32) -> float:
    """Peak memory of a call beyond inputs and outputs, in MB, in a process of its own; after a call on two rows."""
    command = [sys.executable, "-c", _PEAK_MEMORY, str(rows), str(vocab), str(channels)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return max(0, int(run.stdout)) / 1e6


# The operations that stand alone


def filter_speed(setting: Setting, rows: int, repeats: int, seed: int) -> Figures:
    """Microseconds a row of the filter alone, fused and by sorting."""
    problem = guided_problem(setting.families[0], rows, seed, setting.guidance)
    logits = guide(problem.cond, problem.uncond, setting.guidance)
    chunks = logits.split(64)
    runs: dict[str, Callable[[], object]] = {
        "fused": lambda: ops.filter_logits(logits, setting.filter),
        "plain torch": lambda: [naive.filter_logits(part, setting.filter) for part in chunks],
    }
    return {"setting": setting.describe(), "rows": rows} | per_row_us(compare(runs, repeats=repeats), rows)


def nearest_speed(rows: int, vocab: int, channels: int, repeats: int) -> Figures:
    """Microseconds a vector of the search for the nearest code, fused and through distances or products [chunk, V]."""
    g = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(rows, channels, generator=g), torch.randn(vocab, channels, generator=g)
    runs: dict[str, Callable[[], object]] = {
        "fused": lambda: ops.nearest_code(x, codebook),
        "plain torch": lambda: naive.nearest_matmul(x, codebook, 256),
        "cdist": lambda: naive.nearest_cdist(x, codebook, 256),
    }
    times = compare(runs, repeats=repeats)
    rate = 2e-9 * rows * vocab * channels / times["fused"]["min_s"]
    sizes = {"rows": rows, "vocab": vocab, "channels": channels, "gflop_per_s": rate}
    return sizes | per_row_us(times, rows)


def per_row_us(times: dict[str, dict[str, float]], rows: int) -> Figures:
    """Times a call as microseconds a row, and the ratio of the medians of the plain and the fused one."""
    rates = {name: {key[:-2]: 1e6 * value / rows for key, value in t.items()} for name, t in times.items()}
    return {"microseconds": rates, "times_plain_torch": rates["plain torch"]["median"] / rates["fused"]["median"]}


# Report


def bars(figures: Figures) -> list[Figures]:
    """What is asked for, and whether it holds."""
    found: list[Figures] = []

    def hold(name: str, value: float, bar: float, at_least: bool) -> None:
        held = value >= bar if at_least else value <= bar
        found.append({"name": name, "value": value, "at least" if at_least else "at most": bar, "held": held})

    for name, exact in figures["exactness"].items():
        hold(f"{name}: kept sets as in float64 (%)", exact["kept_sets_percent"], 100.0, True)
        hold(f"{name}: tokens as in float64 (%)", exact["tokens_percent"], 99.9, True)
    for name, ratio in (("var", 15.0), ("llamagen", 8.0)):
        if name in figures["speed"]:
            hold(f"{name}: times plain torch", figures["speed"][name]["times_plain_torch"], ratio, True)
    if "var" in figures["speed"]:
        best = figures["speed"]["var"]["microseconds_a_token"][_native.cpu_levels()[0]]["median"]
        hold("var: microseconds a token", best, 13.0, False)
    for rows, megabytes in figures["memory_mb"].items():
        hold(f"extra memory of {rows} rows (MB)", megabytes, 64.0, False)
    return found


def print_tables(figures: Figures) -> None:
    """Speed by setting and path, then the bars."""
    for name, row in figures["speed"].items():
        times = ", ".join(f"{path} {t['median']:.1f}" for path, t in row["microseconds_a_token"].items())
        print(f"{name:15} us a token: {times}; floor {row['floor_us']:.1f} ({100 * row['share_of_floor']:.0f}%)")
    for bar in figures["bars"]:
        limit = f">= {bar['at least']:g}" if "at least" in bar else f"<= {bar['at most']:g}"
        print(f"{'held' if bar['held'] else 'MISSED':7} {bar['name']:45} {bar['value']:9.2f}  ({limit})")


def plot(figures: Figures, path: Path) -> None:
    """Microseconds a token by setting, on a log scale: plain torch, fused on each instruction set, floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = figures["speed"]
    paths = list(next(iter(settings.values()))["microseconds_a_token"])
    chart, axis = plt.subplots(figsize=(10, 4.5))
    width = 0.8 / (len(paths) + 1)
    for number, name in enumerate([*paths, "floor"]):
        heights = [
            row["floor_us"] if name == "floor" else row["microseconds_a_token"][name]["median"]
            for row in settings.values()
        ]
        drawn = axis.bar([i + number * width for i in range(len(settings))], heights, width, label=name)
        axis.bar_label(drawn, fmt="%.3g", fontsize=7)
    axis.set(yscale="log", ylabel="microseconds a token", title="logits to tokens, one core (two where it says so)")
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(settings))], list(settings))
    axis.legend(fontsize=8, ncols=2)
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    plt.close(chart)


def main() -> None:
    """Run the bench, print the tables and save figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows and repetitions")
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS / "flow.json")
    options = parser.parse_args()
    if not _native.available():
        parser.error("ddfast._C is not built: pip install -e .")
    torch.set_num_threads(1)
    quick, seed = options.quick, options.seed
    rows, repeats, exact_rows = (128, 2, 20) if quick else (1024, 15, 1000)
    peaks = measure_peaks(64 if quick else 512)
    figures: Figures = {"bench": "flow", "hardware": hardware(), "seed": seed, "peaks_of_a_core": peaks}
    figures["exactness"] = {}
    for name, setting in SETTINGS.items():
        families = (*setting.families, SHARP[name.partition("-")[0]])
        figures["exactness"][name] = exactness(setting, families, exact_rows, seed)
        print(name, figures["exactness"][name], flush=True)
    figures["speed"] = {
        name: speed(setting, rows * 4096 // setting.vocab, repeats, seed, peaks) for name, setting in SETTINGS.items()
    }
    counts = (1000,) if quick else (1000, 10_000, 40_000)
    figures["memory_mb"] = {str(count): extra_megabytes(count) for count in counts}
    figures["filter_logits"] = {
        name: filter_speed(SETTINGS[name], rows // 4, repeats, seed) for name in ("var", "llamagen-k2000")
    }
    sizes = ((680, 4096, 32),) if quick else ((43_520, 4096, 32), (256, 16384, 8))
    figures["nearest_code"] = [nearest_speed(*size, repeats=min(repeats, 5)) for size in sizes]
    figures["bars"] = bars(figures)
    print_tables(figures)
    finish(figures, options.out)
    plot(figures, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
