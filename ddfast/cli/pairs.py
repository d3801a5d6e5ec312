"""``ddfast pairs``: make noise-token pairs with a teacher; ``show`` and ``verify`` a folder of them."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from ..errors import UserError
from ..flow import DEFAULT_NFE, DEFAULT_SOLVER, SOLVERS, make_solver
from ..models import TEACHERS, Sampling, Teacher, load_teacher
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
from ..pairs.store import Run, shard_path
from ..pictures import check_ending, grid
from .progress import progress_bar

DESCRIPTION = """\
Make (noise, token) pairs: each image's Gaussian noise is mapped to the teacher's tokens by flow matching over the
codebook, token after token (Distilled Decoding, Alg. 1). The noise itself is a function of the seed and the pair's
index, so only tokens and labels are stored.

Stop it at any time: the same command finishes the folder, to the same bytes as an undisturbed run. Under torchrun the
shards are shared out by rank; several machines, or the tasks of a Slurm array with --shards, can fill one folder.
docs/throughput.md has the recipes, and what they cost."""

EPILOG = """\
examples:
  ddfast pairs --teacher digits-var --num 20000 --out pairs/
  ddfast pairs --teacher var-d16 --weights var_d16.pth --tokenizer vae_ch160v4096z32.pth --num 1200000 --out pairs/
  ddfast pairs --teacher digits-llamagen --labels 3,7 --guidance 1 --num 1000 --out sevens/
  torchrun --nproc-per-node 8 -m ddfast pairs --teacher var-d16 -n 1200000 --out pairs/
  ddfast pairs --teacher var-d16 --num 1200000 --out pairs/ --shards 0:100       # one of twelve jobs
  ddfast pairs --teacher var-d16 --num 1200000 --out pairs/ --precision fp8      # on Hopper and later
  ddfast pairs show pairs/ --out grid.png
  ddfast pairs verify pairs/
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "pairs",
        help="make noise-token pairs with a teacher, show or verify them",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to make")
    what.add_argument("--teacher", metavar="NAME|PATH", help="a teacher of `ddfast info`, or a bundle.safetensors")
    what.add_argument("--weights", type=Path, metavar="FILE", help="its released checkpoint, if not in a weight folder")
    what.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer's checkpoint, likewise")
    what.add_argument("-n", "--num", type=int, metavar="N", help="number of pairs (torchrun needs the short -n)")
    what.add_argument("--out", type=Path, metavar="DIR", help="folder to fill")
    what.add_argument("--labels", metavar="LIST", help="classes in turn, e.g. 3,7 or 0-9 (default: all, balanced)")
    what.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    what.add_argument("--shard-size", type=int, default=1024, metavar="N", help="pairs in a file (default: 1024)")
    what.add_argument("--store-noise", action="store_true", help="store the noise too, for use outside ddfast (large)")
    add_teacher_sampling(parser)
    run = parser.add_argument_group("how it runs (decides only rounding; recorded with each shard)")
    run.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="pairs decoded together (default: as many as help and fit in half a CPU's free memory or 80%% of a GPU's)",
    )
    run.add_argument(
        "--shards",
        metavar="A:B",
        help="make only shards A to B - 1; either may be left out, and a B past the last shard means the last "
        "(default: all)",
    )
    run.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on a GPU, else float32")
    run.add_argument(
        "--precision",
        choices=["native", "int8", "fp8"],
        default="native",
        help="of the matrix products: native is --dtype; int8 on a CPU and fp8 on a GPU are faster and change the "
        "teacher's distribution a little (docs/throughput.md)",
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (torchrun: one GPU a local rank)")
    parser.set_defaults(func=make)
    actions = parser.add_subparsers(title="on a folder of pairs", metavar="show | verify")
    show = actions.add_parser("show", help="decode pairs to a labelled grid of images")
    show.add_argument("folder", type=Path)
    show.add_argument("--out", type=Path, required=True, help="the picture to write, e.g. grid.png")
    show.add_argument("--count", type=int, default=60, metavar="N", help="pairs to show, the first ones (default: 60)")
    show.add_argument("--columns", type=int, default=10, metavar="N", help="images in a row (default: 10)")
    show.add_argument("--teacher", metavar="NAME|PATH", help="the teacher's bundle, if it is not in the zoo")
    show.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer, if not in a weight folder")
    show.set_defaults(func=show_pairs)
    verify = actions.add_parser("verify", help="check every shard: checksum, shape, range, manifest")
    verify.add_argument("folder", type=Path)
    verify.set_defaults(func=verify_pairs)


def add_teacher_sampling(parser: argparse.ArgumentParser) -> Any:
    """The options that decide a teacher's distribution and the flow; returns their group."""
    how = parser.add_argument_group("how the teacher is sampled (default: its preset)")
    how.add_argument("--preset", metavar="NAME", help="paper or release; see `ddfast info`")
    how.add_argument("--guidance", type=float, metavar="S", help="classifier-free guidance scale, the family's own")
    how.add_argument("--guidance-interval", type=int, metavar="N", help="LlamaGen's cfg_interval; -1 is off")
    how.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    how.add_argument("--top-p", type=float, metavar="P", help="off is 0 for VAR and 1 for LlamaGen, as in their code")
    how.add_argument("--temperature", type=float, metavar="T")
    defaults = ", ".join(f"{name} {nfe}" for name, nfe in DEFAULT_NFE.items())
    how.add_argument("--solver", choices=list(SOLVERS), default=DEFAULT_SOLVER, help=f"of the flow ({DEFAULT_SOLVER})")
    how.add_argument(
        "--nfe", type=int, metavar="N", help=f"its most evaluations of the field a token (default: {defaults})"
    )
    return how


def make(args: argparse.Namespace) -> int:
    for option in ("teacher", "num", "out"):
        if getattr(args, option) is None:
            raise UserError(f"`ddfast pairs` needs --{option}; see `ddfast pairs --help` for examples")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch is {args.batch}; it must be at least 1")
    rank, world = torchrun()
    device = choose_device(args.device)
    solver = make_solver(args.solver, args.nfe)
    labels = None if args.labels is None else parse_labels(args.labels)
    dtype = DTYPES["bfloat16" if device.type == "cuda" else "float32"] if args.dtype == "auto" else DTYPES[args.dtype]
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
        labels=labels,
        store_noise=args.store_noise,
    )
    plan = Plan(args.out, manifest, parse_shards(args.shards, manifest.num_shards)[rank::world])
    console = Console(stderr=True, quiet=rank != 0)
    if plan.missing:
        teacher.prepare(args.precision, release=True)
        batch = choose_batch(args.batch, teacher, plan)
        say_rounding(console, plan, run_of(teacher, batch, args.precision))
        begin = time.perf_counter()
        with progress_bar(console, Rate()) as progress:
            task = progress.add_task(f"pairs of {teacher.name}", total=plan.pairs_missing)
            execute(plan, teacher, batch, lambda n: progress.advance(task, n), precision=args.precision)
        console.print(speed(plan.pairs_missing, time.perf_counter() - begin, batch, world), highlight=False)
    console.print(summary(args.out, manifest), highlight=False)
    return 0


