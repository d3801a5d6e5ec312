"""What a student's blocks compute between their matrix products, each in one pass of C++ on a CPU, gradient included.

``twins`` has the same in plain torch, for other devices and dtypes, and for torch.compile, which fuses it itself. Sums
are float32; results meet matrix products in autocast's dtype.

Axes: R images, n positions, D width, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import _library, _native_layers, _native_training
from . import twins

_DTYPES = (torch.float32, torch.bfloat16)


def native(operation: _library.Operation, *tensors: Tensor) -> bool:
    """Whether C++ runs an operation on these tensors."""
    return (
        not torch.compiler.is_compiling()
        and all(t.device.type == "cpu" and t.dtype in _DTYPES for t in tensors)
        and _library.backend(tensors[0].device, operation) == "native"
    )


def gelu(x: Tensor) -> Tensor:
    """gelu's tanh approximation of ``x`` [...]."""
    return _Gelu.apply(x) if native("gelu", x) else twins.gelu(x)  # type: ignore[no-untyped-call]


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _native_training.gelu(x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _native_training.gelu_gradient(x, dy.contiguous(), dx)
        return dx


def modulated_norm(x_RnD: Tensor, scale_R1D: Tensor, shift_R1D: Tensor, eps: float) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift"""
    if not _norms(x_RnD) or not native("modulated_norm", x_RnD, scale_R1D, shift_R1D):
        return twins.modulated_norm(x_RnD, scale_R1D, shift_R1D, eps)
    return _ModulatedNorm.apply(x_RnD, _rows(scale_R1D, x_RnD), _rows(shift_R1D, x_RnD), eps)  # type: ignore[no-untyped-call]


class _ModulatedNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_RD: Tensor, shift_RD: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, scale_RD)
        ctx.eps = eps
        out = torch.empty_like(x, dtype=_product_dtype(x))
        _native_layers.add_layer_norm(x, None, None, scale_RD, shift_RD, eps, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale_RD = ctx.saved_tensors
        rows, n, dim = x.shape
        dx, sums = torch.empty_like(x), x.new_empty(rows, _native_training.parts(n), 2, dim)
        _native_training.layer_norm_gradient(x, dy.contiguous(), scale_RD, ctx.eps, dx, sums)
        dscale, dshift = sums.sum(1).unbind(1)
        return dx, dscale, dshift, None


def rms_norm(x_RnD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight"""
    if not _norms(x_RnD) or x_RnD.ndim != 3 or not native("rms_norm", x_RnD, weight_D):
        return twins.rms_norm(x_RnD, weight_D, eps)
    return _RMSNorm.apply(x_RnD, weight_D.float(), eps)  # type: ignore[no-untyped-call]


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, weight_D = x.contiguous(), weight_D.contiguous()
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        out = torch.empty_like(x, dtype=_product_dtype(x))
        _native_layers.add_rms_norm(x, None, weight_D, eps, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        rows, n, dim = x.shape
        dx, sums = torch.empty_like(x), x.new_empty(rows, _native_training.parts(n), 2, dim)
        _native_training.rms_norm_gradient(x, dy.contiguous(), weight_D, ctx.eps, dx, sums)
        return dx, sums[:, :, 0].sum((0, 1)), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    if gate.dtype != up.dtype or not native("swiglu", gate, up):
        return twins.swiglu(gate, up)
    return _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]


class _Swiglu(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _native_training.swiglu(gate, up, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _native_training.swiglu_gradient(gate, up, dout.contiguous(), dgate, dup)
        return dgate, dup


def gated_sum(x_RnD: Tensor, branch_RnD: Tensor, gate_R1D: Tensor) -> Tensor:
    """x + gate * branch"""
    if x_RnD.dtype != torch.float32 or not native("gated_sum", x_RnD, branch_RnD, gate_R1D):
        return twins.gated_sum(x_RnD, branch_RnD, gate_R1D)
    return _GatedSum.apply(x_RnD, branch_RnD, _rows(gate_R1D, x_RnD))  # type: ignore[no-untyped-call]


class _GatedSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate_RD: Tensor) -> Tensor:
        x, branch = x.contiguous(), branch.contiguous()
        ctx.save_for_backward(branch, gate_RD)
        out = torch.empty_like(x)
        _native_training.gated_sum(x, branch, gate_RD, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        branch, gate_RD = ctx.saved_tensors
        rows, n, dim = branch.shape
        dbranch, sums = torch.empty_like(branch), dout.new_empty(rows, _native_training.parts(n), dim)
        _native_training.gated_sum_gradient(dout.contiguous(), branch, gate_RD, dbranch, sums)
        return dout, dbranch, sums.sum(1)


def normed_heads(qkv_Rn3Hd: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys divided by their l2-norm, queries times their head's scale, and values: each [R, H, n, d]."""
    if not native("normed_heads", qkv_Rn3Hd, scale_H):
        return twins.normed_heads(qkv_Rn3Hd, scale_H)
    q, k, v = _NormedHeads.apply(qkv_Rn3Hd, scale_H.float())  # type: ignore[no-untyped-call]
    return q, k, v


class _NormedHeads(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, scale_H = qkv.contiguous(), scale_H.contiguous()
        ctx.save_for_backward(qkv, scale_H)
        rows, n, _, heads, width = qkv.shape
        v = qkv.new_empty(rows, heads, n, width)
        q, k = (torch.empty_like(v, dtype=torch.float32) for _ in range(2))
        _native_training.normed_heads(qkv, scale_H, q, k, v)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        qkv, scale_H = ctx.saved_tensors
        rows, n, _, heads, _ = qkv.shape
        dqkv, sums = torch.empty_like(qkv), dq.new_empty(rows, _native_training.parts(n), heads)
        given = (dq.contiguous(), dk.contiguous(), dv.contiguous())
        _native_training.normed_heads_gradient(qkv, scale_H, *given, dqkv, sums)
        return dqkv, sums.sum((0, 1))


def rotated_heads(qkv_RnHd: Tensor, heads: int, rope_nd2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [R, H, n, d] and keys [R, Hk, n, d] turned by ``rope`` (cos, sin), and values, of ``qkv``
    [R, n, H + 2 Hk, d]."""
    if not native("rotated_heads", qkv_RnHd, rope_nd2):
        return twins.rotated_heads(qkv_RnHd, heads, rope_nd2)
    q, k, v = _RotatedHeads.apply(qkv_RnHd, heads, rope_nd2.float())  # type: ignore[no-untyped-call]
    return q, k, v


class _RotatedHeads(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, rope_nd2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, rope_2nd = qkv.contiguous(), rope_nd2.permute(2, 0, 1).contiguous()
        ctx.save_for_backward(rope_2nd)
        rows, n, per, width = qkv.shape
        q, k, v = (qkv.new_empty(rows, count, n, width) for count in (heads, *[(per - heads) // 2] * 2))
        _native_training.rotated_heads(qkv, rope_2nd, q, k, v, back=False)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (rope_2nd,) = ctx.saved_tensors
        cos, sin = rope_2nd
        rows, heads, n, width = dq.shape
        dqkv = dq.new_empty(rows, n, heads + 2 * dk.shape[1], width)
        given = (dq.contiguous(), dk.contiguous(), dv.contiguous())
        _native_training.rotated_heads(dqkv, torch.stack([cos, -sin]), *given, back=True)
        return dqkv, None, None


def softmax_rows(scores_Nns: Tensor, own_Nn1: Tensor, p_Nns: Tensor, own_p_Nn1: Tensor, lse_Nn1: Tensor) -> None:
    """Softmax over a row's scores and ``own``, one more: writes ``p``, ``own_p`` and the logarithm of the sum.

    ``scores`` may be overwritten; ``own``, ``own_p`` and ``lse`` have the same strides.
    """
    here = native("softmax_rows", scores_Nns, p_Nns) and scores_Nns.dtype == torch.float32
    (_native_training if here else twins).softmax_rows(scores_Nns, own_Nn1, p_Nns, own_p_Nn1, lse_Nn1)


def softmax_rows_gradient(
    scores_Nns: Tensor, lse_Nn1: Tensor, dp_Nns: Tensor, carried_Nn1: Tensor, factor: float, p_Nns: Tensor
) -> None:
    """Writes p = exp(scores - lse), and (dp - carried) p factor over ``dp``; ``scores`` may be overwritten."""
    here = native("softmax_rows", scores_Nns, p_Nns) and scores_Nns.dtype == torch.float32
    (_native_training if here else twins).softmax_rows_gradient(scores_Nns, lse_Nn1, dp_Nns, carried_Nn1, factor, p_Nns)


def _norms(x: Tensor) -> bool:
    """Whether C++ norms this stream for the product that follows: under autocast to float16 it does not."""
    return x.dtype == torch.float32 and _product_dtype(x) in _DTYPES


def _product_dtype(x: Tensor) -> torch.dtype:
    """What the matrix product that follows reads."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _rows(mod_R1D: Tensor, x_RnD: Tensor) -> Tensor:
    """A modulation as float32 [R, D] with dense rows."""
    rows = mod_R1D.squeeze(1).float().expand(len(x_RnD), -1)
    return rows if rows.stride(1) == 1 else rows.contiguous()
