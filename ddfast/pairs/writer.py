"""A thread that writes while the device computes, with a fixed number of buffers between the two."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Writer(Generic[T]):
    """Calls ``write(number, buffer)`` in a thread of its own, in the order of :meth:`put`.

    Buffers go round: :meth:`take` an idle one, fill it, :meth:`put` it; it is idle again once written. So memory does
    not grow however slow the disk is, and the taker waits instead. Leaving the ``with`` block waits until all that was
    put is written, also on Ctrl-C (a second one does not wait). An error in ``write`` is raised by the next call here;
    nothing is written after it.
    """

    def __init__(self, write: Callable[[int, T], None], buffers: Iterable[T]) -> None:
        self._write = write
        self._idle: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[int, T] | None] = queue.SimpleQueue()
        for buffer in buffers:
            self._idle.put(buffer)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="ddfast-writer", daemon=True)

    def _work(self) -> None:
        try:
            while (work := self._full.get()) is not None:
                self._write(*work)
                self._idle.put(work[1])
        except BaseException as error:  # noqa: BLE001 - raised in the other thread
            self._error = error
            self._idle.put(None)  # wakes a taker

    def check(self) -> None:
        """Raise what has gone wrong in the thread, if anything has."""
        if self._error is not None:
            raise self._error

    def take(self) -> T:
        """An idle buffer, waiting for one."""
        buffer = self._idle.get()
        self.check()
        assert buffer is not None
        return buffer

    def put(self, number: int, buffer: T) -> None:
        """Have a buffer written."""
        self.check()
        self._full.put((number, buffer))

    def __enter__(self) -> Writer[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._full.put(None)
        self._thread.join()
        if kind is None:
            self.check()
