"""The progress bar of every command."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """What is done, how much of it, ``columns``, and the time left."""
    left = TimeRemainingColumn(), TextColumn("left")
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns, *left, console=console
    )
