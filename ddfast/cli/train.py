"""``ddfast train``: a student from a teacher and its noise-token pairs."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import Tensor

from .. import _native
from ..errors import UserError
from ..files import LOCK, file_sha256, locked, write_atomic
from ..models import STUDENTS, TEACHERS, Teacher, load_teacher
from ..models.checkpoints import Part, make_part
from ..models.distilled import RUN_FILE, load_student, save_student
from ..models.student import Student
from ..models.zoo import load_tokenizer, teacher_name
from ..pairs import Manifest, PairDataset, describe
from ..records import differences
from ..training import RECIPES, Run, TrainConfig, Trainer, recipe
from ..training.config import DIGITS, SCHEDULES
from ..training.distance import make_distance
from ..training.monitor import tensorboard_installed
from ..training.objective import Objective
from ..training.parallel import WAYS, Ranks, joined
from ..training.source import OnlinePairs, Source, StoredPairs
from ..training.trainer import PRECISIONS
from .pairs import choose_device
from .progress import progress_bar

ONLINE_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # as `ddfast pairs` chooses

DESCRIPTION = """\
Train a student on the pairs of a folder, or with --online on pairs that the teacher makes as they are needed. The
student starts from the teacher's weights, or from another student's with --start, and learns to go from noise, or from
data up to a timestep, to all tokens in one pass (Distilled Decoding, Sec. 3.3).

Stop it at any time: the same command goes on from the newest checkpoint, with the same losses, bit for bit on one
process. Under torchrun the batch is shared by the ranks. --out receives student.safetensors (the moving average, with
its tokenizer), checkpoints/, metrics.jsonl, samples/ (the teacher's images above the student's one-step images of the
same noise) and, where tensorboard is installed, tensorboard/."""

EPILOG = """\
examples:
  ddfast pairs --teacher digits-var --num 20000 --out pairs/
  ddfast train --pairs pairs/ --teacher digits-var --out runs/digits-var
  ddfast train --online --teacher digits-llamagen --steps 300 --out runs/online
  ddfast train --start runs/digits-var --pairs pairs/ --teacher digits-var --timesteps 0 --out runs/longer
  ddfast train --pairs pairs/ --teacher digits-var --steps 400 --batch 256 --lr 3e-3 --out runs/other
  torchrun --nproc-per-node 8 -m ddfast train --pairs pairs/ --teacher var-d16 --lpips-weights vgg16-397923af.pth \\
    --out runs/d16
  torchrun --nproc-per-node 8 -m ddfast train --pairs pairs/ --teacher var-d24 --distance l2 --parallel fsdp \\
    --out runs/d24
  tensorboard --logdir runs/
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a student on noise-token pairs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--teacher", required=True, metavar="NAME|PATH", help="the pairs' teacher, as in `ddfast pairs`")
    what.add_argument("--weights", type=Path, metavar="FILE", help="its released checkpoint, if not in a weight folder")
    what.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer's checkpoint, likewise")
    what.add_argument("--pairs", type=Path, metavar="DIR", help="a folder made by `ddfast pairs`")
    what.add_argument(
        "--online", action="store_true", help="no folder: the teacher makes each batch's pairs, at its preset"
    )
    what.add_argument(
        "--start", metavar="NAME|DIR|FILE", help="a student to start from: a released one, a run, or a student's file"
    )
    what.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    how = parser.add_argument_group("how it learns (default: the recipe's)")
    how.add_argument("--recipe", choices=list(RECIPES), help="default: digits or paper-*, by the teacher")
    how.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    how.add_argument("--batch", type=int, metavar="B", help="pairs a step, over all ranks")
    how.add_argument(
        "--timesteps",
        metavar="LIST",
        help="groups trained on, from 0, e.g. 0,5 (default: the released student's, or 0)",
    )
    how.add_argument("--lr", type=float, metavar="LR", help="peak learning rate for a batch of 256; scaled to --batch")
    how.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate, after the warm-up")
    how.add_argument("--warmup", type=int, metavar="N", help="steps of linear warm-up")
    how.add_argument("--final-lr-ratio", type=float, metavar="X", help="share of the peak at which a cosine ends")
    how.add_argument("--weight-decay", type=float, metavar="X", help="of matrices")
    how.add_argument("--clip-grad-norm", type=float, metavar="X", help="largest gradient norm")
    how.add_argument("--ema", type=float, metavar="X", help="decay of the moving average a step")
    how.add_argument(
        "--distance", choices=["lpips", "l2", "features"], help="lpips and features compare decoded images"
    )
    how.add_argument("--lpips-weights", type=Path, metavar="FILE", help="vgg16-397923af.pth, for --distance lpips")
    how.add_argument(
        "--features", metavar="NAME|FILE", help="for --distance features: digits-classifier, or a .pt2 file"
    )
    how.add_argument("--distance-weight", type=float, metavar="X", help="of the distance in the loss")
    how.add_argument("--ce-weight", type=float, metavar="X", help="of the cross entropy in the loss")
    how.add_argument(
        "--split", type=int, metavar="N", help="sampling takes groups before it from logits (default: all)"
    )
    how.add_argument("--holdout", type=int, metavar="N", help="pairs that are measured instead of trained on")
    how.add_argument("--seed", type=int, metavar="N", help="of new weights, order and timesteps (default: 0)")
    how.add_argument(
        "--no-layerwise",
        dest="layerwise",
        action="store_false",
        default=None,
        help="VAR: one noise/data embedding for all blocks",
    )
    run = parser.add_argument_group("how it runs (decides rounding and speed)")
    run.add_argument(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="auto: bfloat16 where the hardware multiplies it, else float32",
    )
    run.add_argument("--micro-batch", type=int, metavar="B", help="pairs in one pass of a rank; gradients accumulate")
    run.add_argument(
        "--parallel", choices=WAYS, default="ddp", help="with several ranks: ddp, or fsdp for what does not fit"
    )
    run.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile; auto: on a GPU")
    run.add_argument(
        "--activation-checkpointing", action="store_true", help="computes activations again: less memory, more work"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (torchrun: one GPU a local rank)")
    run.add_argument(
        "--log-every", type=int, default=50, metavar="N", help="steps between lines of figures (default: 50)"
    )
    run.add_argument(
        "--eval-every", type=int, metavar="N", help="steps between measurements (default: a fifth of all, at most 5000)"
    )
    run.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: likewise)")
    run.add_argument("--keep", type=int, default=2, metavar="N", help="newest checkpoints that stay (default: 2)")
    run.add_argument("--samples", type=int, default=16, metavar="N", help="pictures in a grid (default: 16)")
    parser.set_defaults(func=train)


