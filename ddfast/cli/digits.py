"""``ddfast digits``: train the bundled digits teachers from nothing, or measure their weights."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from ..digits.train import CLASSIFIER, NAMES, Report, measure_files, measure_students, train_digits, write_report
from ..files import write_atomic
from ..models.zoo import BUNDLED
from .progress import progress_bar

DESCRIPTION = """\
The digits teachers that ship with ddfast are trained by ddfast, on scikit-learn's 1797 handwritten digits.

train makes all three files (classifier, digits-var, digits-llamagen) from nothing, in minutes on two cores; eval
measures the files. Both need scikit-learn: pip install 'ddfast[digits]'."""

EPILOG = """\
examples:
  ddfast digits train --out digits/
  ddfast digits train --out digits/ --only var --seed 1
  ddfast digits eval                        # the weights that ship with ddfast
  ddfast digits eval digits/
  ddfast digits eval --student runs/digits-var   # what `ddfast train` made, beside the teacher
  ddfast pairs --teacher digits/digits-var.safetensors --num 2000 --out pairs/
"""
ONLY = {name.removeprefix("digits-"): name for name in NAMES}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "digits",
        help="train or measure the bundled digits teachers",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="what to do", metavar="train | eval", required=True)
    train = actions.add_parser("train", help="train tokenizers, teachers and the classifier; then measure them")
    train.add_argument("--out", type=Path, default=Path("digits"), metavar="DIR", help="folder to fill (digits)")
    train.add_argument("--only", choices=list(ONLY), help="train one file (default: all three)")
    train.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    train.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="multiplies all steps (default: 1)")
    train.set_defaults(func=train_command)
    evaluate = actions.add_parser("eval", help="measure the weights: accuracy, Frechet distance, PSNR")
    evaluate.add_argument("folder", type=Path, nargs="?", default=BUNDLED, help="default: ddfast's own weights")
    evaluate.add_argument("--only", choices=list(ONLY), help="measure one file (default: all three)")
    evaluate.add_argument(
        "--student",
        type=Path,
        action="append",
        metavar="RUN",
        help="a student, measured beside its teacher; may be repeated",
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    evaluate.set_defaults(func=eval_command)


def chosen(only: str | None) -> tuple[str, ...]:
    return NAMES if only is None else (ONLY[only],)


def train_command(args: argparse.Namespace) -> int:
    names, console, begin = chosen(args.only), Console(stderr=True), time.monotonic()
    with progress_bar(console, TextColumn("loss {task.fields[loss]:.4f}")) as bar:
        stages = StageBars(bar)
        train_digits(args.out, names, args.seed, args.steps_scale, stages)
    seconds = time.monotonic() - begin
    with console.status("measuring"):
        report = measure_files(args.out, names)
    path = write_report(args.out, report, seconds)
    print_report(report)
    print(f"{args.out}: {', '.join(names)} in {seconds:.0f} s; figures in {path}")
    return 0


def eval_command(args: argparse.Namespace) -> int:
    with Console(stderr=True).status("measuring"):
        report = measure_students(args.student) if args.student else measure_files(args.folder, chosen(args.only))
    print_report(report)
    if args.json is not None:
        write_atomic(args.json, (json.dumps(report, indent=2) + "\n").encode())
    return 0


class StageBars:
    """One progress bar a stage, with its latest loss."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, Any] = {}

    def __call__(self, stage: str, step: int, steps: int, loss: float) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=steps, loss=loss)
        self.bar.update(self.tasks[stage], completed=step, loss=loss)


def print_report(report: Report) -> None:
    """The figures as a table, one row a way of sampling; the two that are of one model alone below it."""
    title = "digits, 5,000 samples a row; FD: Frechet distance to the real data, FD_T: to the teacher's samples"
    table = Table("model", "sampled by", "accuracy", "FD", "FD_T", title=title)
    lines = []
    for name, entry in report.items():
        if name == CLASSIFIER:
            lines.append(f"{name}: test accuracy {entry['test_accuracy']:.4f}")
        if "tokenizer_test_psnr_db" in entry:
            lines.append(f"{name}: tokenizer PSNR on the test digits {entry['tokenizer_test_psnr_db']:.2f} dB")
        for way, figures in entry.items():
            if isinstance(figures, dict):
                far = figures.get("fd_teacher")
                shown = "-" if far is None else f"{far:.3f}"
                table.add_row(name, way, f"{figures['accuracy']:.4f}", f"{figures['fd']:.3f}", shown)
    if table.rows:
        Console().print(table)
    for line in lines:
        print(line)
