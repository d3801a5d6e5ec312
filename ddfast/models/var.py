"""The VAR transformer (arXiv 2404.02905): a group a scale, adaptive layer norms.

Axes: B images, R rows, n tokens of a scale, L tokens of all scales, D width, H heads, d head width,
V codebook size, C codebook channels, K scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused
from .attention import Attend, levels, masked
from .student import add_n_d_embed


@dataclass(frozen=True)
class VARConfig:
    """Shapes and switches of a VAR transformer, under the official names where they have one."""

    depth: int
    embed_dim: int
    num_heads: int
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    num_classes: int = 1000
    vocab_size: int = 4096
    codebook_dim: int = 32
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(pn * pn for pn in self.patch_nums)


class Attention(nn.Module):
    """Self-attention whose keys carry no bias; with l2-norm, a learned per-head scale replaces 1/sqrt(d)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        dim, self.heads = config.embed_dim, config.num_heads
        self.l2_norm = config.attn_l2_norm
        self.scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(dim // self.heads)
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def qkv_bias(self) -> Tensor:
        """[3D]"""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def head_scales(self) -> Tensor:
        """What a normalised query is multiplied by: [H]."""
        return self.scale_mul_1H11.flatten().clamp_max(math.log(100.0)).exp()

    def forward(self, x_RnD: Tensor, attend: Attend) -> Tensor:
        qkv = F.linear(x_RnD, self.mat_qkv.weight, self.qkv_bias()).unflatten(2, (3, self.heads, -1))
        q, k, v = fused.normed_heads(qkv, self.head_scales()) if self.l2_norm else qkv.permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, self.scale).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(fused.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward, each between a modulated layer norm and a gate that come from the class."""

    ada_gss: nn.Parameter
    ada_lin: nn.Sequential

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        dim, self.eps = config.embed_dim, config.norm_eps
        self.attn = Attention(config)
        self.ffn = FeedForward(dim, round(dim * config.mlp_ratio))
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, dim))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def init_gates(self, generator: torch.Generator | None, depth: int) -> None:
        """Start close to the identity: narrow output projections, gates near zero."""
        dim = self.attn.proj.weight.shape[0]
        self.attn.proj.weight.div_(math.sqrt(2 * depth))
        self.ffn.fc2.weight.div_(math.sqrt(2 * depth))
        if hasattr(self, "ada_gss"):
            nn.init.normal_(self.ada_gss, std=dim**-0.5, generator=generator)
            self.ada_gss[:, :, :2].mul_(1e-5)
        else:
            modulate = self.ada_lin.get_parameter("1.weight")
            modulate.mul_(0.5)
            modulate[: 2 * dim].mul_(1e-5)

    def modulation(self, cond: Tensor) -> Tensor:
        """[R, 6, D] in the order gamma1, gamma2, scale1, scale2, shift1, shift2, from the class embedding [R, D]
        (or, with ``shared_aln``, from the shared modulation [R, 6, D])."""
        if hasattr(self, "ada_gss"):
            return cond + self.ada_gss[0]
        return self.ada_lin(cond).unflatten(1, (6, -1))

    def forward(self, x: Tensor, mod: Tensor, attend: Attend, n_d: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``n_d``: what a student adds after attention, for :func:`add_n_d_embed`."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = mod.unsqueeze(2).unbind(1)
        h = fused.modulated_norm(x, scale1, shift1, self.eps)
        x = fused.gated_sum(x, self.attn(h, attend), gamma1)
        x = x if n_d is None else add_n_d_embed(x, *n_d)
        h = fused.modulated_norm(x, scale2, shift2, self.eps)
        return fused.gated_sum(x, self.ffn(h), gamma2)


class HeadNorm(nn.Module):
    """The modulated layer norm before the vocabulary head."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, cond_RD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_RD).unsqueeze(1).chunk(2, dim=-1)
        return fused.modulated_norm(x, scale, shift, self.eps)


class VARTransformer(nn.Module):
    """Next-scale prediction: logits of every token of a scale from the reconstruction by the coarser ones."""

    shared_ada_lin: nn.Sequential

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        c = self.config = config
        length, first = sum(c.groups), c.groups[0]
        self.word_embed = nn.Linear(c.codebook_dim, c.embed_dim)
        self.class_emb = nn.Embedding(c.num_classes + 1, c.embed_dim)
        self.pos_start = nn.Parameter(torch.zeros(1, first, c.embed_dim))
        self.pos_1LC = nn.Parameter(torch.zeros(1, length, c.embed_dim))
        self.lvl_embed = nn.Embedding(len(c.groups), c.embed_dim)
        if c.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c.embed_dim, 6 * c.embed_dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.head_nm = HeadNorm(c.embed_dim, c.norm_eps)
        self.head = nn.Linear(c.embed_dim, c.vocab_size)

    @staticmethod
    def optional_keys(config: VARConfig) -> dict[str, tuple[int, ...]]:
        """Constant buffers of a released file, rebuilt here instead of read: name to shape."""
        length = sum(config.groups)
        keys: dict[str, tuple[int, ...]] = {"lvl_1L": (1, length), "attn_bias_for_masking": (1, 1, length, length)}
        return keys | {f"blocks.{i}.attn.zero_k_bias": (config.embed_dim,) for i in range(config.depth)}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """VAR's initialisation: truncated normal embeddings and linears, small gates and head."""
        dim, depth = self.config.embed_dim, self.config.depth
        std = math.sqrt(1 / dim / 3)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
        for position in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(position, std=std, generator=generator)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin.get_parameter("1.weight").mul_(0.5)
        for block in self.modules():
            if isinstance(block, Block):
                block.init_gates(generator, depth)

    def levels(self) -> Tensor:
        """Scale of every token: int64 [L]."""
        return levels(self.config.groups, self.pos_1LC.device)

    def block_causal_mask(self) -> Tensor:
        """bool [L, L], True where a query (row) may see a key: same or earlier scale."""
        levels = self.levels()
        return levels[:, None] >= levels[None, :]

    def positions(self) -> Tensor:
        """Position plus level embedding of every token: [1, L, D]."""
        return self.pos_1LC + self.lvl_embed(self.levels())

    def start_tokens(self, cond_RD: Tensor) -> Tensor:
        """Inputs of the first scale, before positions: [R, n_0, D]."""
        return cond_RD.unsqueeze(1) + self.pos_start

    def modulations(self, cond_RD: Tensor) -> list[Tensor]:
        """What the class embedding [R, D] contributes to each block: a list of [R, 6, D]."""
        shared = self.shared_ada_lin(cond_RD).unflatten(1, (6, -1)) if self.config.shared_aln else cond_RD
        return [block.modulation(shared) for block in cast("list[Block]", self.blocks)]

    def logits(self, x_RnD: Tensor, cond_RD: Tensor) -> Tensor:
        """Vocabulary logits [R, n, V] of the last block's output."""
        return self.head(self.head_nm(x_RnD, cond_RD))

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """All scales at once, each seeing itself and coarser ones (teacher forcing).

        Args:
            labels: int64 [B]; ``num_classes`` stands for "no class".
            inputs: [B, L - n_0, C] from ``MultiScaleQuantizer.teacher_forcing_inputs``.

        Returns:
            Logits [B, L, V].
        """
        cond_BD = self.class_emb(labels)
        x = torch.cat([self.start_tokens(cond_BD), self.word_embed(inputs)], dim=1) + self.positions()
        attend = masked(self.block_causal_mask())
        for block, mod in zip(self.blocks, self.modulations(cond_BD), strict=True):
            x = block(x, mod, attend)
        return self.logits(x, cond_BD)
