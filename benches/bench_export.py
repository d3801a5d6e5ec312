"""One step of a student on one CPU core, class and noise in, pixels out: the released code's path, ddfast's in torch,
and every exported runtime that is installed, each beside the floor of the same run. Weights are random, shapes real.

Rows take turns (``--rounds``), each in a process of its own: it loads its files, warms up (one call), and times
``--repeats`` calls on labels and noise that are there already. Seconds a call are wall time (``median_s``, ``min_s``)
and CPU time (``cpu_median_s``). Ratios are of CPU time: the same for one thread alone, and less disturbed by others.

``memory_gb`` is the most that process held, Python and torch (about 0.3 GB) and loading included. The released path and
ddfast's map float32 weights from the student's file (a released checkpoint, unpickled, takes more); a runtime reads its
folder as it does for users. Pages of a mapped file count once touched.

The floor: bare products and convolutions of the exported graph's shapes and number, nothing between them, each by the
fastest way that torch has (F.linear; conv2d, channels first or last; oneDNN's packed weights); ``ways`` counts them.
Attention's products stand beside it and do not count. ``times_floor`` is over the floor of a row's precisions; int8,
which torch has no bare products of, stands over bfloat16's, and may be below it.

An export's seconds and memory are those of the whole command in a process of its own, all cores: the student read, the
files built, and parity measured, whose figures say little for random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _common import RESULTS, finish, hardware
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CASES = {"var-dd-d16": "var-d16", "llamagen-dd-b": "llamagen-b-256"}  # students, and their teachers
SMALL = {"digits-var": "digits-var", "digits-llamagen": "digits-llamagen"}
ENGINES = {
    "openvino-mixed": ("openvino", "mixed", "pair"),
    "openvino-bf16": ("openvino", "bf16", "pair"),
    "openvino-int8": ("openvino", "int8", "pair"),
    "openvino-fp32": ("openvino", "fp32", "pair"),
    "onnx-fp32": ("onnx", "fp32", "whole"),
    "aoti-fp32": ("aoti", "fp32", "whole"),
    "tensorrt-rtx-fp16": ("tensorrt-rtx", "fp16", "whole"),
}
SLOW = {"aoti-fp32"}  # to build: only when named
BUILT = {"tensorrt-rtx-fp16"}  # here, and run on a GPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP = 1
EXPORT_BARS = {"process_s": 180.0, "memory_gb": 16.0}
TIMES_FLOOR, MEMORY_OF_RELEASED = 1.25, 1 / 3
FASTER_THAN_RELEASED = {1: 3.0, 4: 4.0}  # by batch; memory is held at batch 4

Record = dict[str, Any]


# What a process of its own does


def write(name: str, path: str) -> Record:
    """A student of random weights with its tokenizer, as a file; groups before the middle by its logits."""
    from full_size import random_teacher

    from ddfast.models import STUDENTS, load_teacher, save_student
    from ddfast.models.checkpoints import KINDS, make_part

    source = (CASES | SMALL)[name]
    teacher: Any = load_teacher(source) if name in SMALL else random_teacher(source, torch.float32)
    student, vq = teacher.new_student(torch.Generator().manual_seed(0)), teacher.tokenizer
    kind = next(kind for kind, (_, module) in KINDS.items() if type(vq) is module)
    parts = (
        make_part(student.kind, student.settings, student.state_dict(), name),
        make_part(kind, vq.config, vq.state_dict(), name),
    )
    split = STUDENTS[name].split if name in STUDENTS else len(student.groups) // 2
    save_student(path, name, *parts, (0,), split, source)
    return {}


def export(student: str, engine: str, out: str, parity: int | None) -> Record:
    from ddfast.export.build import Job, export_student
    from ddfast.models import load_student

    target, precision, layout = ENGINES[engine]
    begin, parts = time.perf_counter(), {"read": 0.0}

    def progress(what: str) -> None:
        parts[what] = time.perf_counter() - begin

    job = Job(load_student(student), target, precision, (0,), layout=layout, progress=progress)
    manifest = export_student(job, Path(out), min_agreement=0.0, num=parity)
    names, ends = list(parts), [*parts.values(), time.perf_counter() - begin]
    took = {name: round(stop - start, 1) for name, start, stop in zip(names, ends, ends[1:], strict=False)}
    files = sum(int(facts["bytes"]) for facts in manifest.files.values()) / 1e9
    found = {"seconds": took, "files_gb": round(files, 3), "parity": dict(manifest.parity)}
    return found | ({"engines": manifest.built["engines"]} if "engines" in manifest.built else {})


def inputs(batch: int, classes: int, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    from ddfast.sampling import sample_noise

    samples = torch.arange(batch)
    return samples % classes, sample_noise(0, samples, tokens, channels)


def released(student: str, precision: str, batch: int, repeats: int) -> Record:
    from released import released as one_step

    from ddfast.models import load_student

    model = load_student(student)
    s, run = model.student, one_step(model, DTYPES[precision])
    given = inputs(batch, s.num_classes, s.num_tokens, s.channels)
    return clocked(lambda: run(*given), repeats) | {"precision": {"trunk": precision, "decoder": precision}}


def in_torch(student: str, precision: str, batch: int, repeats: int) -> Record:
    """As ``ddfast sample`` computes it; the decoder stays in float32."""
    from ddfast.models import load_student
    from ddfast.sampling import few_step

    model = load_student(student, dtype=DTYPES[precision])
    s, codebook = model.student, model.codebook
    labels, noise = inputs(batch, s.num_classes, s.num_tokens, s.channels)
    seconds = clocked(lambda: model.images(few_step(s, labels, noise, codebook, (0,), model.split)), repeats)
    return seconds | {"precision": {"trunk": precision, "decoder": "fp32"}}


def exported(folder: str, batch: int, repeats: int) -> Record:
    from ddfast.export.build import open_engine

    engine = open_engine(folder)
    shapes, precision = engine.manifest.shapes, engine.manifest.precision
    label, noise = inputs(batch, shapes.num_classes, shapes.tokens, shapes.channels)
    seconds = clocked(lambda: engine.run({"label": label, "noise": noise}), repeats)
    stages = {stage: precision.get(stage, precision.get("whole")) for stage in ("trunk", "decoder")}
    return seconds | {"precision": stages, "runtime": engine.runtime}


def floor(student: str, batch: int, repeats: int) -> Record:
    """Seconds of each stage's bare work by precision, and how much it is."""
    stages = products(student, batch)
    figures: Record = {}
    for precision, dtype in DTYPES.items():
        figures[precision] = {stage: bare(counts, dtype, repeats) for stage, counts in stages.items()}
    return figures


