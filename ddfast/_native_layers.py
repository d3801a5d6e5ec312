"""The CPU loops of ``ddfast.layer_ops`` in the extension ``ddfast._C``: typed wrappers that pass tensors as addresses.

Nothing is checked here; ``ddfast.layer_ops`` checks at its door. Tensors are float32 or bfloat16 models' as said there.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

with contextlib.suppress(ModuleNotFoundError):  # ddfast._native says what its absence means
    import ddfast._C as _C


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """The first three, in numbers."""
    first, second, third = tensor.stride()[:3]
    return first, second, third


def add_layer_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, out: Tensor
) -> None:
    rows, n, dim = x.shape
    branch_at, gate_at = (0, 0) if branch is None or gate is None else (branch.data_ptr(), gate.data_ptr())
    _C.add_layer_norm_cpu(
        x.data_ptr(),
        branch_at,
        gate_at,
        0 if gate is None else gate.stride(0),
        scale.data_ptr(),
        scale.stride(0),
        shift.data_ptr(),
        shift.stride(0),
        eps,
        rows,
        n,
        dim,
        out.data_ptr(),
        out.dtype == torch.bfloat16,
    )


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    dim = x.shape[-1]
    _C.add_rms_norm_cpu(
        x.data_ptr(),
        0 if branch is None else branch.data_ptr(),
        weight.data_ptr(),
        eps,
        x.numel() // dim if dim else 0,
        dim,
        out.data_ptr(),
        out.dtype == torch.bfloat16,
    )


def append_normed(qkv: Tensor, scale: Tensor | None, cache: Tensor, length: Tensor) -> None:
    rows, n, _, heads, width = qkv.shape
    _C.append_normed_cpu(
        qkv.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        rows,
        n,
        heads,
        width,
        cache.data_ptr(),
        *_strides(cache),
        cache.stride(3),
        length.data_ptr(),
        qkv.dtype == torch.bfloat16,
    )


def append_rotated(qkv: Tensor, heads: int, rope: Tensor, cache: Tensor, length: Tensor) -> None:
    rows, n, _, width = qkv.shape
    _C.append_rotated_cpu(
        qkv.data_ptr(),
        rope.data_ptr(),
        rows,
        n,
        heads,
        cache.shape[2],
        width,
        cache.data_ptr(),
        *_strides(cache),
        cache.stride(3),
        length.data_ptr(),
        qkv.dtype == torch.bfloat16,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    rows, n, heads, width = q.shape
    _C.attention_cpu(
        q.data_ptr(),
        *_strides(q),
        k.data_ptr(),
        *_strides(k),
        v.data_ptr(),
        *_strides(v),
        rows,
        n,
        heads,
        k.shape[1],
        k.shape[2],
        width,
        scale,
        out.data_ptr(),
        out.dtype == torch.bfloat16,
    )


def decode_attention(q: Tensor, cache: Tensor, length: Tensor, scale: float, out: Tensor) -> None:
    filled = cache[:, :, :, : int(length) + 1]
    attention(q.unsqueeze(1), filled[0], filled[1], scale, out.unsqueeze(1))


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    hidden = out.shape[-1]
    rows = out.numel() // hidden if hidden else 0
    _C.swiglu_cpu(gate_up.data_ptr(), rows, hidden, out.data_ptr(), out.dtype == torch.bfloat16)


def quantizer_step(
    tokens: Tensor,
    codebook: Tensor,
    up: Tensor | None,
    taps: Tensor,
    bias: Tensor,
    ratio: float,
    f_hat: Tensor,
    down: Tensor | None,
    out: Tensor | None,
) -> None:
    batch, n = tokens.shape
    _, size, channels = f_hat.shape
    _C.quantizer_step_cpu(
        tokens.data_ptr(),
        codebook.data_ptr(),
        0 if up is None else up.data_ptr(),
        taps.data_ptr(),
        len(taps),
        bias.data_ptr(),
        ratio,
        batch,
        n,
        size,
        channels,
        f_hat.data_ptr(),
        0 if down is None else down.data_ptr(),
        0 if down is None else len(down),
        0 if out is None else out.data_ptr(),
    )


def quantize_rows(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    _C.quantize_rows_cpu(
        x.data_ptr(), scale.numel(), x.shape[-1], codes.data_ptr(), scale.data_ptr(), x.dtype == torch.bfloat16
    )


def scale_rows(product: Tensor, scale: Tensor, bias: Tensor, gelu: bool, out: Tensor) -> None:
    _C.scale_rows_cpu(
        product.data_ptr(),
        scale.data_ptr(),
        bias.data_ptr(),
        gelu,
        scale.numel(),
        product.shape[-1],
        out.data_ptr(),
        out.dtype == torch.bfloat16,
    )
