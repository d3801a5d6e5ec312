"""The functions of ``fused`` in readable torch, whose gradients are torch's own.

Axes: R images, n positions, D width, H heads, d head width, N heads of all images, s keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import rotate


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def modulated_norm(x_RnD: Tensor, scale_R1D: Tensor, shift_R1D: Tensor, eps: float) -> Tensor:
    return torch.addcmul(shift_R1D, F.layer_norm(x_RnD, x_RnD.shape[-1:], eps=eps), 1 + scale_R1D)


def rms_norm(x_RnD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    normed = x_RnD.float() * torch.rsqrt(x_RnD.float().square().mean(-1, keepdim=True) + eps)
    return normed.type_as(x_RnD) * weight_D


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gated_sum(x_RnD: Tensor, branch_RnD: Tensor, gate_R1D: Tensor) -> Tensor:
    return torch.addcmul(x_RnD, branch_RnD, gate_R1D)


def normed_heads(qkv_Rn3Hd: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_Rn3Hd.permute(2, 0, 3, 1, 4)
    return q * (inverse_norms(q) * scale_H[:, None, None]), k * inverse_norms(k), v


def rotated_heads(qkv_RnHd: Tensor, heads: int, rope_nd2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = (qkv_RnHd.shape[2] - heads) // 2
    q, k, v = qkv_RnHd.split([heads, kv_heads, kv_heads], dim=2)
    return rotate(q, rope_nd2).transpose(1, 2), rotate(k, rope_nd2).transpose(1, 2), v.transpose(1, 2)


def inverse_norms(x: Tensor) -> Tensor:
    """[..., d] to 1 / |x| [..., 1], which then takes one product: cheaper than F.normalize and its gradient.

    In float16, whose squares end at 65,504 and vanish below 2e-4, sums are float32.
    """
    if x.dtype == torch.float16:
        return inverse_norms(x.float()).half()
    return x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


def softmax_rows(scores_Nns: Tensor, own_Nn1: Tensor, p_Nns: Tensor, own_p_Nn1: Tensor, lse_Nn1: Tensor) -> None:
    most = torch.maximum(scores_Nns.amax(-1, keepdim=True), own_Nn1)
    scores_Nns.sub_(most).exp_()
    own = (own_Nn1 - most).exp_()
    total = scores_Nns.sum(-1, keepdim=True).add_(own)
    p_Nns.copy_(scores_Nns.div_(total))
    own_p_Nn1.copy_(own.div_(total))
    lse_Nn1.copy_(most.add_(total.log_()))


def softmax_rows_gradient(
    scores_Nns: Tensor, lse_Nn1: Tensor, dp_Nns: Tensor, carried_Nn1: Tensor, factor: float, p_Nns: Tensor
) -> None:
    p = scores_Nns.sub_(lse_Nn1).exp_()
    p_Nns.copy_(p)
    dp_Nns.copy_((dp_Nns - carried_Nn1).mul_(p).mul_(factor))