def clocked(run: Callable[[], object], repeats: int, warmup: int = WARMUP) -> Record:
    """Wall and CPU seconds of each call that counts."""
    wall, cpu = [], []
    for call in range(warmup + repeats):
        begin = time.perf_counter(), time.process_time()
        run()
        if call >= warmup:
            wall.append(time.perf_counter() - begin[0])
            cpu.append(time.process_time() - begin[1])
    return {"wall": wall, "cpu": cpu}


# The floor


class Recorded(TorchDispatchMode):
    """Counts matrix products and convolutions by their shapes: (what, shape of each factor, options)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()

    def count(self, what: str, a: Tensor, b: Tensor, option: Any) -> None:
        self.counts[what, tuple(a.shape), tuple(b.shape), option] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, op = torch.ops.aten, func.overloadpacket
        if op in (aten.mm, aten.addmm):
            self.count("linear", *args[-2:], option=op is aten.addmm)
        elif op is aten.convolution:
            assert set(args[5]) == {1} and args[8] == 1, "a dilated or grouped convolution"
            self.count("conv", *args[:2], option=(tuple(args[3]), tuple(args[4])))
        elif op is aten.bmm:
            self.count("bmm", *args, option=None)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def products(student: str, batch: int) -> dict[str, Counter[tuple[Any, ...]]]:
    """What trunk, attention and decoder of one step multiply, as exported: nothing is computed."""
    from ddfast.models import load_student
    from ddfast.models.attention import biased

    model, meta = load_student(student), torch.device("meta")
    vq: Any = model.tokenizer.to(meta)
    s, codebook = model.student.to(meta), model.codebook
    s.attend = lambda x: biased((1, *s.groups), meta)  # type: ignore[method-assign]
    labels = torch.zeros(batch, dtype=torch.int64, device=meta)
    with Recorded() as trunk:
        x_BLC = s.predict(labels, torch.zeros(batch, s.num_tokens, s.channels, device=meta), 0, codebook, model.split)
    with Recorded() as decoder:
        vq.decode_embeddings(x_BLC)

    def only(mode: Recorded, *what: str) -> Counter[tuple[Any, ...]]:
        return Counter({key: count for key, count in mode.counts.items() if key[0] in what})

    return {
        "trunk": only(trunk, "linear", "conv"),
        "attention": only(trunk, "bmm"),
        "decoder": only(decoder, "linear", "conv"),
    }


def bare(counts: Counter[tuple[Any, ...]], dtype: torch.dtype, repeats: int) -> Record:
    """Seconds of all these, each in its fastest way, again and again; how many ran in which; and what it amounts to."""
    wall, cpu, flop, ways = [0.0] * repeats, [0.0] * repeats, 0, Counter[str]()
    for (what, a, b, option), count in counts.items():
        timed = {name: clocked(run, repeats) for name, run in ways_of(what, a, b, option, dtype).items()}
        best = min(timed, key=lambda name: median(timed[name]["cpu"]))
        ways[best] += count
        for total, key in ((wall, "wall"), (cpu, "cpu")):
            total[:] = [t + count * s for t, s in zip(total, timed[best][key], strict=True)]
        flop += count * flop_of(what, a, b, option)
    return {"wall": wall, "cpu": cpu, "gflop": flop / 1e9, "ways": dict(ways)}


def ways_of(
    what: str, a: tuple[int, ...], b: tuple[int, ...], option: Any, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    from ddfast.models import linear

    x = torch.randn(a).to(dtype)
    if what == "linear":
        weight = torch.randn(b[::-1]).to(dtype)
        bias = torch.zeros(len(weight), dtype=dtype) if option else None
        found: dict[str, Callable[[], object]] = {"F.linear": lambda: F.linear(x, weight, bias)}
        if linear._packs(dtype):
            packed = linear.PackedLinear(weight, bias, gelu=False)
            found["packed linear"] = lambda: packed(x)
        return found
    w = torch.randn(b).to(dtype)
    if what == "bmm":
        return {"bmm": lambda: torch.bmm(x, w)}
    bias, (stride, padding) = torch.zeros(len(w), dtype=dtype), option
    last = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
    found = {
        "conv2d": lambda: F.conv2d(x, w, bias, stride, padding),
        "conv2d channels_last": lambda: F.conv2d(*last, bias, stride, padding),
    }
    if linear._packs(dtype):
        ops, options = torch.ops.mkldnn, (padding, stride, (1, 1), 1)
        ordered = ops._reorder_convolution_weight(w, *options, a)
        found["packed conv2d channels_last"] = lambda: ops._convolution_pointwise(
            last[0], ordered, bias, *options, "none", [], ""
        )
    return found


def flop_of(what: str, a: tuple[int, ...], b: tuple[int, ...], option: Any) -> int:
    if what != "conv":
        return 2 * torch.Size(a).numel() * b[-1]
    (stride, padding) = option
    sides = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(a[2:], b[2:], stride, padding, strict=True)]
    return 2 * a[0] * torch.Size(b).numel() * sides[0] * sides[1]


# Processes and rows


WORK = {"write": write, "export": export, "released": released, "torch": in_torch, "engine": exported, "floor": floor}


def alone(work: str, threads: int, **given: Any) -> Record:
    """What ``work`` says of itself, run in a process of its own, with its seconds and the most memory it held."""
    words = [sys.executable, __file__, "--alone", json.dumps([work, given])]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=variables)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{work} {given} failed with {child.returncode}")
    took = {
        "process_s": time.perf_counter() - begin,
        "process_cpu_s": usage.ru_utime + usage.ru_stime,
        "memory_gb": usage.ru_maxrss * 1024 / 1e9,
    }
    print(work, given, rounded(took), file=sys.stderr, flush=True)
    return {"answer": json.loads(said.splitlines()[-1])} | took


def pooled(rounds: list[Record]) -> Record:
    """Median and least seconds of a row's calls in all rounds."""
    wall, cpu = ([s for one in rounds for s in one[key]] for key in ("wall", "cpu"))
    return {"median_s": median(wall), "min_s": min(wall), "cpu_median_s": median(cpu)}


