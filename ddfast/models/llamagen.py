"""The LlamaGen class-conditional transformer (arXiv 2406.06525): a group a token.

Axes: B images, R rows, n positions, L tokens of an image, D width, H heads, d head width,
V codebook size, C codebook channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import fused
from .attention import Attend, causal


@dataclass(frozen=True)
class LlamaGenConfig:
    """Shapes of a LlamaGen transformer, under the official names where they have one."""

    n_layer: int
    n_head: int
    dim: int
    block_size: int = 256
    vocab_size: int = 16384
    num_classes: int = 1000
    n_kv_head: int | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    @property
    def ffn_hidden(self) -> int:
        """Two thirds of four widths, rounded up to ``multiple_of``."""
        return -(-int(2 * 4 * self.dim / 3) // self.multiple_of) * self.multiple_of

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head


def rope_2d(grid: int, head_dim: int, base: float) -> Tensor:
    """Rotations cos, sin for the class position and a grid in raster order: float32 [1 + grid^2, d/2, 2].

    The first half of a head's pairs turns with the row, the second with the column. The class position's entry is all
    zeros, cos too: its query and key vanish, so every position gives it score 0 while its value still counts.
    """
    half = head_dim // 2
    freqs = 1.0 / base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    angles = torch.outer(torch.arange(grid).float(), freqs)
    rows = angles[:, None].expand(-1, grid, -1)
    cols = angles[None].expand(grid, -1, -1)
    turned = torch.cat([rows, cols], dim=-1).flatten(0, 1)
    table = torch.stack([turned.cos(), turned.sin()], dim=-1)
    return torch.cat([torch.zeros(1, half, 2), table])


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_RnD: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        q, k, v = fused.rotated_heads(self.wqkv(x_RnD).unflatten(2, (-1, self.head_dim)), self.heads, rope)
        return self.wo(attend(q, k, v, self.head_dim**-0.5).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)"""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(fused.swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_hidden)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, attend)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """One row a class and, last, the row of "no class"."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class LlamaGenTransformer(nn.Module):
    """Next-token prediction in raster order after one class position."""

    rope: Tensor

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        c = self.config = config
        self.cls_embedding = ClassEmbedding(c.num_classes, c.dim)
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        grid = math.isqrt(c.block_size)
        with torch.device("cpu"):
            self.register_buffer("rope", rope_2d(grid, c.head_dim, c.rope_base), persistent=False)

    @staticmethod
    def optional_keys(config: LlamaGenConfig) -> dict[str, tuple[int, ...]]:
        """The rotation table that some released files carry, rebuilt here instead of read: name to shape."""
        return {"freqs_cis": (1 + config.block_size, config.head_dim // 2, 2)}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, 0.02) matrices; the output head starts at zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        self.output.weight.zero_()

    def forward(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """All tokens at once (teacher forcing): labels int64 [B], tokens int64 [B, L] to logits [B, L, V].

        Position i predicts token i from the class and tokens before i; the last token is never read.
        """
        x = torch.cat([self.cls_embedding(labels).unsqueeze(1), self.tok_embeddings(tokens[:, :-1])], dim=1)
        rope = self.rope[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, rope, causal)
        return self.output(self.norm(x))
