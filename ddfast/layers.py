"""What a cached transformer does between its matrix products, in readable torch: the twins of the fused operations.

Each works in place or writes to ``out``, allocates nothing that it keeps, and waits for no device. ``ddfast.ops`` has
the same functions with their arguments checked and the fastest path taken.

Axes: R rows of a batch, n positions of a call, D width, H heads, Hk heads of keys and values, d head width, L positions
a cache holds, V codebook size, C codebook channels, S positions of the latent map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CODE_LIMITS = {torch.uint8: 127, torch.float8_e4m3fn: 448}
"""How far codes of a type reach on either side of zero, which is 128 in uint8."""


def add_layer_norm(
    x_RnD: Tensor,
    branch_RnD: Tensor | None,
    gate_RD: Tensor | None,
    scale_RD: Tensor,
    shift_RD: Tensor,
    eps: float,
    out_RnD: Tensor,
) -> None:
    """x += gate * branch, then out = layer_norm(x) * (1 + scale) + shift."""
    if branch_RnD is not None and gate_RD is not None:
        x_RnD.addcmul_(branch_RnD.to(x_RnD.dtype), gate_RD.unsqueeze(1))
    normed = F.layer_norm(x_RnD, x_RnD.shape[-1:], eps=eps)
    out_RnD.copy_(normed * (1 + scale_RD.unsqueeze(1)) + shift_RD.unsqueeze(1))


def add_rms_norm(x_RnD: Tensor, branch_RnD: Tensor | None, weight_D: Tensor, eps: float, out_RnD: Tensor) -> None:
    """x += branch, then out = x / sqrt(mean(x^2) + eps) * weight."""
    if branch_RnD is not None:
        x_RnD.add_(branch_RnD)
    out_RnD.copy_(x_RnD * torch.rsqrt(x_RnD.square().mean(-1, keepdim=True) + eps) * weight_D)


def append_normed(qkv_Rn3Hd: Tensor, scale_H: Tensor | None, cache_2RHLd: Tensor, length: Tensor) -> None:
    """Write keys and values to the cache from position ``length`` on; queries stay where they are.

    With ``scale``, queries and keys are first divided by their l2-norm, and queries multiplied by their head's scale.
    """
    q, k, v = qkv_Rn3Hd.unbind(2)
    if scale_H is not None:
        wide = torch.promote_types(q.dtype, torch.float32)
        q.copy_(F.normalize(q.to(wide), dim=-1) * scale_H[:, None])
        k = F.normalize(k.to(wide), dim=-1)
    _append(k, v, cache_2RHLd, length)


def append_rotated(qkv_RnHd: Tensor, heads: int, rope_Td2: Tensor, cache_2RHLd: Tensor, length: Tensor) -> None:
    """Turn queries and keys, then write keys and values to the cache from position ``length`` on.

    ``qkv`` [R, n, H + 2 Hk, d] holds queries, keys and values; queries are turned in place. Position t turns the pairs
    (2j, 2j + 1) by ``rope`` [T, d/2, 2], cos and sin.
    """
    kv_heads = cache_2RHLd.shape[2]
    q, k, v = qkv_RnHd.split([heads, kv_heads, kv_heads], dim=2)
    at = length + torch.arange(q.shape[1], device=q.device)
    rope = rope_Td2.index_select(0, at)
    q.copy_(rotate(q, rope))
    _append(rotate(k, rope), v, cache_2RHLd, length)


def rotate(x_RnHd: Tensor, rope_nd2: Tensor) -> Tensor:
    """Turn the interleaved pairs (2j, 2j+1) of x by ``rope`` [n, d/2, 2], in float32 or wider."""
    wide = torch.promote_types(x_RnHd.dtype, torch.float32)
    even, odd = x_RnHd.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope_nd2[:, None, :, 0], rope_nd2[:, None, :, 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x_RnHd)


def _append(k_RnHd: Tensor, v_RnHd: Tensor, cache_2RHLd: Tensor, length: Tensor) -> None:
    at = length + torch.arange(k_RnHd.shape[1], device=length.device)
    cache_2RHLd[0].index_copy_(2, at, k_RnHd.transpose(1, 2).to(cache_2RHLd.dtype))
    cache_2RHLd[1].index_copy_(2, at, v_RnHd.transpose(1, 2))


def attention(q_RnHd: Tensor, k_RHSd: Tensor, v_RHSd: Tensor, scale: float, out_RnHd: Tensor) -> None:
    """out = softmax(scale q k^T) v over all keys; query head h reads key head h // (H / Hk)."""
    q_RHnd = q_RnHd.transpose(1, 2)
    shared = q_RHnd.shape[1] != k_RHSd.shape[1]
    out = F.scaled_dot_product_attention(q_RHnd, k_RHSd, v_RHSd, scale=scale, enable_gqa=shared)
    out_RnHd.copy_(out.transpose(1, 2))


