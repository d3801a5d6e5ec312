"""One entry for each fused operation: shapes are checked here once, then the fastest path that is there runs.

Every path gives the same result: :func:`normal_noise` to the last bit, :func:`flow_tokens` up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from . import _native, noise
from .errors import UserError
from .flow import LogitFilter, filter_logits, flow_tokens

__all__ = ["LogitFilter", "backend", "filter_logits", "flow_tokens", "forced", "normal_noise"]

Backend = Literal["native", "torch"]
_forced: Backend | None = None


@contextlib.contextmanager
def forced(name: Backend) -> Iterator[None]:
    """Run operations on one path, for tests and benches; an absent one is an error."""
    global _forced
    if name == "native" and not _native.available():
        raise UserError("the compiled extension ddfast._C is not installed; reinstall with a C++ compiler at hand")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(device: torch.device) -> Backend:
    """The path taken on ``device``: the compiled one where it was built."""
    if _forced is not None:
        return _forced
    built = _native.available() and (device.type == "cpu" or (device.type == "cuda" and _native.cuda_built()))
    return "native" if built else "torch"


def normal_noise(seed: int, pairs: Tensor, start: int, stop: int, channels: int) -> Tensor:
    """Standard normal noise of some pairs (defined in :mod:`ddfast.noise`), the same bits on every path and device.

    Args:
        seed: in [0, 2^64).
        pairs: int64 [B], pair indices >= 0, in any order; the result is on their device.
        start, stop: token positions, 0 <= start <= stop <= 2^32.
        channels: C >= 1.

    Returns:
        float32 [B, stop - start, C].

    Raises:
        UserError: for anything outside these.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must lie in [0, 2^64)")
    if pairs.dtype != torch.int64 or pairs.ndim != 1:
        raise UserError(f"pairs must be int64 [B], not {pairs.dtype} {list(pairs.shape)}")
    if not 0 <= start <= stop <= 2**32:
        raise UserError(f"positions {start}..{stop} must satisfy 0 <= start <= stop <= 2^32")
    if channels < 1:
        raise UserError(f"channels is {channels}; it must be at least 1")
    if backend(pairs.device) == "torch":
        return noise.normal_noise(seed, pairs, start, stop, channels)
    out = torch.empty(len(pairs), stop - start, channels, device=pairs.device)
    _native.normal_noise(seed, pairs.contiguous(), start, stop, channels, out)
    return out
