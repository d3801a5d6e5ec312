"""The compiled extension ``ddfast._C``, if it was built: typed wrappers that pass tensors as addresses.

Nothing is checked here; ``ddfast.ops`` checks at its door. An extension that is there but does not load is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import UserError
from .flow.filters import RULES, LogitFilter
from .flow.multistep import AdamsSolver, adams_tables

try:
    import ddfast._C as _C
except ModuleNotFoundError as error:
    if error.name != "ddfast._C":
        raise
    _AVAILABLE = False
else:
    _AVAILABLE = True

_LOGIT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> bool:
    """Whether the extension is there."""
    return _AVAILABLE


def cuda_built() -> bool:
    """Whether the extension holds CUDA kernels (a GPU may still be absent)."""
    return _AVAILABLE and _C.cuda_built


def cpu_levels() -> list[str]:
    """The instruction sets the CPU loops can use on this machine, best first, ending in "baseline"."""
    return _C.cpu_levels() if _AVAILABLE else []


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 about twice as fast as float32."""
    return "x86-64-v4-bf16" in cpu_levels()


@contextmanager
def cpu_level(name: str) -> Iterator[None]:
    """Run the CPU loops with one of ``cpu_levels()``, for tests and benches.

    ``normal_noise`` gives the same bits with each; sums of the others round differently.
    """
    before = _C.cpu_level()
    _C.set_cpu_level(name)
    try:
        yield
    finally:
        _C.set_cpu_level(before)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the CPU loops' scratch with NaN before each row, for tests: what is read before it is written shows."""
    _C.set_poison(True)
    try:
        yield
    finally:
        _C.set_poison(False)


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


def flow_adams(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    codebook: Tensor,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
    solver: AdamsSolver,
    tokens: Tensor,
    x: Tensor,
    evaluations: Tensor,
) -> None:
    """Write what ``ddfast.ops.flow`` returns to ``tokens`` int64 [N], ``x`` float32 [N, C], ``evaluations`` int32 [N].

    All are contiguous and on the CPU: ``cond`` and ``uncond`` [N, V] of one of float32, bfloat16 and float16, ``noise``
    [N, C] and ``codebook`` [V, C] float32. UserError for a codebook that is not finite.
    """
    (rows, vocab), channels = cond.shape, noise.shape[1]
    try:
        _C.flow_cpu(
            cond.data_ptr(),
            0 if uncond is None else uncond.data_ptr(),
            _LOGIT_TYPES[cond.dtype],
            noise.data_ptr(),
            codebook.data_ptr(),
            rows,
            vocab,
            channels,
            guidance,
            *_filter_numbers(filter),
            solver.knots,
            *adams_tables(solver),
            solver.offset,
            solver.shrink,
            solver.certain,
            solver.pair,
            solver.prune,
            tokens.data_ptr(),
            x.data_ptr(),
            evaluations.data_ptr(),
        )
    except ValueError as error:  # the codebook
        raise UserError(str(error)) from None


def filter_rows(logits: Tensor, filter: LogitFilter, out: Tensor) -> None:  # noqa: A002 - the field's word
    """Write ``ddfast.ops.filter_logits(logits, filter)`` to ``out``: both float32 [N, V], contiguous, on the CPU."""
    rows, vocab = logits.shape
    _C.filter_cpu(logits.data_ptr(), rows, vocab, *_filter_numbers(filter), out.data_ptr())


def nearest_code(x: Tensor, codebook: Tensor, out: Tensor) -> None:
    """Write ``ddfast.ops.nearest_code(x, codebook)`` to ``out`` int64 [...].

    ``x`` [..., C] and ``codebook`` [V, C] are float32; all are contiguous and on the CPU.
    """
    vocab, channels = codebook.shape
    _C.nearest_cpu(x.data_ptr(), out.numel(), codebook.data_ptr(), vocab, channels, out.data_ptr())


def _filter_numbers(filter: LogitFilter) -> tuple[float, int, float, int]:  # noqa: A002 - the field's word
    """What logits are divided by, top_k (0: off), top_p (below 0: off) and the number of the rule."""
    top_p = filter.top_p if filter.top_p is not None and filter.cuts_mass else -1.0
    return filter.divisor, filter.top_k, top_p, RULES.index(filter.rule)
