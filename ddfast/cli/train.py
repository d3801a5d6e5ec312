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
from ..files import check_folder, file_sha256, is_file, locked, say_once, write_atomic
from ..hardware import missing_compiler
from ..models import STUDENTS, TEACHERS, Teacher, load_student, load_teacher
from ..models.checkpoints import Part, make_part
from ..models.distilled import RUN_FILE, read_sampled, save_student
from ..models.student import Student
from ..models.zoo import load_tokenizer, teacher_name
from ..pairs import Manifest, PairDataset, describe
from ..pairs.manifest import Shape, check_origin
from ..records import checksum, differences, read_object, signed
from ..training.checkpoint import steps_saved
from ..training.config import DIGITS, RECIPES, Run, TrainConfig, recipe
from ..training.distance import make_distance
from ..training.monitor import tensorboard_installed
from ..training.objective import Objective
from ..training.parallel import Ranks, joined
from ..training.source import OnlinePairs, Source, StoredPairs
from ..training.trainer import Trainer
from .progress import console, progress_bar
from .shared import announce, choose_device, parse_timesteps

CONFIG_FILE = "config.json"
ONLINE_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # as `ddfast pairs` chooses


def train(args: argparse.Namespace) -> int:
    if args.online == (args.pairs is not None):
        raise UserError("`ddfast train` needs either --pairs DIR or --online; see `ddfast train --help` for examples")
    check_run_folder(args.out)
    config, device = chosen_config(args), choose_device(args.device)
    run = chosen_run(args, config, device)
    with joined(device) as ranks:
        run.pieces(config.batch, ranks.world)
        return run_training(args, config, run, device, ranks)


def check_run_folder(out: Path) -> None:
    """Raise UserError where a run can neither begin nor go on."""
    check_student(out, None, 0)
    check_folder(out, "run of `ddfast train`", is_run)


def check_student(out: Path, run: str | None, first_save: int) -> None:
    """Raise UserError where training would begin anew over a student whose checkpoints are gone.

    One is left without them by a run that was killed within its first save: the same ``run``, not beyond the step
    ``first_save``, loses nothing. ``run`` None: not known yet, so that only what is of no run is refused.
    """
    if not is_file(out / RUN_FILE) or steps_saved(out):
        return
    try:
        there = read_sampled(out / RUN_FILE)
        fine = there.run is not None and (run is None or there.run == run and (there.step or 0) <= first_save)
    except UserError:
        fine = False
    if not fine:
        raise UserError(
            f"{out} holds a student but none of its checkpoints, from which training could go on; it would be written "
            f"over. Choose another --out; --start {out} begins there with its weights"
        )


def is_run(folder: Path) -> bool:
    note = read_object(folder / CONFIG_FILE)
    return bool(steps_saved(folder)) or note is not None and {"config", "run"} <= note.keys()


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
        shape = Shape.of(teacher.groups, teacher.codebook, teacher.num_classes)
        check_origin(args.pairs, dataset.manifest, teacher.name, teacher.weights_sha256, shape)
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
    return name if name is None or not is_file(Path(name)) else file_sha256(Path(name))


def run_training(args: argparse.Namespace, config: TrainConfig, run: Run, device: torch.device, ranks: Ranks) -> int:
    """Put the parts together, train, and say what came of it."""
    shown = console(quiet=not ranks.first)
    vq: Part = load_tokenizer(args.teacher, args.tokenizer)
    tokenizer: Any = vq.build(torch.float32, device)
    distance = make_distance(
        config.distance, tokenizer, lpips_weights=args.lpips_weights, features=args.features, device=device
    )
    made = gather(args, config, run, device, ranks)
    student, manifest, identity = made.student, made.manifest, made.identity
    own = {
        "teacher_sha256": identity["weights"].get("transformer"),
        "run": checksum(identity | {"config": config.to_dict()}),
    }
    check_student(args.out, own["run"], min(run.save_every, config.steps))

    def keep_student(weights: dict[str, Tensor], step: int) -> None:
        part = make_part(student.kind, student.settings, weights, "the moving average")
        split = config.split_of(student.groups)
        save_student(args.out / RUN_FILE, name, part, vq, config.timesteps, split, manifest.teacher, step=step, **own)

    name = f"{manifest.teacher}-student"
    count = sum(p.numel() for p in student.parameters())
    with (
        progress_bar(shown, TextColumn("{task.fields[figures]}", markup=False), lines=False) as bar,
        ExitStack() as held,
    ):
        begun = args.out.is_dir() and is_run(args.out)
        if ranks.first and begun:
            held.enter_context(locked(args.out))
        report = Lines(shown, bar, config.steps, name)
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
        trainer.check_room()
        if ranks.first:
            args.out.mkdir(parents=True, exist_ok=True)
            if not begun:  # a folder that is refused stays as it is
                held.enter_context(locked(args.out))
            note = {"config": config.to_dict(), "run": {f.name: getattr(run, f.name) for f in fields(Run)}} | identity
            note |= {"num_pairs": manifest.num, "format": 2}  # before it had a checksum it said none
            write_atomic(args.out / CONFIG_FILE, (json.dumps(signed(note), indent=1, sort_keys=True) + "\n").encode())
            if not tensorboard_installed():
                report.say("tensorboard is not installed, so its curves are left out: pip install 'ddfast[train]'")
        passes = f"{trainer.accumulate} pass{'es' * (trainer.accumulate > 1)}"
        what = (
            f"{name} to {args.out}: {count / 1e6:.4g} M weights, {config.steps} steps of {config.batch} pairs "
            f"in {passes} on {ranks.world} rank{'s' * (ranks.world > 1)}"
        )
        announce(shown, what, device, run.precision, None)
        if isinstance(made.source, StoredPairs) and config.batch > made.source.count:
            report.say(
                f"note: a batch of {config.batch} is more than the {made.source.count} pairs there are to train on, so "
                "each is seen several times a step; make more pairs, or choose a smaller --batch"
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


def chosen_run(args: argparse.Namespace, config: TrainConfig, device: torch.device) -> Run:
    names = {f.name for f in fields(Run)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    given["precision"] = fastest(device) if args.precision == "auto" else args.precision
    given["compile"] = chosen_compile(args.compile, device)
    often = max(1, min(5000, config.steps // 5))
    return Run(**{"eval_every": often, "save_every": often} | given)


def chosen_compile(wanted: str, device: torch.device) -> bool:
    """--compile; ``auto`` is on a GPU where something there can compile, and says so if not."""
    lack = missing_compiler(device) if wanted == "on" or wanted == "auto" and device.type == "cuda" else None
    if lack and wanted == "on":
        raise UserError(f"--compile on: {lack}")
    if lack:
        say_once(f"{lack}; until then blocks are not compiled, which is slower")
    return not lack and (wanted == "on" or wanted == "auto" and device.type == "cuda")


def fastest(device: torch.device) -> str:
    """bfloat16 where the hardware multiplies it."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _native.multiplies_bfloat16() else "float32"


class Lines:
    """A progress bar with the latest figures, and lines above it; where no terminal is, a line now and then."""

    def __init__(self, shown: Console, bar: Progress, steps: int, name: str) -> None:
        self.console, self.bar = shown, bar
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
        self.console.print(text, soft_wrap=True)
