"""Attention by groups: what the transformers' attention layers call between their projections.

A student's position sees the condition, every position of strictly earlier groups, and itself. Computed group by group
that is 2.6 times fewer scores than a dense mask has for VAR's 681 positions.

Axes: B images, H heads, N heads of all images, L positions, n positions of one group, s positions before it, d head
width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""``attend(q, k, v, scale)``: each [B, H, L, d] to [B, H, L, d]."""

SHORT = 128
"""Positions up to which a dense mask is faster on a CPU than many small products."""

BLOCKED = -3e4
"""Added to a score that does not count. Finite in every type, as -inf is not in a product with zero."""

CHUNK = 1 << 21
"""Scores held at a time, while a CPU goes through a group."""


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A position sees itself and those before it; keys and values may have fewer heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def masked(mask_LL: Tensor) -> Attend:
    """``mask`` bool, True where a query (row) may see a key."""
    return lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=scale)


def levels(groups: tuple[int, ...], device: torch.device) -> Tensor:
    """The group of every position: int64 [L]."""
    index = torch.tensor([k for k, n in enumerate(groups) for _ in range(n)], device="cpu")
    return index.to(device, non_blocking=True)


def group_mask(groups: tuple[int, ...], device: torch.device) -> Tensor:
    """The student's rule as bool [L, L]: strictly earlier groups, and the position itself."""
    level = levels(groups, device)
    return (level[:, None] > level[None, :]) | torch.eye(len(level), dtype=torch.bool, device=device)


def grouped(groups: tuple[int, ...], device: torch.device) -> Attend:
    """The student's rule in the form that is fastest for these groups (the condition being the first) and device."""
    if torch.compiler.is_exporting():
        return biased(groups, device)
    single = all(n == 1 for n in groups)
    if device.type == "cuda":
        return causal if single else _flex(groups, device)
    if sum(groups) <= SHORT:
        return _dense(groups, device)
    return causal if single else _by_groups(groups)


def biased(groups: tuple[int, ...], device: torch.device) -> Attend:
    """The student's rule as numbers added to scores, in plain products: for exported graphs, whose runtimes fuse them.

    Fixed widths, a mask of numbers and one product for the scale are what runtimes recognise as attention.
    """
    level = np.repeat(np.arange(len(groups)), groups)
    seen = (level[:, None] > level[None, :]) | np.eye(len(level), dtype=bool)
    hidden = torch.tensor(np.where(seen, 0, BLOCKED), dtype=torch.float32, device=device)  # a constant of the graph

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        copies = q.shape[1] // k.shape[1]
        k, v = (t if copies == 1 else t.repeat_interleave(copies, dim=1) for t in (k, v))
        q, k = q.to(v.dtype), k.to(v.dtype)
        scores = (q if scale == 1 else q * scale) @ k.transpose(-1, -2) + hidden.to(v.dtype)
        return scores.softmax(-1) @ v

    return attend


@cache
def _dense(groups: tuple[int, ...], device: torch.device) -> Attend:
    """In plain products: the fused attention's gradient is slow on short rows."""
    with torch.inference_mode(False):  # it outlives this call, and gradients need it
        hidden = torch.zeros(sum(groups), sum(groups), device=device)
        hidden.masked_fill_(~group_mask(groups, device), float("-inf"))

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        copies = q.shape[1] // k.shape[1]  # of keys and values, which may have fewer heads
        k, v = (t if copies == 1 else t.repeat_interleave(copies, dim=1) for t in (k, v))
        scores = torch.baddbmm(
            hidden.to(v.dtype), q.to(v.dtype).flatten(0, 1), k.to(v.dtype).flatten(0, 1).mT, alpha=scale
        )
        wide = torch.promote_types(v.dtype, torch.float32)  # rows of odd widths are slow in bfloat16
        return (scores.to(wide).softmax(-1).to(v.dtype) @ v.flatten(0, 1)).view(v.shape)

    return attend


