"""Pairs a second: the digits teachers, and VAR-d16 and LlamaGen-B at full size with random weights, beside their GEMMs.

Everything a user waits for is counted: noise, transformer, guidance, filter, flow, quantizer, checksums, writing. Not
counted: loading and packing the teacher, and one warm-up batch. The GEMM time replays every matrix product of one
batch, with its own packed weights and shapes on random inputs and nothing fused behind it, before and after the timed
batches: no program that calls the same library is faster.

    python benches/bench_pairs.py                 # all, about ten minutes on two cores
    python benches/bench_pairs.py --only digits
    python benches/bench_pairs.py --minutes 60    # whether speed and memory hold, minute after minute
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _common import RESULTS, finish, hardware
from full_size import random_teacher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddfast import ops
from ddfast.flow import make_solver
from ddfast.models import TEACHERS, Teacher, load_teacher
from ddfast.pairs import Manifest, Plan, describe, execute
from ddfast.pairs.engine import make_shard


class Products(TorchDispatchMode):
    """Notes the rows and the weight, packed or not, of every product with a matrix of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("linear", "_linear_pointwise"):
            self.seen.append((args[0].shape[:-1].numel(), args[1]))
        elif name == "addmm":
            self.seen.append((args[1].shape[0], args[2].t()))
        elif name == "mm":
            self.seen.append((args[0].shape[0], args[1].t()))
        return func(*args, **(kwargs or {}))


class Gemms:
    """The matrix products of one batch, to be run again without anything between or behind them.

    Attributes:
        gflop: of one batch.
    """

    def __init__(self, teacher: Teacher, manifest: Manifest, batch: int) -> None:
        products = Products()
        with torch.inference_mode(False), products:
            make_shard(teacher, manifest, 0, batch)
        self._calls = products.seen
        shapes = {(rows, w.shape[1], w.dtype) for rows, w in self._calls}
        self._inputs = {(rows, k): torch.randn(rows, k, dtype=dtype) for rows, k, dtype in shapes}
        self.gflop = sum(2e-9 * rows * w.shape[0] * w.shape[1] for rows, w in self._calls)

    @torch.inference_mode()
    def __call__(self) -> None:
        for rows, weight in self._calls:
            x = self._inputs[rows, weight.shape[1]]
            if weight.layout == torch._mkldnn:  # type: ignore[attr-defined]
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            else:
                F.linear(x, weight)


@contextmanager
def flow_clock() -> Iterator[list[float]]:
    """Adds up the seconds spent in ops.flow."""
    spent, real = [0.0], ops.flow

    def timed(*args: Any, **kwargs: Any) -> ops.FlowResult:
        begin = time.perf_counter()
        out = real(*args, **kwargs)
        spent[0] += time.perf_counter() - begin
        return out

    ops.flow = timed
    try:
        yield spent
    finally:
        ops.flow = real


def timed_pairs(
    teacher: Teacher, preset: str, batch: int, rounds: int, batches: int = 1, precision: str = "native"
) -> dict[str, Any]:
    """Make ``batches`` batches as ``ddfast pairs`` does, ``rounds`` times, the bare products of one batch in between.

    Each round is compared with its own products, since both see the same neighbours on a shared machine; figures are
    medians. Quantised products are set beside those of the teacher's dtype.
    """
    sampling = TEACHERS[teacher.name].presets[preset]
    solver = make_solver()
    manifest = describe(teacher, sampling, solver, num=batch * batches, shard_size=batch * batches)
    warm = describe(teacher, sampling, solver, num=batch, shard_size=batch)
    teacher.prepare()
    gemms = Gemms(teacher, warm, batch)
    gemms()
    teacher.prepare(precision)
    make_shard(teacher, warm, 0, batch)
    seconds, bare, flows = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder, flow_clock() as flow:
            begin = time.perf_counter()
            execute(Plan(Path(folder), manifest, [0]), teacher, batch, precision=precision)
            seconds.append((time.perf_counter() - begin) / batches)
        flows.append(flow[0] / batches)
        begin = time.perf_counter()
        gemms()
        bare.append(time.perf_counter() - begin)
    total, gemm = median(seconds), median(bare)
    ratios = [s / b for s, b in zip(seconds, bare, strict=True)]
    return {
        "teacher": teacher.name,
        "preset": preset,
        "guidance": sampling.guidance,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "precision": precision,
        "batch": batch,
        "rounds": rounds,
        "pairs": batch * batches * rounds,
        "solver": solver.describe(),
        "pairs_per_s": batch / total,
        "s_per_pair": total / batch,
        "flow_s_per_pair": median(flows) / batch,
        "gemm_s_per_pair": gemm / batch,
        "gemm_gflop_per_pair": gemms.gflop / batch,
        "gemm_gflop_per_s": gemms.gflop / gemm,
        "time_over_gemm": median(ratios),
        "time_over_gemm_of_rounds": ratios,
    }