def measured(student: str, plan: list[tuple[str, str, Record]], batch: int, rounds: int) -> tuple[list[Record], Record]:
    """Rows of ``plan`` (name, work, its arguments) and the floor, taking turns."""
    turns: dict[str, list[Record]] = {name: [] for name, _, _ in plan}
    for _ in range(rounds):
        for name, work, given in plan:
            turns[name].append(alone(work, 1, batch=batch, **given))
    floors = [turn["answer"] for turn in turns.pop("floor")]
    bottom = {
        precision: {
            stage: pooled([f[precision][stage] for f in floors]) | {k: one[stage][k] for k in ("gflop", "ways")}
            for stage in one
        }
        for precision, one in floors[0].items()
    }
    rows = []
    for name, all_ in turns.items():
        row = {"student": student, "batch": batch, "way": name} | pooled([turn["answer"] for turn in all_])
        row["memory_gb"] = max(turn["memory_gb"] for turn in all_)
        row |= {key: value for key, value in all_[0]["answer"].items() if key not in ("wall", "cpu")}
        rows.append(row)
    for row in rows:
        compare(row, rows[0], bottom)
    return rows, {"student": student, "batch": batch} | bottom


def compare(row: Record, released_row: Record, bottom: Record) -> None:
    """Add what a row is worth: against the floor of its precisions, and the released path in float32."""
    of = {stage: "bf16" if precision == "int8" else precision for stage, precision in row["precision"].items()}
    if all(precision in bottom for precision in of.values()):
        floors = [bottom[precision][stage]["cpu_median_s"] for stage, precision in of.items()]
        row["cpu_floor_s"] = sum(floors)
        row["times_floor"] = row["cpu_median_s"] / row["cpu_floor_s"]
    row["faster_than_released"] = released_row["cpu_median_s"] / row["cpu_median_s"]
    row["memory_of_released"] = row["memory_gb"] / released_row["memory_gb"]


