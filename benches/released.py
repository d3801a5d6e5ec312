"""One step of a student as its authors released it (github.com/microsoft/distilled_decoding), which ddfast is timed
against.

Written anew from what that code computes on a CPU: plain float32 modules, channels first; for VAR a dense mask added to
all scores, and the noise/data embedding through a linear at every position of every block; both heads everywhere; the
nearest code of every token of the *input*, through differences [V, B, L, C], and two tensors [B, L, V] to mix it with
the logits. In one step from noise none of that mixing is used. What equals ours is ours, by its torch twin.

Axes: B images, L tokens of an image, T = 1 + L positions, D width, V codebook size, C codebook channels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.models import Distilled
from ddfast.models.attention import Attend, causal, group_mask
from ddfast.models.groups import starts
from ddfast.models.llamagen_student import LlamaGenStudent
from ddfast.models.student import Student
from ddfast.models.var_student import VARStudent
from ddfast.ops import forced

Heads = tuple[Tensor, Tensor]
"""Embeddings [B, L, C] and logits [B, L, V]."""


def dense(student: Student) -> Attend:
    """The student's rule as a mask of 0 and -inf [T, T], on all scores."""
    seen = group_mask((1, *student.groups), torch.device("cpu"))
    bias = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    return lambda q, k, v, scale: F.scaled_dot_product_attention(
        q.to(v.dtype), k.to(v.dtype), v, attn_mask=bias.to(v.dtype), scale=scale
    )


def var_heads(student: VARStudent, attend: Attend, labels: Tensor, x_BLC: Tensor, known_BT: Tensor) -> Heads:
    def n_d(place: int) -> Tensor:
        return student.layerwise_n_d_embed[place](n_d_BTD) if student.settings.layerwise else n_d_BTD

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=student.settings.norm_eps).mul(1 + scale).add_(shift)

    cond, n_d_BTD = student.cond(labels), student.n_d_embed(known_BT)
    h = torch.cat([student.start_tokens(cond), student.word_embed(x_BLC)], dim=1) + student.positions() + n_d_BTD
    for place, (block, mod) in enumerate(zip(student.blocks, student.modulations(cond), strict=True)):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = mod.unsqueeze(2).unbind(1)
        h = h + block.attn(norm(h, scale1, shift1), attend).mul(gamma1)
        h = h + n_d(place)
        h = h + block.ffn(norm(h, scale2, shift2)).mul(gamma2)
    last = len(student.blocks)
    logits = student.logits(h + n_d(last), cond)[:, 1:]
    return student.embeddings(h + n_d(last), cond)[:, 1:], logits


def llamagen_heads(student: LlamaGenStudent, labels: Tensor, x_BLC: Tensor, known_BT: Tensor) -> Heads:
    cond = student.cond(labels)
    h = torch.cat([cond.unsqueeze(1), student.tok_embeddings(x_BLC)], dim=1) + student.n_d_embed(known_BT)
    for layer in student.layers:
        h = layer(h, student.rope, causal)
    return student.embeddings(h, cond)[:, 1:], student.logits(h, cond)[:, 1:]


def mixed(heads: Heads, x_BLC: Tensor, codebook: Tensor, noise_BL: Tensor) -> Heads:
    """What the heads say where ``noise`` is True; the input, and logits of its nearest codes, elsewhere."""
    embeddings, logits = heads[0].float(), heads[1].float()
    nearest = (codebook[:, None, None, :] - x_BLC).square().sum(-1).argmin(0)
    given = torch.full((*nearest.shape, len(codebook)), float("-inf")).scatter_(2, nearest.unsqueeze(2), 0)
    both = torch.zeros_like(logits)
    both[noise_BL] = logits[noise_BL]
    both[~noise_BL] = given[~noise_BL]
    share = noise_BL.unsqueeze(2).float()
    return embeddings * share + x_BLC * (1 - share), both


def released_tokens(student: Student, codebook: Tensor, split: int) -> Callable[[Tensor, Tensor], Tensor]:
    """``run(labels [B], noise [B, L, C])`` to embeddings [B, L, C]: groups before ``split`` by the largest logits."""
    attend = dense(student) if isinstance(student, VARStudent) else causal
    first = starts(student.groups)[split]

    def run(labels: Tensor, noise: Tensor) -> Tensor:
        everywhere = torch.ones(noise.shape[:2], dtype=torch.bool)
        known_BT = F.pad((~everywhere).long(), (1, 0), value=1)
        if isinstance(student, VARStudent):
            heads = var_heads(student, attend, labels, noise, known_BT)
        else:
            heads = llamagen_heads(cast(LlamaGenStudent, student), labels, noise, known_BT)
        embeddings, logits = mixed(heads, noise, codebook, everywhere)
        return torch.cat([codebook[logits.argmax(-1)][:, :first], embeddings[:, first:]], dim=1)

    return run


def released(model: Distilled, dtype: torch.dtype = torch.float32) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``run(labels [B], noise [B, L, C])`` to embeddings [B, L, C] and images [B, 3, H, W] in [0, 1].

    ``dtype`` bfloat16: under autocast, which the released code leaves to its user.
    """
    tokens, vq = released_tokens(model.student, model.codebook, model.split), cast(Any, model.tokenizer)

    def decoded(x_BLC: Tensor) -> Tensor:
        if not isinstance(model.student, VARStudent):
            return vq.decode_embeddings(x_BLC)
        f_hat = vq.quantizer.empty_f_hat(len(x_BLC))
        with torch.autocast("cpu", enabled=False):
            for scale, h_BnC in enumerate(vq.quantizer.split(x_BLC)):
                f_hat, _ = vq.quantizer.step(scale, h_BnC, f_hat)  # what a teacher would read next is made too
        return vq.decode_latent(f_hat)

    @torch.inference_mode()
    def run(labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with forced("torch"), nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
            x_BLC = tokens(labels, noise)
            return x_BLC, decoded(x_BLC).float()

    return run
