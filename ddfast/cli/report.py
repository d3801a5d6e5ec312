"""``ddfast report``: the paper's tables and curves for a teacher and its students, on one page."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import UserError
from ..evaluation.reference import load_reference
from ..files import check_folder, locked, unlock
from ..hardware import cpu_name
from ..models import Distilled, load_student
from ..pairs import PairDataset
from ..records import check_if_signed, read_json, restore
from ..report import Report, Study, digits, write_page
from ..report.plots import check_matplotlib
from ..report.run import Examiner, Settings, Subject
from ..sampling import Marginals, Sampler
from ..training.config import DIGITS
from .eval import check_reference, chosen_extractor
from .models import open_teacher, parse_groups
from .progress import console, progress_bar
from .shared import announce, choose_device, chosen_dtype

OWN = ("pairs", "runs", "figures", "report.html", "report.md", "report.json", "*-compare.png")
NOTES = [
    "Every way starts from the same noise; a sample's class is its number modulo the classes.",
    "Milliseconds count everything from noise to pixels, in batches of the size named, by the first student.",
    "skip-n leaves out the teacher's last n groups, which then add nothing to the image (where every token has a place "
    "of its own, they are zeros); onestep* draws each token by its frequency in the pairs of the class (Prop. 3.1).",
    "pre-trained-n-m is the paper's name, counted from 1: the student up to step n, the teacher up to m, the student.",
]


def run(args: argparse.Namespace) -> int:
    check_matplotlib()
    check_options(args)
    check_folder(args.out, "report", names=OWN)
    with held(args.out):
        studies = digits_studies(args) if args.what else [other_study(args)]
        title = "Distilled Decoding: " + ", ".join(study.teacher for study in studies)
        page = Report(title, hardware(choose_device(args.device)), str(datetime.date.today()), studies, NOTES)
        write_page(args.out, page)
    for study in studies:
        print(said(study))
    print(f"{args.out / 'report.html'}, report.md, report.json")
    return 0


@contextmanager
def held(out: Path) -> Iterator[None]:
    """A folder that is made, and this process's alone; where nothing came of it, it is gone again."""
    absent = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = locked(out)
    try:
        yield
    finally:
        unlock(lock, out)
        if absent and not any(out.iterdir()):
            out.rmdir()


def check_options(args: argparse.Namespace) -> None:
    """Refuse what belongs to the other form, and numbers that cannot be."""
    digits_only = {name: getattr(args, name) for name in ("teachers", "seeds", "num_pairs", "steps_scale")}
    others = ("teacher", "teacher_weights", "student", "weights", "tokenizer", "pairs", "by_pairs", "reference")
    others_only = {name: getattr(args, name) for name in (*others, "inception")}
    wrong = [name for name, value in (others_only if args.what else digits_only).items() if value is not None]
    if wrong:
        option = "--" + wrong[0].replace("_", "-")
        raise UserError(f"{option} goes with {'--teacher and --student' if args.what else '`ddfast report digits`'}")
    if not args.what and (args.teacher is None or not args.student):
        raise UserError("`ddfast report` needs `digits`, or --teacher and --student; see `ddfast report --help`")
    for name in ("num", "teacher_num", "batch"):
        value = getattr(args, name)
        if value is not None and value < (1 if name == "batch" else 2):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {1 if name == 'batch' else 2}")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed is {args.seed}; it must lie in [0, 2^31)")
    if args.weights is not None and len(args.student) > 1:
        raise UserError("--weights are of one student; several are read from their runs or files")
    if args.what:
        args.digits = True
    check_reference(args)
    settings_of(args)


def settings_of(args: argparse.Namespace) -> Settings:
    small = args.digits
    num = args.num or 5000
    batches = args.time_batches.split(",")
    if not all(b.strip().isascii() and b.strip().isdecimal() and 0 < int(b) < 10**6 for b in batches):
        raise UserError(f"--time-batches {args.time_batches!r} is no list of batches like 1,64")
    return Settings(
        num=num,
        teacher_num=args.teacher_num or (4 * num if small else num),
        batch=args.batch or (500 if small else 16),
        time_batches=tuple(int(b) for b in batches),
        involved=None if args.teacher_groups is None else tuple(map(parse_groups, args.teacher_groups)),
        skips=None if args.skip is None else tuple(args.skip),
        seed=args.seed,
    )


