"""What every command prints through: text as it is, and progress, as a bar or, without a terminal, as lines."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

FIRST, EVERY = 5.0, 30.0  # seconds until the first line, and between two


def console(stderr: bool = True, quiet: bool = False) -> Console:
    """A console that takes names and paths as they are: brackets are no markup, numbers no colours."""
    return Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)


class Bar(Progress):
    """A progress bar; where its console is no terminal, a line every so often instead, unless ``lines`` is False."""

    def __init__(self, shown: Console, *columns: ProgressColumn, lines: bool = True) -> None:
        left = TimeRemainingColumn(), TextColumn("left")
        done = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
        self._lines = lines and not shown.is_terminal and not shown.quiet
        self._said: dict[TaskID, float] = {}
        self._over = threading.Event()
        super().__init__(*done, *columns, *left, console=shown, disable=not shown.is_terminal)

    def __enter__(self) -> Bar:
        super().__enter__()
        if self._lines:
            threading.Thread(target=self._speak, name="ddfast-progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        super().__exit__(kind, error, trace)

    def _speak(self) -> None:
        wait = FIRST
        while not self._over.wait(wait):
            wait = EVERY
            for task in self.tasks:
                if self._said.get(task.id) != task.completed or not task.finished:
                    self._said[task.id] = task.completed
                    self.console.print(self.line(task), soft_wrap=True)

    def line(self, task: Task) -> str:
        """How far a task is, in words."""
        total = "" if task.total is None else f" of {task.total:,.0f} ({task.percentage:.0f}%)"
        more = "".join(f", {value}" for value in task.fields.values() if value)
        more += f", {task.speed:.3g}/s" if task.speed else ""
        left = "" if task.time_remaining is None else f", {_clock(task.time_remaining)} left"
        return f"{task.description}: {task.completed:,.0f}{total}{more}, {_clock(task.elapsed or 0)}{left}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def progress_bar(shown: Console, *columns: ProgressColumn, lines: bool = True) -> Bar:
    """What is done, how much of it, ``columns``, and the time left."""
    return Bar(shown, *columns, lines=lines)