def chosen_sampling(args: argparse.Namespace, teacher: Teacher) -> Sampling:
    """The preset, with the values given on the command line in place of its own."""
    names = ("guidance", "guidance_interval", "top_k", "top_p", "temperature")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(teacher.preset(args.preset), **given)


def parse_labels(text: str) -> tuple[int, ...]:
    """``3,7`` or ``0-4,9`` to the classes named, in order."""
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"--labels {text!r}: {part.strip()!r} is neither a class like 3 nor a range like 0-9")
        labels += range(int(first), int(last or first) + 1)
    return tuple(labels)


def parse_shards(text: str | None, count: int) -> range:
    """``A:B`` to the shards A..B-1 of ``count``; either may be left out, and B may lie past the end."""
    first, colon, last = (":" if text is None else text).partition(":")
    if colon and all(part.isdecimal() or not part for part in (first, last)):
        shards = range(int(first or 0), min(int(last or count), count))
        if shards:
            return shards
    raise UserError(
        f"--shards {text!r} names no shards: these pairs have shards 0:{count}; use A:B with 0 <= A < B and A < {count}"
    )


def torchrun() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(name: str) -> torch.device:
    """``auto`` is the local rank's GPU, or the CPU where there is none."""
    if name in ("auto", "cuda"):
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        if name == "auto":
            return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu or auto")
    return device