def digits_studies(args: argparse.Namespace) -> list[Study]:
    """Pairs and students from nothing, and a study of each teacher."""
    names = tuple(args.teachers.split(",")) if args.teachers else tuple(DIGITS)
    given = {"pairs": args.num_pairs, "seeds": args.seeds, "steps_scale": args.steps_scale}
    plan = digits.DigitsPlan(
        args.out, names, device=args.device, **{name: value for name, value in given.items() if value is not None}
    )
    shown = console()
    commands = len(plan.making()) + len(plan.training())
    shown.print(f"{commands} commands make the pairs and students of {', '.join(names)} in {args.out}", soft_wrap=True)
    with progress_bar(shown) as bar:
        jobs = bar.add_task("pairs and students", total=commands)

        def told(name: str) -> None:
            bar.advance(jobs)
            shown.print(f"made: {name}", soft_wrap=True)

        digits.prepare(plan, told)
    studies = []
    for name in names:
        args.teacher = name
        runs = [plan.run(name, plan.pairs, seed) for seed in range(plan.seeds)]
        by_pairs = {size: [opened(args, plan.run(name, size, 0))] for size in plan.sizes}
        pairs = plan.pairs_folder(name, plan.pairs)
        studies.append(study(args, [opened(args, run) for run in runs], runs, by_pairs, pairs))
    return studies


def opened(args: argparse.Namespace, name: str | Path) -> Distilled:
    """A student, as the command line has it computed."""
    device = choose_device(args.device)
    tokenizer = None if Path(name).exists() else args.tokenizer
    return load_student(name, args.weights, tokenizer, dtype=chosen_dtype(args.dtype, device), device=device)


def other_study(args: argparse.Namespace) -> Study:
    """A study of what the command line names."""
    students = [opened(args, name) for name in args.student]
    runs = [Path(name) for name in args.student if (Path(name) / "checkpoints").is_dir()]
    by_pairs = {pairs_of(run): [opened(args, run)] for run in args.by_pairs or ()}
    if by_pairs and runs:
        by_pairs.setdefault(pairs_of(runs[0]), students[:1])
    return study(args, students, runs if len(runs) == len(students) else [], by_pairs, args.pairs)


def study(
    args: argparse.Namespace,
    students: Sequence[Distilled],
    runs: Sequence[Path],
    by_pairs: dict[int, list[Distilled]],
    pairs: Path | None,
) -> Study:
    device = choose_device(args.device)
    extractor = chosen_extractor(args, device)
    marginals = None if pairs is None else Marginals(PairDataset(pairs))
    drawing = open_teacher(args, args.teacher, device, students[0])
    for student in (*students, *(s for several in by_pairs.values() for s in several)):
        Sampler(student, drawing, marginals)  # refuses what does not belong together
    subject = Subject(students, drawing, marginals, runs, by_pairs)
    facts: dict[str, Any] = {"dtype": str(chosen_dtype(args.dtype, device)).removeprefix("torch.")}
    if marginals is not None:
        facts["pairs"] = marginals.dataset.manifest.num
    what = (
        f"study of {args.teacher}, {len(students)} students, {settings_of(args).num:,} samples a figure, to {args.out}"
    )
    announce(console(), what, device, facts["dtype"], settings_of(args).batch)
    with progress_bar(console()) as bar:
        task, settings = bar.add_task(args.teacher), settings_of(args)

        def told(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{args.teacher}: {stage}", completed=done, total=total)

        reference = load_reference(args.reference, extractor, settings.batch, told)
        return Examiner(subject, settings, extractor, reference, told).study(args.out, facts)


def pairs_of(run: Path) -> int:
    """How many pairs a run trained on, as its config.json says."""
    try:
        note = restore(dict[str, Any], read_json(run / "config.json"), "config.json")
        note = check_if_signed(note, run / "config.json", "name another run")
        config = restore(dict[str, Any], note.get("config"), "config")
        num, holdout = restore(int, note.get("num_pairs"), "num_pairs"), restore(int, config.get("holdout"), "holdout")
    except UserError as error:
        raise UserError(
            f"{run} does not say how many pairs it trained on; is it a run of `ddfast train`? ({error})"
        ) from error
    if not 0 < holdout < num:
        raise UserError(f"{run} says that {holdout} of its {num} pairs were held out, which cannot be")
    return num - holdout


def hardware(device: torch.device) -> str:
    """What the milliseconds are of; names no machine."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, ddfast {__version__}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ddfast {__version__}"


def said(study: Study) -> str:
    """The rows in a line each."""
    lines = [f"{study.teacher}: {study.metric} over {study.facts['seeds']} seeds"]
    for row in study.rows:
        values = row.values[study.metric]
        lines.append(f"  {row.name:24s} {row.passes:4d} passes  {sum(values) / len(values):8.3f}")
    return "\n".join(lines)
