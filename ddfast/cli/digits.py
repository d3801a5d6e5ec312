"""``ddfast digits``: train the bundled digits teachers from nothing, or measure their weights."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from ..digits.evaluate import SAMPLES
from ..digits.train import (
    CLASSIFIER,
    NAMES,
    REPORT_FILE,
    Report,
    measure_files,
    measure_students,
    train_digits,
    write_report,
)
from ..files import check_file, check_folder, replacing, starts_with
from ..models.zoo import BUNDLED
from .options.digits import ONLY
from .progress import console, progress_bar


def chosen(only: str | None) -> tuple[str, ...]:
    return NAMES if only is None else ({name.removeprefix("digits-"): name for name in NAMES}[only],)


def train_command(args: argparse.Namespace) -> int:
    assert set(ONLY) == {name.removeprefix("digits-") for name in NAMES}
    check_folder(
        args.out, "weights of `ddfast digits train`", names=(*(f"*{n}.safetensors" for n in ONLY), REPORT_FILE)
    )
    names, shown, begin = chosen(args.only), console(), time.monotonic()
    shown.print(f"{', '.join(names)} to {args.out}, on the CPU", soft_wrap=True)
    with progress_bar(shown, TextColumn("{task.fields[loss]}")) as bar:
        stages = StageBars(bar)
        train_digits(args.out, names, args.seed, args.steps_scale, stages)
    seconds = time.monotonic() - begin
    say_measuring(shown)
    report = measure_files(args.out, names)
    path = write_report(args.out, report, seconds)
    print_report(report)
    print(f"{args.out}: {', '.join(names)} in {seconds:.0f} s; figures in {path}")
    return 0


def eval_command(args: argparse.Namespace) -> int:
    if args.json is not None:
        check_file(args.json, "JSON", starts_with(b"{"))
    say_measuring(console())
    folder = args.folder or BUNDLED
    report = measure_students(args.student) if args.student else measure_files(folder, chosen(args.only))
    print_report(report)
    if args.json is not None:
        with replacing(args.json) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
    return 0


def say_measuring(shown: Console) -> None:
    shown.print(f"measuring: {SAMPLES:,} samples a row, on the CPU; a minute or two")


class StageBars:
    """One progress bar a stage, with its latest loss."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, Any] = {}

    def __call__(self, stage: str, step: int, steps: int, loss: float) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=steps, loss="")
        self.bar.update(self.tasks[stage], completed=step, loss=f"loss {loss:.4f}")


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
        console(stderr=False).print(table)
    for line in lines:
        print(line)
