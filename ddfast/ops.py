"""One entry for each fused operation: arguments are checked here once, then the fastest path that is there runs.

On a CPU that is C++ (``ddfast._C``), on a GPU Triton, and plain torch where neither is there. Every path gives the same
result: :func:`normal_noise` to the last bit, the others up to rounding. Float64 input, and solvers other than
``AdamsSolver``, run in torch on every device. :func:`forced` chooses a path.

Each is one node under torch.compile and torch.export (``torch.ops.ddfast.*``), takes any strides (the compiled paths
copy what is not contiguous), and has no gradient. A saved program needs ``import ddfast.ops`` before it is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import Backend, backend, backends, encode_solver, forced
from .errors import UserError
from .flow import FlowResult, LogitFilter, Solver
from .flow.filters import check_filter
from .flow.tokens import check_codebook, check_flow_arguments, raise_bad_rows
from .layer_ops import (
    add_layer_norm,
    add_rms_norm,
    append_normed,
    append_rotated,
    attention,
    decode_attention,
    quantize_rows,
    quantizer_step,
    scale_rows,
    swiglu,
)

__all__ = [
    "Backend",
    "FlowResult",
    "LogitFilter",
    "add_layer_norm",
    "add_rms_norm",
    "append_normed",
    "append_rotated",
    "attention",
    "backend",
    "backends",
    "decode_attention",
    "filter_logits",
    "flow",
    "flow_tokens",
    "forced",
    "nearest_code",
    "normal_noise",
    "quantize_rows",
    "quantizer_step",
    "scale_rows",
    "swiglu",
]

# Bound once: a look-up in torch.ops on each call takes longer than the call.
_flow = torch.ops.ddfast.flow.default
_filter_logits = torch.ops.ddfast.filter_logits.default
_nearest_code = torch.ops.ddfast.nearest_code.default
_normal_noise = torch.ops.ddfast.normal_noise.default


def flow(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    codebook: Tensor,
    *,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
    solver: Solver,
    check: bool = True,
) -> FlowResult:
    """Where the flow (Eq. 3-4 of arXiv 2412.17153) takes noise under a teacher's distribution.

        p = softmax(filter(uncond + guidance (cond - uncond)))
        token = end of dz/dr = E[c | z], z(0) = noise

    Args:
        cond, uncond: logits [N, V] of one floating dtype; uncond is None without guidance, that is, guidance=1.0.
        noise: [N, C], standard normal.
        codebook: [V, C].
        guidance: weight of what the condition adds to the logits; 1 is none.
        filter: temperature, top-k and top-p.
        solver: how the flow is followed.
        check: look for rows that cannot be solved when done, which on a GPU waits for it. Not done while a CUDA graph
            is captured or a model is traced. Such rows have token 0, x = NaN and evaluations < 0.

    Returns:
        tokens int64 [N]; x [N, C], where each was followed to; evaluations int32 [N]. In float64 if cond is float64,
        otherwise in float32. Memory does not grow with N beyond these.

    Raises:
        UserError: for shapes, dtypes or devices that do not fit, and, with check, for the first row whose guided logits
            hold NaN or +inf or nothing finite, or whose noise is not finite, and for a codebook that is not finite.

    >>> result = flow(cond, uncond, noise, teacher.codebook, guidance=2.0,
    ...               filter=LogitFilter(top_k=900, top_p=0.95), solver=make_solver("adams", 10))
    """
    check_flow_arguments(cond, uncond, noise, codebook, guidance, filter)
    keep = (filter.temperature, filter.top_k, filter.top_p, filter.rule)
    result = FlowResult(*_flow(cond, uncond, noise, codebook, guidance, *keep, encode_solver(solver)))
    if check and not torch.compiler.is_compiling() and not (cond.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise_bad_rows(result.evaluations)
        if not bool(result.x.isfinite().all()):  # as a code that is not finite makes every x
            check_codebook(codebook.to(result.x.dtype))
    return result


def flow_tokens(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    codebook: Tensor,
    *,
    guidance: float,
    filter: LogitFilter,  # noqa: A002 - the field's word
    solver: Solver,
    check: bool = True,
) -> Tensor:
    """The tokens int64 [N] of :func:`flow`, whose arguments and errors these are."""
    return flow(cond, uncond, noise, codebook, guidance=guidance, filter=filter, solver=solver, check=check).tokens


def filter_logits(logits: Tensor, filter: LogitFilter) -> Tensor:  # noqa: A002 - the field's word
    """Logits [..., V] divided by the temperature, and -inf outside of what top-k and top-p keep.

    The kept set is exact, ties included, as each rule of ``LogitFilter`` defines it; no sort is needed. Logits are
    float32 or float64 and free of NaN and +inf (not checked); the result is a new tensor of that dtype.

    Raises:
        UserError: for another dtype, or a "var" top_k larger than V.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise UserError(f"logits must be float32 or float64, not {logits.dtype}: convert with .float()")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise UserError(f"logits must be [..., V] with V > 0, not {list(logits.shape)}")
    check_filter(filter, logits.shape[-1])
    return _filter_logits(logits, filter.temperature, filter.top_k, filter.top_p, filter.rule)


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the codebook entry nearest to each vector, by squared distance: int64 [...].

        argmin_j |x - c_j|^2 = argmax_j (x.c_j - |c_j|^2 / 2)

    x [..., C] and codebook [V, C] are of any floating dtype; computed in float64 if x is float64, otherwise in float32,
    without distances [..., V] in memory. Ties go to the lowest index. NaN is not refused: it gives index 0.

    Raises:
        UserError: for shapes, dtypes or devices that do not fit.

    >>> tokens = nearest_code(embeddings, teacher.codebook)  # [B, L, C] and [V, C] to [B, L]
    """
    if codebook.ndim != 2 or codebook.numel() == 0 or x.ndim == 0 or x.shape[-1] != codebook.shape[1]:
        raise UserError(
            f"x must be [..., C] and codebook [V, C] with V, C > 0, not {list(x.shape)} and {list(codebook.shape)}"
        )
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not tensor.is_floating_point():
            raise UserError(f"{name} must be floating, not {tensor.dtype}")
    if x.device != codebook.device:
        raise UserError(f"x is on {x.device} but codebook on {codebook.device}: move one of them")
    return _nearest_code(x, codebook)


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
    return _normal_noise(seed - (seed >> 63 << 64), pairs, start, stop, channels)