def decode_attention(q_RHd: Tensor, cache_2RHLd: Tensor, length: Tensor, scale: float, out_RHd: Tensor) -> None:
    """:func:`attention` of one query a row to the positions 0..length of a cache, the last of them just written."""
    seen = torch.arange(cache_2RHLd.shape[3], device=length.device) <= length
    k, v = (t.masked_fill(~seen[:, None], 0) for t in cache_2RHLd.unbind(0))
    shared = q_RHd.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q_RHd.unsqueeze(2), k, v, seen[None], scale=scale, enable_gqa=shared)
    out_RHd.copy_(out.squeeze(2))


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out [..., F] = silu(gate) * up, of gate and up side by side in [..., 2F]."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def quantizer_step(
    tokens_Bn: Tensor,
    codebook_VC: Tensor,
    up_Sn: Tensor | None,
    taps_KCC: Tensor,
    bias_C: Tensor,
    ratio: float,
    f_hat_BSC: Tensor,
    down_mS: Tensor | None,
    out_BmC: Tensor | None,
) -> None:
    """One scale of VAR's residual quantizer: h = up codes, f_hat += (1 - ratio) h + ratio conv(h), out = down f_hat.

    The latent map is square, S positions in raster order. ``up`` (bicubic) and ``down`` (area) are constant matrices;
    None stands for the identity and for no output. ``taps`` [k*k, C in, C out] are a k x k convolution with zero
    padding.
    """
    h = codebook_VC[tokens_Bn]
    if up_Sn is not None:
        h = up_Sn @ h
    side, kernel = round(h.shape[1] ** 0.5), round(len(taps_KCC) ** 0.5)
    weight = taps_KCC.permute(2, 1, 0).unflatten(2, (kernel, kernel))
    turned = F.conv2d(h.transpose(1, 2).unflatten(2, (side, side)), weight, bias_C, padding=kernel // 2)
    f_hat_BSC.add_(torch.lerp(h, turned.flatten(2).transpose(1, 2), ratio))
    if down_mS is not None and out_BmC is not None:
        out_BmC.copy_(down_mS @ f_hat_BSC)


def quantize_rows(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """scale [..., 1] = max |x| / limit of each row; codes [..., K] = x / scale, rounded. NaN and inf show in scale."""
    limit = CODE_LIMITS[codes.dtype]
    largest = x.abs().amax(dim=-1, keepdim=True).float()
    scale.copy_(largest.clamp_min_(torch.finfo(torch.float32).tiny * limit).div_(limit))
    ratio = x / scale
    codes.copy_(ratio.round_().add_(128) if codes.dtype == torch.uint8 else ratio.clamp_(-limit, limit))


def scale_rows(product_MN: Tensor, scale_M1: Tensor, bias_N: Tensor, gelu: bool, out_MN: Tensor) -> None:
    """out = product * scale + bias, or gelu's tanh approximation of that."""
    y = torch.addcmul(bias_N, product_MN, scale_M1)
    out_MN.copy_(F.gelu(y, approximate="tanh") if gelu else y)
