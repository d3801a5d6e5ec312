"""The wall every student stands behind: one forward pass from noise, or from data up to a group, to all tokens.

Timestep t is a group: tokens of groups before t are data, those from t on are noise (Eq. 5 of arXiv 2412.17153, counted
from 0). At t = 0 everything is noise.

Axes: B images, L tokens of an image, V codebook size, C codebook channels, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from . import fused
from .attention import Attend, grouped
from .groups import first_groups, starts

HEAD_EPS = 1e-6
NEW_STD = 0.02  # of what the teacher does not have


def add_n_d_embed(x_BTD: Tensor, known_BT: Tensor, rows_2D: Tensor) -> Tensor:
    """``x`` and the noise/data embedding: row 1 at positions that hold data, row 0 at those of noise. A product with
    one-hot vectors, whose gradient is one too, in float32 under autocast. An exported graph picks the rows instead."""
    if torch.compiler.is_exporting():
        return x_BTD + F.embedding(known_BT, rows_2D)
    device = x_BTD.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        choice = F.one_hot(known_BT, 2).to(x_BTD.dtype).expand(len(x_BTD), -1, -1)
        return torch.baddbmm(x_BTD, choice, rows_2D.to(x_BTD.dtype).expand(len(x_BTD), -1, -1))


def best_codes(logits_BnV: Tensor, codebook_VC: Tensor) -> Tensor:
    """The codes of the largest logits, [B, n, C]; NaN where these are not finite, which arg-max alone would hide."""
    if torch.compiler.is_exporting():
        return F.embedding(logits_BnV.argmax(-1), codebook_VC)
    best, tokens = logits_BnV.max(-1)
    return torch.where(best.isfinite().unsqueeze(-1), F.embedding(tokens, codebook_VC), torch.nan)


class EmbeddingHead(nn.Module):
    """Codebook-space vectors from the residual stream: a layer norm modulated by the class embedding, and a linear."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))

    def forward(self, h_BnD: Tensor, cond_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + cond_BD.unsqueeze(1)).unsqueeze(2).unbind(1)
        return self.linear(fused.modulated_norm(h_BnD, scale, shift, HEAD_EPS))