def train(args: argparse.Namespace) -> int:
    if args.online == (args.pairs is not None):
        raise UserError("`ddfast train` needs either --pairs DIR or --online; see `ddfast train --help` for examples")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is not a folder; choose another --out")
    config = chosen_config(args)
    run = chosen_run(args, config)
    device = choose_device(args.device)
    with joined(device) as ranks:
        run.pieces(config.batch, ranks.world)
        return run_training(args, config, run, device, ranks)


@dataclass(frozen=True)
class Material:
    """What a student is made of and from. A teacher of stored pairs is not part of it, and so is gone by then."""

    student: Student
    codebook: Tensor
    source: Source
    manifest: Manifest
    identity: dict[str, Any]


def gather(args: argparse.Namespace, config: TrainConfig, run: Run, device: torch.device, ranks: Ranks) -> Material:
    """Load the teacher and the pairs; UserError where they do not fit each other or the configuration."""
    dataset = None if args.online else PairDataset(args.pairs)
    teacher = load_teacher(args.teacher, args.weights, args.tokenizer, torch.float32, device)
    config.check_timesteps(teacher.groups)
    if dataset is not None:
        check_pairs(args.pairs, dataset.manifest, teacher)
    student = teacher.new_student(torch.Generator().manual_seed(config.seed), config.layerwise)
    start = None if args.start is None else take_over(args.start, student, teacher)
    codebook = teacher.codebook.detach().clone()
    source, manifest = pair_source(config, run, teacher, dataset, ranks)
    identity: dict[str, Any] = {
        "teacher": teacher.name,
        "weights": teacher.weights_sha256,
        "pairs": manifest.checksum,
        "distance_network": network_hash(args),
        "start": start,
        "online": str(teacher.dtype) if dataset is None else None,
    }
    return Material(student, codebook, source, manifest, identity)


