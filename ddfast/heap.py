"""The C heap of a process that frees and allocates large tensors all the time."""

from __future__ import annotations

import ctypes
import sys

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Hold on to freed memory for the next tensor, where the C library is glibc; elsewhere nothing changes.

    glibc gives blocks over 32 MiB back to the system at once, and the system clears every page of the next one: a large
    share of a training step's time on a CPU.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