def best(rows: list[Record]) -> Record:
    """The fastest exported runtime of ``rows``, and whether it holds the bars of its batch."""
    row = min((row for row in rows if "runtime" in row), key=lambda row: float(row["cpu_median_s"]))
    holds = {"times_floor": row.get("times_floor", math.inf) <= TIMES_FLOOR}
    if row["batch"] in FASTER_THAN_RELEASED:
        holds["faster_than_released"] = row["faster_than_released"] >= FASTER_THAN_RELEASED[row["batch"]]
    if row["batch"] == 4:
        holds["memory_of_released"] = row["memory_of_released"] <= MEMORY_OF_RELEASED
    ratios = ("times_floor", "faster_than_released", "memory_of_released")
    return {key: row[key] for key in ("student", "batch", "way", *ratios) if key in row} | {"holds": holds}


def plan_of(student: Path, folders: dict[str, Path], repeats: int, skip: list[str]) -> list[tuple[str, str, Record]]:
    common = {"repeats": repeats}
    plan = [
        (f"{name} {p}", work, common | {"student": str(student), "precision": p})
        for name, work in (("released", "released"), ("torch", "torch"))
        for p in DTYPES
        if f"{name} {p}" not in skip
    ]
    plan += [(name, "engine", common | {"folder": str(folder)}) for name, folder in folders.items()]
    return [*plan, ("floor", "floor", common | {"student": str(student)})]


def installed(engine: str) -> bool:
    from ddfast.errors import UserError
    from ddfast.export.build import check_packages

    try:
        check_packages(ENGINES[engine][0])
    except UserError:
        return False
    return True


def rounded(value: Any) -> Any:
    """Floats of a record to four digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*CASES, *SMALL], help="one student (default: all)")
    parser.add_argument("--small", action="store_true", help="digits students, to see that it works; give --out")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4], help="none: exports alone (default: 1 4)")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), help="default: all installed but aoti-fp32")
    parser.add_argument("--repeats", type=int, default=3, help="calls timed a turn (default: 3)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each row (default: 2)")
    parser.add_argument("--parity", type=int, help="images an export is compared on (default: as usual)")
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=["released bf16", "torch fp32", "torch bf16"], help="rows"
    )
    parser.add_argument(
        "--out", type=Path, help="default: results/export-cpu.json, with --only export-cpu-STUDENT.json"
    )
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        work, given = args.alone
        print(json.dumps(WORK[work](**given)))
        return
    students = SMALL if args.small else CASES
    if args.small and args.out is None:
        parser.error("--small measures nothing to keep: give --out")
    wanted = [name for name in ENGINES if name not in SLOW] if args.engines is None else args.engines
    engines = [name for name in wanted if installed(name)]
    bars = {
        "export": EXPORT_BARS,
        "times_floor": TIMES_FLOOR,
        "faster_than_released": FASTER_THAN_RELEASED,
        "memory_of_released": {4: MEMORY_OF_RELEASED},
    }
    figures: Record = {"bench": "export", "hardware": hardware(), "threads": 1, "rounds": args.rounds}
    figures |= {"repeats": args.repeats, "bars": bars}
    figures |= {"not_installed": [name for name in wanted if name not in engines]}
    figures |= {"exports": [], "rows": [], "floors": [], "best": []}

    def keep(what: str, record: Record) -> None:
        figures[what].append(rounded(record))
        print(json.dumps(figures[what][-1]), flush=True)

    for name in students if args.only is None else (args.only,):
        with tempfile.TemporaryDirectory() as temporary:
            student = Path(temporary) / "student.safetensors"
            folders = {engine: Path(temporary) / engine for engine in engines}
            alone("write", 1, name=name, path=str(student))
            for engine, folder in folders.items():
                given = {"student": str(student), "engine": engine, "out": str(folder), "parity": args.parity}
                done = alone("export", os.cpu_count() or 1, **given)
                done |= done.pop("answer")
                done["holds"] = {key: done[key] <= bar for key, bar in EXPORT_BARS.items()}
                keep("exports", {"student": name, "engine": engine} | done)
            folders = {engine: folder for engine, folder in folders.items() if engine not in BUILT}
            for batch in args.batches:
                rows, bottom = measured(name, plan_of(student, folders, args.repeats, args.skip), batch, args.rounds)
                for row in rows:
                    keep("rows", row)
                keep("floors", bottom)
                if folders:
                    keep("best", best(rows))
    finish(figures, args.out or RESULTS / ("export-cpu" + (f"-{args.only}" if args.only else "") + ".json"))


if __name__ == "__main__":
    main()
