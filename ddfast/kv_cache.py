"""The keys and values of a transformer, allocated once and used for batch after batch."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from .errors import UserError


def _huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Main memory in pages of 2 MiB where the system has them: attention walks over all of it, a few KiB at a time."""
    size = math.prod(shape) * dtype.itemsize
    if size < 2**22 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KVCache:
    """Keys and values of every layer, and how many positions they hold.

    The length is kept twice: as ``start`` on the host, which knows how far it has come, and as ``length`` int32 [1] on
    the device, where kernels of a captured CUDA graph read and advance it.

    Axes: N layers, R rows, H heads of keys and values, L positions, d head width.

    Args:
        layers, rows, heads, positions, width: N, R, H, L, d.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, positions: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if device.type == "cpu":  # heads side by side: attention of one query reads a row's from front to back
            memory = _huge_pages((layers, 2, rows, positions, heads, width), dtype)
            self.data_N2RHLd = memory.transpose(3, 4)
        else:
            shape = (layers, 2, rows, heads, positions, width)
            self.data_N2RHLd = torch.empty(shape, dtype=dtype, device=device)
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.start = 0
        self._layers: dict[int, list[Tensor]] = {}

    @property
    def positions(self) -> int:
        """L"""
        return self.data_N2RHLd.shape[4]

    def layers(self, rows: int) -> list[Tensor]:
        """Each layer's [2, rows, H, L, d], of the first rows."""
        if rows not in self._layers:
            self._layers[rows] = list(self.data_N2RHLd[:, :, :rows].unbind(0))
        return self._layers[rows]

    def advance(self, count: int) -> None:
        """Count positions that every layer has been given. Waits for no device.

        Raises:
            UserError: they are more than there is room for.
        """
        if self.start + count > self.positions:
            raise UserError(
                f"the KV cache holds {self.positions} positions: {count} more do not fit after {self.start}"
            )
        self.start += count
        self.length.add_(count)

    def clear(self) -> None:
        """Forget every position, for the next batch."""
        self.start = 0
        self.length.zero_()
