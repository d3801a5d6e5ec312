"""The compiled extension ``ddfast._C``, if it was built: typed wrappers that pass tensors as addresses.

Nothing is checked here; ``ddfast.ops`` checks at its door. An extension that is there but does not load is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    import ddfast._C as _C
except ModuleNotFoundError as error:
    if error.name != "ddfast._C":
        raise
    _AVAILABLE = False
else:
    _AVAILABLE = True


def available() -> bool:
    """Whether the extension is there."""
    return _AVAILABLE


def cuda_built() -> bool:
    """Whether the extension holds CUDA kernels (a GPU may still be absent)."""
    return _AVAILABLE and _C.cuda_built


def cpu_levels() -> list[str]:
    """The instruction sets the CPU loops can use on this machine, best first, ending in "baseline"."""
    return _C.cpu_levels() if _AVAILABLE else []


@contextmanager
def cpu_level(name: str) -> Iterator[None]:
    """Run the CPU loops with one of ``cpu_levels()``, for tests and benches. All give the same bits."""
    before = _C.cpu_level()
    _C.set_cpu_level(name)
    try:
        yield
    finally:
        _C.set_cpu_level(before)


def normal_noise(seed: int, pairs: Tensor, start: int, stop: int, channels: int, out: Tensor) -> None:
    """Write ``ddfast.noise.normal_noise(seed, pairs, start, stop, channels)`` to ``out``.

    ``pairs`` int64 [B] and ``out`` float32 [B, stop - start, channels] are contiguous and on one device: the CPU, or a
    CUDA device, where the work joins the current stream.
    """
    size = (start, stop, channels, out.data_ptr())
    if out.is_cuda:
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream().cuda_stream
            _C.normal_noise_cuda(seed, pairs.data_ptr(), pairs.numel(), *size, stream)
    else:
        _C.normal_noise_cpu(seed, pairs.data_ptr(), pairs.numel(), *size)
