"""``ddfast digits``: train the bundled digits teachers from nothing, or measure their weights."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..digits.train import CLASSIFIER, NAMES, Report, measure_files, train_digits, write_report
from ..models.zoo import BUNDLED

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
    evaluate.set_defaults(func=eval_command)


def chosen(only: str | None) -> tuple[str, ...]:
    return NAMES if only is None else (ONLY[only],)


def train_command(args: argparse.Namespace) -> int:
    names, console, begin = chosen(args.only), Console(stderr=True), time.monotonic()
    with progress_bar(console) as bar:
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
        report = measure_files(args.folder, chosen(args.only))
    print_report(report)
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


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


def print_report(report: Report) -> None:
    """The figures as a table, one row a measurement."""
    table = Table("model", "what", "value", title="digits (5,000 samples a row; FD: Frechet distance to the real data)")
    for name, entry in report.items():
        if name == CLASSIFIER:
            table.add_row(name, "test accuracy", f"{entry['test_accuracy']:.4f}")
            continue
        table.add_row(name, "tokenizer PSNR on the test digits", f"{entry['tokenizer_test_psnr_db']:.2f} dB")
        for way in ("teacher", "flow map"):
            table.add_row(name, f"{way}: accuracy, FD", f"{entry[way]['accuracy']:.4f}, {entry[way]['fd']:.3f}")
    Console().print(table)
