"""``ddfast pairs``: make noise-token pairs with a teacher; ``show`` and ``verify`` a folder of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from ..errors import UserError
from ..flow import make_solver
from ..launcher import torchrun
from ..models import TEACHERS, Teacher, load_teacher
from ..models.classes import name_of, parse_classes
from ..models.linear import check_precision
from ..models.zoo import load_tokenizer
from ..pairs import (
    Manifest,
    PairDataset,
    Plan,
    check_batch,
    default_batch,
    describe,
    execute,
    fits,
    read_manifest,
    read_shard,
)
from ..pairs.engine import run_of
from ..pairs.store import Run, shard_path, shards_there
from ..pictures import check_ending, check_grid, grid
from .progress import console, progress_bar
from .shared import announce, choose_device, chosen_dtype, chosen_sampling

MOST_TOLD = 20  # shards that are not sound are named one by one


def make(args: argparse.Namespace) -> int:
    for option in ("teacher", "num", "out"):
        if getattr(args, option) is None:
            raise UserError(f"`ddfast pairs` needs --{option}; see `ddfast pairs --help` for examples")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch is {args.batch}; it must be at least 1")
    launch, device = torchrun(), choose_device(args.device)
    solver, dtype = make_solver(args.solver, args.nfe), chosen_dtype(args.dtype, device)
    check_precision(args.precision, device, dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and libraries would otherwise take a piece of the first GPU
    teacher = load_teacher(args.teacher, args.weights, args.tokenizer, dtype, device)
    manifest = describe(
        teacher,
        chosen_sampling(args, teacher),
        solver,
        num=args.num,
        seed=args.seed,
        shard_size=args.shard_size,
        labels=None if args.labels is None else parse_classes(args.labels, teacher.num_classes, "--labels"),
        store_noise=args.store_noise,
    )
    plan = Plan(args.out, manifest, parse_shards(args.shards, manifest.num_shards)[launch.rank :: launch.world])
    shown = console(quiet=launch.rank != 0)
    if plan.missing:
        teacher.prepare(args.precision, release=True)
        batch = choose_batch(args.batch, teacher, plan)
        what = f"{plan.pairs_missing:,} of {manifest.num:,} pairs of {teacher.name} to {args.out}"
        precision = "" if args.precision == "native" else f", {args.precision}"
        announce(shown, what, device, f"{dtype}{precision}", batch)
        say_rounding(shown, plan, run_of(teacher, batch, args.precision))
        begin = time.perf_counter()
        with progress_bar(shown, Rate()) as progress:
            task = progress.add_task(f"pairs of {teacher.name}", total=plan.pairs_missing)
            execute(plan, teacher, batch, lambda n: progress.advance(task, n), precision=args.precision)
        shown.print(speed(plan.pairs_missing, time.perf_counter() - begin, batch, launch.world))
    else:
        shown.print("nothing to make: the shards are there, and sound")
    shown.print(summary(args.out, manifest), soft_wrap=True)
    return 0


def parse_shards(text: str | None, count: int) -> range:
    """``A:B`` to the shards A..B-1 of ``count``; either may be left out, and B may lie past the end."""
    first, colon, last = (":" if text is None else text).partition(":")
    if colon and all(part.isascii() and part.isdecimal() or not part for part in (first, last)):
        shards = range(int(first or 0), min(int(last or count), count))
        if shards:
            return shards
    raise UserError(
        f"--shards {text!r} names no shards: these pairs have shards 0:{count}; use A:B with 0 <= A < B and A < {count}"
    )


def choose_batch(given: int | None, teacher: Teacher, plan: Plan) -> int:
    """--batch; else what the shards already there were made with, if it fits; else what the memory at hand allows."""
    if given is not None:
        check_batch(given, teacher, plan.manifest)
        return given
    batches = {run.batch for run in plan.runs}
    if len(batches) == 1 and fits(batch := batches.pop(), teacher, plan.manifest):
        return batch
    return default_batch(teacher, plan.manifest)


def say_rounding(shown: Console, plan: Plan, run: Run) -> None:
    """Say before the work starts that shards made in another way can differ."""
    others = [other for other in plan.runs if other != run]
    if plan.missing and others:
        rounding = all(other.precision == run.precision for other in others)
        shown.print(
            f"note: shards already there were made with {others[0]}, the missing ones will be with {run}: "
            + (
                "tokens may differ by rounding from a run in one way"
                if rounding
                else "another precision is a slightly different teacher (docs/throughput.md)"
            ),
            soft_wrap=True,
        )


class Rate(ProgressColumn):
    """Pairs a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} pairs/s" if task.speed else "- pairs/s")