def endurance(minutes: float) -> dict[str, Any]:
    """Make shards of digits-var without end: pairs by minute, a second and a second of CPU, and resident memory.

    On a machine that does other work too, the second figure is the one that tells.
    """
    teacher = load_teacher("digits-var")
    sampling = TEACHERS[teacher.name].presets["release"]
    shard = 256
    manifest = describe(teacher, sampling, make_solver(), num=shard * 1_000_000, shard_size=shard)
    begin = last = time.perf_counter()
    last_cpu = time.process_time()
    pairs = shards = 0
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:

        def count(done: int) -> None:
            nonlocal last, last_cpu, pairs, shards
            pairs, shards = pairs + done, shards + 1
            now, cpu = time.perf_counter(), time.process_time()
            (Path(folder) / f"shard-{shards - 4:05d}.safetensors").unlink(missing_ok=True)
            if now - last >= min(60.0, 6 * minutes):
                row = {"minute": (now - begin) / 60, "pairs_per_s": pairs / (now - last)}
                rows.append(row | {"pairs_per_cpu_s": pairs / (cpu - last_cpu), "rss_mib": rss_mib()})
                print(json.dumps(rows[-1]), flush=True)
                last, last_cpu, pairs = now, cpu, 0
            if now - begin >= 60 * minutes:
                raise TimeoutError

        plan = Plan(Path(folder), manifest, range(20_000))
        with suppress(TimeoutError):
            execute(plan, teacher, shard, count)
    return {"teacher": teacher.name, "batch": shard, "shards": shards, "minutes": rows}


def rss_mib() -> float:
    """Resident memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["digits", "var-d16", "llamagen-b-256"])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing in float32 but digits")
    parser.add_argument("--minutes", type=float, help="instead: digits-var for so long, to pairs-endurance.json")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.minutes is not None:
        out = args.out or RESULTS / "pairs-endurance.json"
        finish({"bench": "endurance", "hardware": hardware(), **endurance(args.minutes)}, out)
        return
    rows = []
    for name in ("digits-var", "digits-llamagen") if args.only in (None, "digits") else ():
        for batch in (1, 256):
            count = 50 if batch == 1 else 4
            rows.append(timed_pairs(load_teacher(name), "release", batch, 2 if args.quick else 5, count))
            show(rows[-1])
    for name, batches in (("var-d16", (1, 4)), ("llamagen-b-256", (16,))):
        for dtype in (torch.bfloat16, torch.float32) if args.only in (None, name) else ():
            if args.quick and dtype == torch.float32:
                continue
            teacher = random_teacher(name, dtype)
            for batch, precision in [*((b, "native") for b in batches), (batches[-1], "int8")]:
                if precision == "native" or (dtype == torch.bfloat16 and not args.quick):
                    rows.append(timed_pairs(teacher, "paper", batch, 2 if args.quick else 5, precision=precision))
                    show(rows[-1])
    figures = {"bench": "pairs", "hardware": hardware(), "weights": "random but for digits", "rows": rows}
    finish(figures, args.out or RESULTS / "pairs-cpu.json")


def show(row: dict[str, Any]) -> None:
    line = {k: row[k] for k in ("teacher", "dtype", "precision", "batch")}
    print(
        json.dumps(line),
        f"{row['pairs_per_s']:.3g} pairs/s, {row['s_per_pair']:.3g} s a pair "
        f"(flow {row['flow_s_per_pair']:.2g}), {row['time_over_gemm']:.2f}x the GEMM time",
        flush=True,
    )


if __name__ == "__main__":
    main()