def take_over(name: str, student: Student, teacher: Teacher) -> str:
    """Give ``student`` the weights of another; their hash. UserError where it is of another shape or codebook."""
    given = load_student(name)
    lines = differences(asdict(given.student.settings), asdict(student.settings))
    if given.student.kind != student.kind:
        lines = [f"it is a {given.student.kind}, not a {student.kind}"]
    elif not torch.equal(given.codebook, teacher.codebook.float().cpu()):
        lines.append("its codebook is another")
    if lines:
        raise UserError(f"--start {name} does not fit a student of {teacher.name}: {'; '.join(lines)}")
    student.load_state_dict(given.student.state_dict())
    return given.sha256


def network_hash(args: argparse.Namespace) -> str | None:
    """SHA-256 of the file with the distance's network, its name if it ships with ddfast, None if there is none."""
    name = args.lpips_weights or args.features
    return name if name is None or not Path(name).is_file() else file_sha256(Path(name))


def run_training(args: argparse.Namespace, config: TrainConfig, run: Run, device: torch.device, ranks: Ranks) -> int:
    """Put the parts together, train, and say what came of it."""
    console = Console(stderr=True, quiet=not ranks.first)
    vq: Part = load_tokenizer(args.teacher, args.tokenizer)
    tokenizer: Any = vq.build(torch.float32, device)
    distance = make_distance(
        config.distance, tokenizer, lpips_weights=args.lpips_weights, features=args.features, device=device
    )
    made = gather(args, config, run, device, ranks)
    student, manifest, identity = made.student, made.manifest, made.identity

    def keep_student(weights: dict[str, Tensor]) -> None:
        part = make_part(student.kind, student.settings, weights, "the moving average")
        split = config.split_of(student.groups)
        save_student(args.out / RUN_FILE, name, part, vq, config.timesteps, split, manifest.teacher)

    name = f"{manifest.teacher}-student"
    count = sum(p.numel() for p in student.parameters())
    with progress_bar(console, TextColumn("{task.fields[figures]}")) as bar, ExitStack() as held:
        begun = (args.out / LOCK).exists()
        if ranks.first and begun:
            held.enter_context(locked(args.out))
        report = Lines(console, bar, config.steps, name)
        trainer = Trainer(
            args.out,
            config,
            run,
            student,
            made.source,
            Objective(student, distance, made.codebook, config),
            identity,
            images=lambda x: tokenizer.decode_embeddings(x).float(),
            keep_student=keep_student,
            ranks=ranks,
            report=report,
        )
        if ranks.first:
            args.out.mkdir(parents=True, exist_ok=True)
            if not begun:  # a folder that is refused stays as it is
                held.enter_context(locked(args.out))
            note = {"config": config.to_dict(), "run": {f.name: getattr(run, f.name) for f in fields(Run)}} | identity
            note["num_pairs"] = manifest.num
            write_atomic(args.out / "config.json", (json.dumps(note, indent=1, sort_keys=True) + "\n").encode())
            if not tensorboard_installed():
                report.say("tensorboard is not installed, so its curves are left out: pip install 'ddfast[train]'")
        report.say(
            f"{name}: {count / 1e6:.4g} M weights, {config.batch} pairs a step in {trainer.accumulate} passes on "
            f"{ranks.world} rank{'s' * (ranks.world > 1)}, {run.precision}"
        )
        measured = trainer.train()
    if ranks.first:
        print(f"{args.out}: {summary(config, measured)}; at most {trainer.memory()} of memory")
    return 0


def summary(config: TrainConfig, measured: dict[str, float]) -> str:
    return f"{config.steps} steps; holdout " + ", ".join(
        f"from {t}: {measured[f'holdout/agreement_t{t}']:.1%} of tokens agree" for t in config.timesteps
    )


