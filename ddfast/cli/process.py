"""What holds while a command works: signals, the terminal's encoding, and notes to the user."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Notes(logging.Handler):
    """Warnings of the library as `note: ...`, on the first rank alone."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK") in (None, "", "0") and sys.stderr is not None:
            print(f"note: {record.getMessage()}", file=sys.stderr, flush=True)


def imported(name: str) -> ModuleType:
    """A module. A Ctrl-C meanwhile counts when it is there: libraries swallow one, and are broken by it."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        return importlib.import_module(name)
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        module = importlib.import_module(name)
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
    return module


@contextmanager
def prepared() -> Iterator[None]:
    """SIGTERM and SIGHUP (of `timeout`, Slurm, a closed terminal) end the command as Ctrl-C does, so that nothing half
    done stays; characters that the terminal lacks, and bytes in paths that are none, are printed as escapes."""
    log, handler, before = logging.getLogger("ddfast"), Notes(), dict[Any, Any]()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _interrupt)
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
