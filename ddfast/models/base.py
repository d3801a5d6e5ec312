"""The wall every teacher stands behind.

A teacher draws L tokens in K groups: all tokens of a group at once, given every earlier group. VAR has a group per
scale, LlamaGen a group per token. Code outside ``ddfast.models`` sees only what is here.

Axes: B images, n tokens of one group, L tokens of an image, V codebook size, C codebook channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flow.filters import LogitFilter


@dataclass(frozen=True)
class Sampling:
    """How a teacher is sampled.

    Attributes:
        guidance: classifier-free guidance scale in the family's own convention.
        guidance_interval: LlamaGen's ``cfg_interval``; -1 guides every token.
        temperature: divides the guided logits, > 0.
        top_k: how many of the best entries are kept; 0 keeps all.
        top_p: nucleus mass, in the family's own convention for "off".
    """

    guidance: float
    top_k: int
    top_p: float
    temperature: float = 1.0
    guidance_interval: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < float("inf"):
            raise UserError(f"guidance is {self.guidance}; it must be a finite number >= 0")
        if self.guidance_interval < -1:
            raise UserError(f"guidance_interval is {self.guidance_interval}; it must be >= 0, or -1 for no limit")


class Tokenizer(Protocol):
    """What a teacher needs of its tokenizer."""

    @property
    def codebook(self) -> Tensor: ...
    @property
    def image_size(self) -> int: ...
    def decode(self, tokens: Tensor) -> Tensor: ...
    def decode_embeddings(self, x_BLC: Tensor) -> Tensor: ...


class DecodeState:
    """One batch being decoded: its place in the groups, guidance weights, and a KV cache allocated once.

    Rows 0..B-1 are conditional; while guidance acts, rows B..2B-1 are the same images without their class.

    Attributes:
        group: index of the group to draw next.
        weights: one guidance weight w a group; the guided logits are ``uncond + w (cond - uncond)``.
        batch: B.
    """

    def __init__(self, labels: Tensor, weights: tuple[float, ...], unconditional: int) -> None:
        self.group = 0
        self.weights = weights
        self.batch = labels.shape[0]
        guided = any(w != 1.0 for w in weights)
        self.labels = torch.cat([labels, torch.full_like(labels, unconditional)]) if guided else labels
        self._last_guided = max((k for k, w in enumerate(weights) if w != 1.0), default=-1)

    @property
    def weight(self) -> float:
        """The guidance weight of the next group."""
        return self.weights[self.group]

    @property
    def rows(self) -> int:
        """Rows to compute for the next group: unconditional ones only until guidance has ended for good."""
        return 2 * self.batch if self.group <= self._last_guided else self.batch

    def split(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [rows, n, V] as (conditional, unconditional or None where this group is not guided)."""
        cond = logits[: self.batch]
        return cond, logits[self.batch :] if self.weight != 1.0 else None


class Teacher(nn.Module, ABC):
    """An autoregressive image model with its tokenizer.

    Attributes:
        name: its name in the zoo, or of the file it came from.
        groups: tokens in each group; they sum to L.
        num_classes: number of class labels; label ``num_classes`` is the unconditional one.
        presets: named sampling settings, the default first.
        weights_sha256: content hash of each part's weights; empty for a teacher that was not loaded from files.
    """

    name: str
    groups: tuple[int, ...]
    num_classes: int
    filter_rule: str
    presets: dict[str, Sampling]
    weights_sha256: dict[str, str]

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.presets = {"plain": self.plain_sampling()}
        self.weights_sha256 = {}

    @property
    @abstractmethod
    def _tokenizer(self) -> Tokenizer: ...

    @property
    def codebook(self) -> Tensor:
        """[V, C] float32: the vectors that flow matching maps noise to."""
        return self._tokenizer.codebook.float()

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self._tokenizer.image_size

    @torch.inference_mode()
    def images(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] to images float32 [B, 3, H, W] in [0, 1]."""
        return self._tokenizer.decode(tokens).float()

    @abstractmethod
    def plain_sampling(self) -> Sampling:
        """Sampling from the model's own distribution: no guidance, no filter."""

    @abstractmethod
    def guidance_weights(self, guidance: float, interval: int = -1) -> tuple[float, ...]:
        """The family's guidance rule as one weight a group (see :class:`DecodeState`)."""

    @abstractmethod
    def decode_state(self, labels: Tensor, guidance: float, interval: int = -1) -> DecodeState:
        """Start a batch: ``labels`` int64 [B]; allocates the KV cache for the whole image."""

    @abstractmethod
    def logits(self, state: DecodeState) -> tuple[Tensor, Tensor | None]:
        """Run the next group: (cond, uncond) logits [B, n, V]; uncond is None where this group is not guided.

        Call once a group, then :meth:`append`.
        """

    @abstractmethod
    def append(self, state: DecodeState, tokens: Tensor) -> None:
        """Fix the group just run: ``tokens`` int64 [B, n]."""

    @abstractmethod
    def cache_bytes(self, guided: bool) -> int:
        """Bytes of KV cache for one image."""

    def preset(self, name: str | None = None) -> Sampling:
        """A named sampling setting; the teacher's default for None. UserError lists the names."""
        if name is None:
            return next(iter(self.presets.values()))
        if name not in self.presets:
            raise UserError(f"{self.name} has no preset {name!r}; it has {', '.join(self.presets)}")
        return self.presets[name]

    @property
    def num_tokens(self) -> int:
        """L"""
        return sum(self.groups)

    @property
    def dtype(self) -> torch.dtype:
        """Type the transformer computes in."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def filter(self, sampling: Sampling) -> LogitFilter:
        """The logit filter of ``sampling`` under this family's conventions."""
        return LogitFilter(sampling.temperature, sampling.top_k, sampling.top_p, rule=self.filter_rule)

    def check_labels(self, labels: Tensor) -> None:
        """Raise UserError for labels outside [0, num_classes)."""
        bad = labels[(labels < 0) | (labels >= self.num_classes)]
        if bad.numel():
            raise UserError(f"label {int(bad[0])} is not a class of {self.name}; use 0 to {self.num_classes - 1}")
