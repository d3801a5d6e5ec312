"""The CPU loops of ``ddfast.models.fused`` in the extension ``ddfast._C``: typed wrappers that pass addresses.

Nothing is checked here: the callers' tensors are dense but for the row strides passed on.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

with contextlib.suppress(ModuleNotFoundError):  # ddfast._native says what its absence means
    import ddfast._C as _C


def parts(positions: int) -> int:
    """How many sums a loop leaves over that many positions, each of consecutive ones."""
    return _C.parts_of(positions)


def gelu(x: Tensor, out: Tensor) -> None:
    _C.gelu_cpu(x.data_ptr(), 0, x.numel(), out.data_ptr(), _half(x))


def gelu_gradient(x: Tensor, dy: Tensor, dx: Tensor) -> None:
    _C.gelu_cpu(x.data_ptr(), dy.data_ptr(), x.numel(), dx.data_ptr(), _half(x))


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _C.glu_cpu(gate.data_ptr(), up.data_ptr(), 0, gate.numel(), out.data_ptr(), 0, 0, _half(gate))


def swiglu_gradient(gate: Tensor, up: Tensor, dout: Tensor, dgate: Tensor, dup: Tensor) -> None:
    given, made = (gate.data_ptr(), up.data_ptr(), dout.data_ptr()), (dgate.data_ptr(), dup.data_ptr())
    _C.glu_cpu(*given, gate.numel(), 0, *made, _half(gate))


def layer_norm_gradient(x: Tensor, dy: Tensor, scale_RD: Tensor, eps: float, dx: Tensor, sums_Rp2D: Tensor) -> None:
    _norm_gradient(x, dy, scale_RD.data_ptr(), 0, scale_RD.stride(0), eps, dx, sums_Rp2D)


def rms_norm_gradient(x: Tensor, dy: Tensor, weight_D: Tensor, eps: float, dx: Tensor, sums_Rp2D: Tensor) -> None:
    """The second sums mean nothing here."""
    _norm_gradient(x, dy, 0, weight_D.data_ptr(), 0, eps, dx, sums_Rp2D)


def _norm_gradient(
    x: Tensor, dy: Tensor, scale: int, weight: int, stride: int, eps: float, dx: Tensor, sums: Tensor
) -> None:
    rows, n, dim = x.shape
    given = (x.data_ptr(), dy.data_ptr(), scale, weight, stride, eps, rows, n, dim)
    _C.norm_gradient_cpu(*given, dx.data_ptr(), sums.data_ptr(), _half(dy))


def gated_sum(x: Tensor, branch: Tensor, gate_RD: Tensor, out: Tensor) -> None:
    _gate(x, branch, gate_RD, out.data_ptr(), 0, 0)


def gated_sum_gradient(dout: Tensor, branch: Tensor, gate_RD: Tensor, dbranch: Tensor, sums_RpD: Tensor) -> None:
    _gate(dout, branch, gate_RD, 0, dbranch.data_ptr(), sums_RpD.data_ptr())


def _gate(x: Tensor, branch: Tensor, gate: Tensor, out: int, dbranch: int, sums: int) -> None:
    rows, n, dim = x.shape
    given = (x.data_ptr(), branch.data_ptr(), gate.data_ptr(), gate.stride(0))
    _C.gate_cpu(*given, rows, n, dim, out, dbranch, sums, _half(branch))


def normed_heads(qkv_Rn3Hd: Tensor, scale_H: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    _heads(qkv_Rn3Hd, scale_H, q, k, v, 0, 0)


def normed_heads_gradient(
    qkv_Rn3Hd: Tensor, scale_H: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dqkv: Tensor, sums_RpH: Tensor
) -> None:
    _heads(qkv_Rn3Hd, scale_H, dq, dk, dv, dqkv.data_ptr(), sums_RpH.data_ptr())


def _heads(qkv: Tensor, scale: Tensor, q: Tensor, k: Tensor, v: Tensor, dqkv: int, sums: int) -> None:
    rows, n, _, heads, width = qkv.shape
    inputs = (qkv.data_ptr(), scale.data_ptr(), rows, n, heads, width)
    _C.split_heads_cpu(*inputs, q.data_ptr(), k.data_ptr(), v.data_ptr(), dqkv, sums, _half(qkv))


def rotated_heads(qkv_RnHd: Tensor, rope_2nd: Tensor, q: Tensor, k: Tensor, v: Tensor, back: bool) -> None:
    """``back``: from q, k and v to qkv. ``rope``: cos, sin of [n, d/2] angles each."""
    rows, heads, n, width = q.shape
    size = (rows, n, heads, k.shape[1], width)
    made = (q.data_ptr(), k.data_ptr(), v.data_ptr())
    _C.turn_heads_cpu(qkv_RnHd.data_ptr(), rope_2nd.data_ptr(), *size, *made, back, _half(q))


def softmax_rows(scores_Nns: Tensor, own_Nn1: Tensor, p_Nns: Tensor, own_p_Nn1: Tensor, lse_Nn1: Tensor) -> None:
    batch, n, keys = scores_Nns.shape
    _C.softmax_rows_cpu(
        scores_Nns.data_ptr(),
        batch,
        n,
        keys,
        own_Nn1.stride(0),
        own_Nn1.data_ptr(),
        own_p_Nn1.data_ptr(),
        lse_Nn1.data_ptr(),
        0,
        0,
        0.0,
        p_Nns.data_ptr(),
        0,
        _half(p_Nns),
    )


def softmax_rows_gradient(
    scores_Nns: Tensor, lse_Nn1: Tensor, dp_Nns: Tensor, carried_Nn1: Tensor, factor: float, p_Nns: Tensor
) -> None:
    batch, n, keys = scores_Nns.shape
    _C.softmax_rows_cpu(
        scores_Nns.data_ptr(),
        batch,
        n,
        keys,
        lse_Nn1.stride(0),
        0,
        0,
        lse_Nn1.data_ptr(),
        dp_Nns.data_ptr(),
        carried_Nn1.data_ptr(),
        factor,
        p_Nns.data_ptr(),
        dp_Nns.data_ptr(),
        _half(p_Nns),
    )


def _half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16