def speed(pairs: int, seconds: float, batch: int, world: int) -> str:
    """How fast this process was, the recording of CUDA graphs and the last write included."""
    whose = f"rank 0 of {world} made " if world > 1 else ""
    return f"{whose}{pairs} pairs in {seconds:.1f} s: {pairs / seconds:.4g} pairs/s, {batch} at a time"


def summary(folder: Path, manifest: Manifest) -> str:
    """What the folder holds, or which shards others still have to make, as --shards takes them."""
    there = shards_there(folder)
    ranges = missing_ranges(there, manifest.num_shards)
    if ranges:
        count = sum(map(len, ranges))
        listed = ", ".join(f"{r.start}:{r.stop}" for r in ranges[:8]) + (", ..." if len(ranges) > 8 else "")
        return f"{folder}: {count} of {manifest.num_shards} shards are missing, for other ranks or --shards: {listed}"
    size, shards = sum(there.values()), counted(manifest.num_shards, "shard")
    return f"{folder}: {counted(manifest.num, 'pair')} in {shards}, {size / 2**20:.1f} MiB"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def missing_ranges(there: Iterable[int], count: int) -> list[range]:
    """Runs of numbers below ``count`` that are not ``there``; costs nothing where nearly all are missing."""
    out, stop = [], 0
    for shard in [*sorted(s for s in there if 0 <= s < count), count]:
        if shard > stop:
            out.append(range(stop, shard))
        stop = shard + 1
    return out


def show_pairs(args: argparse.Namespace) -> int:
    if args.count < 1 or args.columns < 1:
        raise UserError(f"--count {args.count} and --columns {args.columns} must be at least 1")
    check_ending(args.out)
    dataset = PairDataset(args.folder, partial=True)
    source = args.teacher or dataset.manifest.teacher
    if args.teacher is None and source not in TEACHERS:
        raise UserError(f"the pairs are of {source}, which is not in the zoo; name its bundle with --teacher")
    part = load_tokenizer(source, args.tokenizer)
    if part.sha256 != dataset.manifest.weights.get("tokenizer"):
        raise UserError(
            f"the pairs in {args.folder} were made with another tokenizer; name theirs with --teacher or --tokenizer"
        )
    tokenizer: Any = part.build(torch.float32, "cpu")
    count = min(args.count, len(dataset))
    check_grid(args.out, count, tokenizer.image_size, args.columns)
    images, labels = [], []
    for rows in torch.arange(count).split(16):
        pairs = dataset[rows]
        with torch.inference_mode():
            images.append(tokenizer.decode(pairs.tokens))
        labels += [name_of(label, dataset.manifest.num_classes) for label in pairs.labels.tolist()]
    grid(torch.cat(images), labels, args.columns, args.out)
    print(f"{args.out}: {count} pairs of {dataset.manifest.teacher}")
    return 0


def verify_pairs(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.folder)
    there = shards_there(args.folder)
    count, gone = manifest.num_shards, missing_ranges(there, manifest.num_shards)
    bad = [f"shards {r.start}:{r.stop} are missing" for r in gone]
    bad += [
        f"{shard_path(args.folder, s)} is none of these pairs', whose shards are 0:{count}" for s in there if s >= count
    ]
    here = sorted(s for s in there if s < count)
    console().print(f"{len(here):,} of {counted(count, 'shard')} of {manifest.num:,} pairs to verify")
    with progress_bar(console(), Rate()) as progress:
        task = progress.add_task("verifying", total=sum(len(manifest.shard_range(s)) for s in here))
        for shard in here:
            try:
                read_shard(args.folder, manifest, shard)
            except UserError as error:
                bad.append(str(error))
            progress.advance(task, len(manifest.shard_range(shard)))
    if bad:
        listed = bad[:MOST_TOLD] + ([f"and {len(bad) - MOST_TOLD} more"] if len(bad) > MOST_TOLD else [])
        wrong = sum(map(len, gone)) + len(bad) - len(gone)
        raise UserError(f"{args.folder}: {wrong} of {count} shards are not sound:\n  " + "\n  ".join(listed))
    print(f"{args.folder}: {manifest.num} pairs of {manifest.teacher} in {manifest.num_shards} shards, all sound")
    return 0