def pair_source(
    config: TrainConfig, run: Run, teacher: Teacher, dataset: PairDataset | None, ranks: Ranks
) -> tuple[Source, Manifest]:
    if dataset is not None:
        return StoredPairs(dataset, config, teacher.device), dataset.manifest
    from ..flow import make_solver

    num = config.steps * config.batch + config.holdout
    manifest = describe(teacher, teacher.preset(), make_solver(), num=num, seed=config.seed)
    micro, _ = run.pieces(config.batch, ranks.world)
    teacher.transformer.to(ONLINE_DTYPES[teacher.device.type])
    teacher.prepare()
    return OnlinePairs(teacher, manifest, config, micro), manifest


def chosen_config(args: argparse.Namespace) -> TrainConfig:
    """The recipe, what it leaves to the teacher, and the values given on the command line in place of both."""
    teacher = teacher_name(args.teacher)
    name = args.recipe or (TEACHERS[teacher].recipe if teacher in TEACHERS else None)
    if name is None:
        raise UserError(f"{args.teacher} is not in the zoo: say which --recipe of {', '.join(RECIPES)}")
    released = {s.teacher: s.timesteps for s in STUDENTS.values()}
    values: dict[str, Any] = {"timesteps": released.get(teacher, (0,))} | (
        DIGITS.get(teacher, {}) if name == "digits" else {}
    )
    given = {f.name: getattr(args, f.name, None) for f in fields(TrainConfig)}
    given["timesteps"] = None if args.timesteps is None else parse_timesteps(args.timesteps)
    return recipe(name, **values | {key: value for key, value in given.items() if value is not None})


def chosen_run(args: argparse.Namespace, config: TrainConfig) -> Run:
    device = choose_device(args.device)
    names = {f.name for f in fields(Run)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    given["precision"] = fastest(device) if args.precision == "auto" else args.precision
    given["compile"] = device.type == "cuda" if args.compile == "auto" else args.compile == "on"
    often = max(1, min(5000, config.steps // 5))
    return Run(**{"eval_every": often, "save_every": often} | given)


def fastest(device: torch.device) -> str:
    """bfloat16 where the hardware multiplies it."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _native.multiplies_bfloat16() else "float32"


def parse_timesteps(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--timesteps {text!r} is no list of groups like 0,5")
    return tuple(int(part) for part in parts)


def check_pairs(folder: Path, manifest: Manifest, teacher: Teacher) -> None:
    """Raise UserError unless the pairs are this teacher's, naming what differs."""
    lines = []
    for label, sha256 in teacher.weights_sha256.items():
        theirs = manifest.weights.get(label, "")
        if theirs != sha256:
            what = "codebook and tokenizer" if label == "tokenizer" else label
            lines.append(f"their {what} has the hash {theirs[:16]}…, {teacher.name} has {sha256[:16]}…")
    if manifest.groups != tuple(teacher.groups):
        lines.append(f"their images have {len(manifest.groups)} groups, not {len(teacher.groups)}")
    if lines:
        raise UserError(
            f"the pairs in {folder} were made by {manifest.teacher}, another teacher than {teacher.name}: "
            + "; ".join(lines)
            + ". Name theirs with --teacher, --weights and --tokenizer"
        )


class Lines:
    """A progress bar with the latest figures, and lines above it; where no terminal is, a line now and then."""

    def __init__(self, console: Console, bar: Progress, steps: int, name: str) -> None:
        self.console, self.bar = console, bar
        self.task = bar.add_task(name, total=steps, figures="")
        self.shown: dict[str, float] = {}

    def step(self, step: int, figures: dict[str, float]) -> None:
        text = ""
        if figures:
            text = f"loss {figures['loss']:.4f}"
            if "mfu" in figures:  # not at the first step, which warms up
                text += f"  {figures['pairs_per_s']:.4g} pairs/s  MFU {figures['mfu']:.0%}"
        self.bar.update(self.task, completed=step, figures=text)
        if figures and figures is not self.shown and not self.console.is_terminal:
            self.shown = figures
            self.say(f"step {step}: {text}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