class Student(nn.Module, ABC):
    """A teacher's backbone over [condition, x_0 .. x_{L-1}] with two heads, both read at a token's own position.

    A position sees the condition, every position of strictly earlier groups, and itself.

    Attributes:
        groups: tokens in each group; they sum to L.
        kind, settings: its kind in ``checkpoints.KINDS``, and its config.
        num_classes, vocab_size, channels: number of labels, V and C.
        activation_checkpointing: forget the blocks' activations in training and compute them again for the gradient.
    """

    kind: str
    settings: Any
    groups: tuple[int, ...]
    num_classes: int
    vocab_size: int
    channels: int
    final_layer_conti: EmbeddingHead
    n_d_embed: nn.Embedding
    activation_checkpointing = False

    @property
    @abstractmethod
    def stack(self) -> nn.ModuleList:
        """The transformer blocks."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D"""

    @abstractmethod
    def cond(self, labels: Tensor) -> Tensor:
        """Class embeddings [B, D] of ``labels`` int64 [B]."""

    @abstractmethod
    def hidden(self, x_BLC: Tensor, known_BL: Tensor, cond_BD: Tensor) -> Tensor:
        """The residual stream [B, L, D] that both heads read.

        ``known`` int64 [B or 1, 1 + L]: 1 where a position, the condition's first, holds data, 0 where it holds noise.
        Both may end behind any group: no position sees a later one.
        """

    @abstractmethod
    def logits(self, h_BnD: Tensor, cond_BD: Tensor) -> Tensor:
        """Vocabulary logits [B, n, V] at any n positions."""

    @abstractmethod
    def init_with_teacher(self, teacher: nn.Module, generator: torch.Generator | None = None) -> None:
        """Take over a teacher transformer's weights, key by key."""

    def units(self) -> Iterator[tuple[nn.Module, str | None]]:
        """What FSDP shards by itself, inner modules first, and a method beside ``forward`` that needs its weights."""
        for block in self.stack:
            yield block, None

    def embeddings(self, h_BnD: Tensor, cond_BD: Tensor) -> Tensor:
        """Codebook-space vectors [B, n, C] at any n positions."""
        return self.final_layer_conti(h_BnD, cond_BD)

    @property
    def num_tokens(self) -> int:
        """L"""
        return sum(self.groups)

    def starts(self) -> list[int]:
        """Where each group begins, and L last."""
        return starts(self.groups)

    def attend(self, x_BLC: Tensor) -> Attend:
        """The attention rule among the condition, a group of its own, and the tokens of ``x``, whole groups."""
        return grouped((1, *first_groups(self.groups, x_BLC.shape[1])), x_BLC.device)

    def known(self, t: int | Tensor, device: torch.device, length: int | None = None) -> Tensor:
        """Which positions hold data at timestep ``t`` (an int, or int64 [B]): int64 [1 or B, 1 + L].

        ``length`` tokens in place of all L.
        """
        starts, last = self.starts(), self.num_tokens if length is None else length
        if isinstance(t, int):
            known = 1 + starts[t]
            return torch.tensor([[1] * known + [0] * (1 + last - known)], device="cpu").to(device, non_blocking=True)
        first_noise = torch.tensor(starts, device="cpu").to(device, non_blocking=True)[t].reshape(-1, 1)
        return (torch.arange(-1, last, device=device) < first_noise).long()

    def run_blocks(self, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
        """``x`` through all blocks by ``run(block, x)``."""
        for block in self.stack:
            if self.activation_checkpointing and self.training:
                x = checkpoint(partial(run, block), x, use_reentrant=False)
            else:
                x = run(block, x)
        return x

    def forward(self, labels: Tensor, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Both heads at all positions, for training.

        Args:
            labels: int64 [B].
            x: [B, L, C], codebook rows in groups before ``t``, noise from there on.
            t: the timestep, or int64 [B] with one an image.

        Returns:
            Embeddings [B, L, C] and logits [B, L, V]; those of groups before ``t`` mean nothing.
        """
        cond = self.cond(labels)
        h = self.hidden(x, self.known(t, x.device), cond)
        return self.embeddings(h, cond), self.logits(h, cond)

    def predict(
        self, labels: Tensor, x: Tensor, t: int, codebook: Tensor, split: int, stop: int | None = None
    ) -> Tensor:
        """One step: the whole image, or its first groups, each head run only where it is read (Alg. 3 of
        arXiv 2412.17153). Nothing in it keeps torch.export from tracing it; call it under ``torch.inference_mode()``.

        Args:
            labels: int64 [B].
            x: float32 [B, L, C], data in groups before ``t``, noise from there on.
            t: the timestep, 0 to K - 1.
            codebook: [V, C].
            split: groups before it become codebook rows, those of the largest logits; the others what the embedding
                head says.
            stop: predict groups before it alone, all by default. Later ones, which these do not see, are not computed.

        Returns:
            [B, L, C], or as many tokens as groups before ``stop`` have: ``x`` in groups before ``t``, predictions from
            there on.
        """
        self.check_timestep(t)
        last = len(self.groups) if stop is None else stop
        starts = self.starts()
        first, middle, length = starts[t], starts[min(max(t, split), last)], starts[last]
        x, cond = x[:, :length], self.cond(labels)
        h = self.hidden(x.to(cond.dtype), self.known(t, x.device, length), cond)
        parts = [x[:, :first]]
        if middle > first:
            parts.append(best_codes(self.logits(h[:, first:middle], cond), codebook).to(x.dtype))
        if middle < length:
            parts.append(self.embeddings(h[:, middle:], cond).to(x.dtype))
        return torch.cat(parts, dim=1)

    def check_timestep(self, t: int) -> None:
        """Raise UserError for a timestep that is no group."""
        if not 0 <= t < len(self.groups):
            raise UserError(f"timestep {t} is no group of this student; use 0 to {len(self.groups) - 1}")

    def check_timesteps(self, timesteps: Sequence[int]) -> None:
        """Raise UserError unless ``timesteps`` are groups, rising, and begin at 0."""
        for t in timesteps:
            self.check_timestep(t)
        if not timesteps or timesteps[0] != 0 or any(b <= a for a, b in zip(timesteps, timesteps[1:], strict=False)):
            listed = ",".join(map(str, timesteps))
            raise UserError(f"timesteps {listed or '(none)'} must begin at 0 and rise, e.g. 0,{len(self.groups) // 2}")

    @torch.no_grad()
    def init_own(self, generator: torch.Generator | None) -> None:
        """What no teacher has: the noise/data embedding and the embedding head, as the released code starts them."""
        nn.init.trunc_normal_(self.n_d_embed.weight, std=NEW_STD, generator=generator)
        nn.init.normal_(self.final_layer_conti.scale_shift_table, std=self.width**-0.5, generator=generator)
        nn.init.trunc_normal_(self.final_layer_conti.linear.weight, std=NEW_STD, generator=generator)
        self.final_layer_conti.linear.bias.zero_()