def choose_batch(given: int | None, teacher: Teacher, plan: Plan) -> int:
    """--batch; else what the shards already there were made with, if it fits; else what the memory at hand allows."""
    if given is not None:
        check_batch(given, teacher, plan.manifest)
        return given
    batches = {run.batch for run in plan.runs}
    if len(batches) == 1 and fits(batch := batches.pop(), teacher, plan.manifest):
        return batch
    return default_batch(teacher, plan.manifest)


def say_rounding(console: Console, plan: Plan, run: Run) -> None:
    """Say before the work starts that shards made in another way can differ."""
    others = [other for other in plan.runs if other != run]
    if plan.missing and others:
        rounding = all(other.precision == run.precision for other in others)
        console.print(
            f"note: shards already there were made with {others[0]}, the missing ones will be with {run}: "
            + (
                "tokens may differ by rounding from a run in one way"
                if rounding
                else "another precision is a slightly different teacher (docs/throughput.md)"
            ),
            highlight=False,
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
    missing = [s for s in range(manifest.num_shards) if not shard_path(folder, s).exists()]
    if missing:
        runs = [s for s in missing if s - 1 not in missing], [s + 1 for s in missing if s + 1 not in missing]
        ranges = [f"{first}:{last}" for first, last in zip(*runs, strict=True)]
        return (
            f"{folder}: {len(missing)} of {manifest.num_shards} shards are missing, for other ranks or --shards: "
            + ", ".join(ranges[:8])
            + (", ..." if len(ranges) > 8 else "")
        )
    size = sum(shard_path(folder, s).stat().st_size for s in range(manifest.num_shards))
    return f"{folder}: {manifest.num} pairs in {manifest.num_shards} shards, {size / 2**20:.1f} MiB"


def show_pairs(args: argparse.Namespace) -> int:
    if args.count < 1 or args.columns < 1:
        raise UserError(f"--count {args.count} and --columns {args.columns} must be at least 1")
    check_ending(args.out)
    dataset = PairDataset(args.folder, partial=True)
    source = args.teacher or dataset.manifest.teacher
    if args.teacher is None and source not in TEACHERS:
        raise UserError(f"the pairs are of {source}, which is not in the zoo; name its bundle with --teacher")
    part = load_tokenizer(source, args.tokenizer)
    if part.sha256 != dataset.manifest.weights["tokenizer"]:
        raise UserError(
            f"the pairs in {args.folder} were made with another tokenizer; name theirs with --teacher or --tokenizer"
        )
    tokenizer: Any = part.build(torch.float32, "cpu")
    count = min(args.count, len(dataset))
    images, labels = [], []
    for rows in torch.arange(count).split(16):
        pairs = dataset[rows]
        with torch.inference_mode():
            images.append(tokenizer.decode(pairs.tokens))
        labels += [str(label) for label in pairs.labels.tolist()]
    grid(torch.cat(images), labels, args.columns, args.out)
    print(f"{args.out}: {count} pairs of {dataset.manifest.teacher}")
    return 0


def verify_pairs(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.folder)
    console = Console(stderr=True)
    bad = []
    with progress_bar(console, Rate()) as progress:
        task = progress.add_task("verifying", total=manifest.num)
        for shard in range(manifest.num_shards):
            try:
                read_shard(args.folder, manifest, shard)
            except UserError as error:
                bad.append(str(error))
            progress.advance(task, len(manifest.shard_range(shard)))
    if bad:
        raise UserError(f"{len(bad)} of {manifest.num_shards} shards are not sound:\n  " + "\n  ".join(bad))
    print(f"{args.folder}: {manifest.num} pairs of {manifest.teacher} in {manifest.num_shards} shards, all sound")
    return 0
