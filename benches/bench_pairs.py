"""Pairs a second: the digits teachers, and VAR-d16 at full size with random weights, beside their bare GEMM time.

Everything a user waits for is counted: noise, transformer, guidance, filter, flow, quantizer, checksums, writing. Not
counted: loading the teacher, and one warm-up batch. The GEMM time replays every matrix product of one batch, with its
own weights and shapes on random inputs, in the same run: no program that calls the same library is faster.

    python benches/bench_pairs.py                 # all, about six minutes on two cores
    python benches/bench_pairs.py --only digits
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import RESULTS, finish, hardware, measure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddfast import ops
from ddfast.flow import make_solver
from ddfast.models import TEACHERS, Teacher, load_teacher
from ddfast.models.zoo import blueprint
from ddfast.pairs import Manifest, Plan, describe, execute
from ddfast.pairs.engine import make_shard


def random_teacher(name: str, dtype: torch.dtype) -> Teacher:
    """A teacher of the zoo at full size, its transformer with random weights that give logits of about std 2."""
    teacher = blueprint(name).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    head = teacher.transformer.get_parameter("head.weight")
    torch.nn.init.normal_(head, std=2 * head.shape[1] ** -0.5)
    torch.nn.init.normal_(teacher.tokenizer.get_parameter("quantize.embedding.weight"), std=0.5)
    teacher.transformer.to(dtype)
    return teacher.requires_grad_(False).eval()


class Products(TorchDispatchMode):
    """Notes the shape and weight of every matrix product with a 2-D weight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "addmm":
            self.seen.append((args[1].shape[0], args[2].t()))
        elif name == "mm":
            self.seen.append((args[0].shape[0], args[1].t()))
        elif name == "linear":
            self.seen.append((args[0].shape[:-1].numel(), args[1]))
        return func(*args, **(kwargs or {}))


def gemm_seconds(teacher: Teacher, manifest: Manifest, batch: int) -> tuple[float, float]:
    """(seconds, GFLOP) of one batch's matrix products of the transformer alone."""
    products = Products()
    weights = {p.data_ptr() for p in teacher.transformer.parameters()}
    with torch.inference_mode(False), products:
        make_shard(teacher, manifest, 0, batch, lambda n: None)
    calls = [(rows, weight) for rows, weight in products.seen if weight.data_ptr() in weights]
    inputs = {(rows, w.shape[1]): torch.randn(rows, w.shape[1], dtype=w.dtype) for rows, w in calls}

    @torch.inference_mode()
    def replay() -> None:
        for rows, weight in calls:
            F.linear(inputs[rows, weight.shape[1]], weight)

    gflop = sum(2e-9 * rows * w.numel() for rows, w in calls)
    return measure(replay, repeats=3, warmup=1)["median_s"], gflop


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


def timed_pairs(teacher: Teacher, preset: str, batch: int, batches: int) -> dict[str, Any]:
    """Make ``batches`` batches as ``ddfast pairs`` does, after one warm-up batch."""
    sampling = TEACHERS[teacher.name].presets[preset]
    solver = make_solver()
    manifest = describe(teacher, sampling, solver, num=batch * batches, shard_size=batch * batches)
    warm = describe(teacher, sampling, solver, num=batch, shard_size=batch)
    make_shard(teacher, warm, 0, batch, lambda n: None)
    with tempfile.TemporaryDirectory() as folder, flow_clock() as flow:
        begin = time.perf_counter()
        execute(Plan(Path(folder), manifest, [0]), teacher, batch)
        seconds = time.perf_counter() - begin
    gemm, gflop = gemm_seconds(teacher, warm, batch)
    return {
        "teacher": teacher.name,
        "preset": preset,
        "guidance": sampling.guidance,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "batch": batch,
        "pairs": batch * batches,
        "solver": solver.describe(),
        "pairs_per_s": batch * batches / seconds,
        "s_per_pair": seconds / (batch * batches),
        "flow_s_per_pair": flow[0] / (batch * batches),
        "gemm_s_per_pair": gemm / batch,
        "gemm_gflop_per_pair": gflop / batch,
        "gemm_gflop_per_s": gflop / gemm,
        "time_over_gemm": seconds / batches / gemm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["digits", "var-d16"])
    parser.add_argument("--quick", action="store_true", help="fewer batches, no float32 VAR-d16")
    parser.add_argument("--out", type=Path, default=RESULTS / "pairs-cpu.json")
    args = parser.parse_args()
    rows = []
    for name in ("digits-var", "digits-llamagen") if args.only != "var-d16" else ():
        for batch in (1, 256):
            count = 200 if batch == 1 else 16
            rows.append(timed_pairs(load_teacher(name), "release", batch, count // 4 if args.quick else count))
            show(rows[-1])
    for dtype in (torch.bfloat16, torch.float32) if args.only != "digits" else ():
        if args.quick and dtype == torch.float32:
            continue
        teacher = random_teacher("var-d16", dtype)
        for batch in (1, 4):
            rows.append(timed_pairs(teacher, "paper", batch, 2))
            show(rows[-1])
    finish({"bench": "pairs", "hardware": hardware(), "weights of var-d16": "random", "rows": rows}, args.out)


def show(row: dict[str, Any]) -> None:
    line = {k: row[k] for k in ("teacher", "dtype", "batch")}
    print(
        json.dumps(line),
        f"{row['pairs_per_s']:.3g} pairs/s, {row['s_per_pair']:.3g} s a pair "
        f"(flow {row['flow_s_per_pair']:.2g}), {row['time_over_gemm']:.2f}x the GEMM time",
        flush=True,
    )


if __name__ == "__main__":
    main()