@cache
def _flex(groups: tuple[int, ...], device: torch.device) -> Attend:
    """FlexAttention, which skips blocks that nobody sees; it runs compiled only."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = sum(groups)
    with torch.inference_mode(False):  # these tensors outlive this call, and gradients need them
        level = levels(groups, device)

        def rule(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (level[query] > level[key]) | (query == key)

        blocks = create_block_mask(rule, None, None, length, length, device=str(device))
    run: Any = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return run(q.to(v.dtype), k.to(v.dtype), v, block_mask=blocks, scale=scale)

    return attend


@cache
def _by_groups(groups: tuple[int, ...]) -> Attend:
    bounds, stop = [], 0
    for n in groups:
        bounds.append((stop, stop := stop + n))

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return _ByGroups.apply(*flat, bounds, scale).view(q.shape)  # type: ignore[no-untyped-call]

    return attend


class _ByGroups(torch.autograd.Function):
    """softmax over [q k_j for j < s, q k_self], a group at a time; scores are computed again for the gradient.

    With p the probabilities, o the output and g its gradient: dS = p (g v - g o), as in FlashAttention
    (arXiv 2205.14135, Alg. 4); the position itself is one more key. Scores and sums are float32; probabilities, and the
    gradients of scores, meet the other factor of a product in the values' type.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NLd: Tensor, k_NLd: Tensor, v_NLd: Tensor, bounds: list[tuple[int, int]], scale: float
    ) -> Tensor:
        wide = torch.promote_types(v_NLd.dtype, torch.float32)
        v = v_NLd.contiguous()
        out = v.clone()  # the first group sees only itself
        with torch.autocast(v.device.type, enabled=False) if v.device.type != "meta" else nullcontext():
            q, k = q_NLd.to(wide).contiguous(), k_NLd.to(wide).contiguous()
            self_NL1 = (torch.linalg.vecdot(q, k) * scale).unsqueeze(-1)
            lse_NL1, own_p = self_NL1.clone(), torch.ones_like(self_NL1)
            for rows, before, own, (scores, low) in _walk(v, bounds, (wide, v.dtype)):
                torch.baddbmm(scores, q[rows, own], k[rows, before].mT, beta=0, alpha=scale, out=scores)
                fused.softmax_rows(scores, self_NL1[rows, own], low, own_p[rows, own], lse_NL1[rows, own])
                mixed = torch.bmm(low, v[rows, before])
                torch.addcmul(mixed, v[rows, own], own_p[rows, own].to(v.dtype), out=out[rows, own])
        ctx.save_for_backward(q_NLd, k_NLd, v, out, lse_NL1, own_p)
        ctx.bounds, ctx.scale = bounds, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_NLd, k_NLd, v, out, lse, own_p = ctx.saved_tensors
        scale, low_g = ctx.scale, gradients[0].to(v.dtype).contiguous()
        q, k, g = (t.to(lse.dtype).contiguous() for t in (q_NLd, k_NLd, low_g))
        low_q, low_k = (t.to(v.dtype).contiguous() for t in (q_NLd, k_NLd))
        carried = torch.linalg.vecdot(g, out.to(lse.dtype)).unsqueeze(-1)
        own_ds = (torch.linalg.vecdot(g, v.to(g.dtype)).unsqueeze(-1) - carried).mul_(own_p).mul_(scale)
        dq, dk, dv = k * own_ds, q * own_ds, g * own_p
        for rows, before, own, (scores, p, ds) in _walk(v, ctx.bounds, (lse.dtype, v.dtype, v.dtype)):
            torch.baddbmm(scores, q[rows, own], k[rows, before].mT, beta=0, alpha=scale, out=scores)
            torch.bmm(low_g[rows, own], v[rows, before].mT, out=ds)
            fused.softmax_rows_gradient(scores, lse[rows, own], ds, carried[rows, own], scale, p)
            dv[rows, before] += torch.bmm(p.mT, low_g[rows, own])
            dq[rows, own] += torch.bmm(ds, low_k[rows, before])
            dk[rows, before] += torch.bmm(ds.mT, low_q[rows, own])
        return dq.to(q_NLd.dtype), dk.to(k_NLd.dtype), dv.to(v.dtype), None, None


def _walk(like_NLd: Tensor, bounds: list[tuple[int, int]], types: tuple[torch.dtype, ...]) -> Any:
    """Every group after the first, ``CHUNK`` scores at a time: (rows, positions before, own positions, buffers).

    There is a buffer [rows, n, s] for each of ``types``.
    """
    count = len(like_NLd)
    for start, stop in bounds[1:]:
        n, step = stop - start, max(1, min(count, CHUNK // ((stop - start) * start)))
        buffers = [like_NLd.new_empty(step, n, start, dtype=dtype) for dtype in types]
        for first in range(0, count, step):
            last = min(first + step, count)
            parts = tuple(b[: last - first] for b in buffers)
            yield slice(first, last), slice(0, start), slice(start, stop), parts
