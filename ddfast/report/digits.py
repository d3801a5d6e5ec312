"""The digits report from nothing: pairs, students of every seed and size, by the commands a user would run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError, WorkError
from ..training.config import DIGITS, RECIPES

HOLDOUT = RECIPES["digits"].holdout
SMALLER = (0.1, 0.3)  # of the pairs, for the curve over their number
CHECKPOINTS = 5  # of a run, for the curve over training


@dataclass(frozen=True)
class DigitsPlan:
    """What a digits report is made of.

    Attributes:
        folder: of the report; pairs and runs are kept in it.
        teachers: names.
        pairs: the students train on.
        seeds: students of each teacher.
        steps_scale: multiplies the recipe's optimiser steps.
        device: that the commands are given.
    """

    folder: Path
    teachers: tuple[str, ...]
    pairs: int = 20_000
    seeds: int = 1
    steps_scale: float = 1.0
    device: str = "auto"

    def __post_init__(self) -> None:
        unknown = set(self.teachers) - set(DIGITS)
        if unknown:
            raise UserError(f"{', '.join(sorted(unknown))} does not ship with ddfast; there are {', '.join(DIGITS)}")
        if self.pairs < 100:
            raise UserError(f"--num-pairs is {self.pairs}; it must be at least 100")
        if self.seeds < 1:
            raise UserError(f"--seeds is {self.seeds}; it must be at least 1")
        if not 0 < self.steps_scale <= 100:
            raise UserError(f"--steps-scale is {self.steps_scale}; it must lie in (0, 100], 1 being the recipe")

    @property
    def sizes(self) -> list[int]:
        """Numbers of pairs, rising; the last one is what the students of the table train on."""
        return [*(round(self.pairs * share) for share in SMALLER), self.pairs]

    def pairs_folder(self, teacher: str, size: int) -> Path:
        return self.folder / "pairs" / f"{teacher}-{size}"

    def run(self, teacher: str, size: int, seed: int) -> Path:
        return self.folder / "runs" / f"{teacher}-{size}-seed{seed}-x{self.steps_scale:g}"

    def making(self) -> dict[str, list[str]]:
        """Commands that make the pairs, by a name of each."""
        return {
            f"pairs of {teacher}, {size}": [
                *("pairs", "--teacher", teacher, "--num", str(size + HOLDOUT), "--device", self.device),
                *("--out", str(self.pairs_folder(teacher, size))),
            ]
            for teacher in self.teachers
            for size in self.sizes
        }

    def training(self) -> dict[str, list[str]]:
        """Commands that train the students: all seeds on all pairs, the first on fewer."""
        commands = {}
        for teacher in self.teachers:
            steps = max(CHECKPOINTS, round(int(DIGITS[teacher]["steps"]) * self.steps_scale))
            for size in self.sizes[::-1]:
                for seed in range(self.seeds if size == self.pairs else 1):
                    commands[f"student of {teacher}, {size} pairs, seed {seed}"] = [
                        *("train", "--teacher", teacher, "--pairs", str(self.pairs_folder(teacher, size))),
                        *("--seed", str(seed), "--steps", str(steps), "--device", self.device),
                        *("--save-every", str(-(-steps // CHECKPOINTS)), "--keep", str(CHECKPOINTS + 1)),
                        *("--out", str(self.run(teacher, size, seed))),
                    ]
        return commands


def prepare(plan: DigitsPlan, progress: Callable[[str], None]) -> None:
    """Run every command of ``plan``, on a GPU one at a time, on a CPU one a core; ``progress`` is told of each that is
    done.

    What is there already stays: a command goes on from where it stopped.

    Raises:
        WorkError: a command failed; the error ends with what it said.
    """
    for commands in (plan.making(), plan.training()):
        gpu = plan.device != "cpu" and torch.cuda.is_available()
        workers = 1 if gpu else max(1, min(len(commands), os.cpu_count() or 1))
        environment = dict(os.environ) if workers == 1 else os.environ | {"OMP_NUM_THREADS": "1"}
        with ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(_run, name, words, environment) for name, words in commands.items()]
            try:
                for task in tasks:
                    progress(task.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _run(name: str, words: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-m", "ddfast", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"{name} failed ({done.returncode}): ddfast {' '.join(words)}\n{done.stderr[-2000:]}")
    return name
