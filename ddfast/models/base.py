"""The wall every teacher stands behind.

A teacher draws L tokens in K groups: all tokens of a group at once, given every earlier group. VAR has a group per
scale, LlamaGen a group per token. Code outside ``ddfast.models`` sees only what is here.

Axes: B images, n tokens of one group, L tokens of an image, V codebook size, C codebook channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flow.filters import LogitFilter
from ..kv_cache import KVCache
from .groups import first_groups
from .linear import check_precision
from .student import Student


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


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    """Raise UserError for ``labels`` that are no classes of the model called ``name``."""
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if bad.numel():
        raise UserError(f"label {int(bad[0])} is not a class of {name}; use 0 to {num_classes - 1}")


def _refuse_to_run(module: nn.Module, arguments: object) -> None:
    raise UserError("this transformer's matrices were released by prepare(release=True): load the teacher again")


class Tokenizer(Protocol):
    """What a teacher needs of its tokenizer."""

    @property
    def codebook(self) -> Tensor: ...
    @property
    def image_size(self) -> int: ...
    def decode(self, tokens: Tensor) -> Tensor: ...
    def decode_embeddings(self, x_BLC: Tensor) -> Tensor: ...


PIXELS_CPU, PIXELS_GPU = 1 << 19, 1 << 23
"""Pixels decoded together: the decoder's widest activations take 640 bytes each, and a larger batch is no faster."""


@torch.inference_mode()
def decode_embeddings(tokenizer: nn.Module, x_BLC: Tensor) -> Tensor:
    """Embeddings [B, l, C] to images float32 [B, 3, H, W] in [0, 1], a few at a time. Tokens missing at the end add
    nothing, or are zeros where every token has a place of its own."""
    vq = cast(Tokenizer, tokenizer)
    at_once = max(1, (PIXELS_GPU if x_BLC.is_cuda else PIXELS_CPU) // vq.image_size**2)
    return torch.cat([vq.decode_embeddings(part.float()).float() for part in x_BLC.split(at_once)])


class DecodeState:
    """One batch being decoded: its place in the groups and its guidance weights. Families add the buffers.

    Buffers are for ``capacity`` images and outlive the batch: :meth:`Teacher.restart` begins the next one in them. Rows
    0..B-1 are conditional; while guidance acts, rows B..2B-1 are the same images without their class.

    Attributes:
        group: index of the group to draw next.
        weights: one guidance weight w a group; the guided logits are ``uncond + w (cond - uncond)``.
        capacity: the most images a batch may have.
        batch: B.
        cache: keys and values of every position run.
    """

    cache: KVCache

    def __init__(self, capacity: int, weights: tuple[float, ...]) -> None:
        self.group = 0
        self.weights = weights
        self.capacity = self.batch = capacity
        self.guided = any(w != 1.0 for w in weights)
        self._last_guided = max((k for k, w in enumerate(weights) if w != 1.0), default=-1)

    def begin(self, batch: int) -> None:
        """Forget the last batch: ``batch`` images at group 0."""
        self.group, self.batch = 0, batch
        self.cache.clear()

    @property
    def length(self) -> Tensor:
        """int32 [1] on the device: positions whose keys and values are in the cache."""
        return self.cache.length

    @property
    def weight(self) -> float:
        """The guidance weight of the next group."""
        return self.weights[self.group]

    @property
    def copies(self) -> int:
        """Rows of an image in the next group: 2 with its unconditional one, until guidance has ended for good."""
        return 2 if self.group <= self._last_guided else 1

    @property
    def rows(self) -> int:
        """Rows to compute for the next group."""
        return self.copies * self.batch

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
        steps_alike: whether every group is run by the same instructions, whose place is read from
            ``state.length`` on the device: one captured CUDA graph then serves all groups of equal guidance weight.
    """

    transformer: nn.Module
    tokenizer: nn.Module
    steps_alike: bool

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
        self._precision = "native"
        self._prepared: tuple[object, Any] | None = None
        self._released = False

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
        return decode_embeddings(self.tokenizer, self.codebook[tokens])

    @abstractmethod
    def plain_sampling(self) -> Sampling:
        """Sampling from the model's own distribution: no guidance, no filter."""

    @abstractmethod
    def guidance_weights(self, guidance: float, interval: int = -1) -> tuple[float, ...]:
        """The family's guidance rule as one weight a group (see :class:`DecodeState`)."""

    @abstractmethod
    def _build(self, precision: str) -> Any:
        """What the family decodes with: the transformer's weights, packed for the device."""

    @abstractmethod
    def _matrices(self) -> Iterator[nn.Parameter]:
        """The parameters of which :meth:`_build` makes copies of its own."""

    @torch.inference_mode()
    def prepare(self, precision: str = "native", release: bool = False) -> None:
        """Make the weights ready for decoding, which otherwise happens when first needed.

        Args:
            precision: how matrix products are computed: "native" (in the model's dtype), "int8" (on a CPU) or "fp8" (on
                a GPU).
            release: free the transformer's own matrices, of which decoding has its packed copies; the transformer can
                then neither run by itself, nor be moved or saved.

        Raises:
            UserError: the device cannot compute in that precision; the matrices are gone.
        """
        check_precision(precision, self.device, self.dtype)
        self._precision, self._prepared = precision, None
        built = self._weights()
        if release:
            for parameter in self._matrices():
                parameter.data = parameter.data.new_empty(0)
            self.transformer.register_forward_pre_hook(_refuse_to_run)
            self._released, self._prepared = True, (self._fingerprint(), built)

    def _fingerprint(self) -> object:
        """Changes when a parameter is moved, replaced or written to."""
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters())

    def _weights(self) -> Any:
        """What :meth:`_build` made, made again where the parameters have changed since."""
        now = self._fingerprint()
        if self._prepared is None or self._prepared[0] != now:
            if self._released:
                raise UserError(f"the matrices of {self.name} were released by prepare(release=True): load it again")
            self._prepared = now, self._build(self._precision)
        return self._prepared[1]

    def _built(self) -> Any:
        """What the state at hand began with."""
        assert self._prepared is not None
        return self._prepared[1]

    @abstractmethod
    def _new_state(self, capacity: int, weights: tuple[float, ...], positions: int) -> DecodeState:
        """Allocate all that a batch of ``capacity`` images needs for its first ``positions`` tokens."""

    @torch.inference_mode()
    def decode_state(self, labels: Tensor, guidance: float, interval: int = -1, stop: int | None = None) -> DecodeState:
        """Start a batch: ``labels`` int64 [B]. Allocates what it needs, once: see :meth:`restart`.

        ``stop``: only groups before it will be drawn, so that the KV cache holds no more; all by default.

        Raises:
            UserError: a label that is not a class, or an interval where guidance has none.
        """
        self.check_labels(labels)
        weights = self.guidance_weights(guidance, interval)
        state = self._new_state(len(labels), weights, sum(self.groups[:stop]))
        self.restart(state, labels)
        return state

    @abstractmethod
    def restart(self, state: DecodeState, labels: Tensor) -> None:
        """Begin another batch, of at most ``state.capacity`` images, in the state's own buffers.

        ``labels`` int64 [B] are not checked; nothing waits for the device.
        """

    @abstractmethod
    def logits(self, state: DecodeState) -> tuple[Tensor, Tensor | None]:
        """Run the next group: (cond, uncond) logits [B, n, V]; uncond is None where this group is not guided.

        Call once a group, then :meth:`append`.
        """

    @abstractmethod
    def append(self, state: DecodeState, tokens: Tensor) -> None:
        """Fix the group just run: ``tokens`` int64 [B, n]."""

    @torch.inference_mode()
    def prefill(self, state: DecodeState, tokens: Tensor, released: bool = False) -> None:
        """Fix the first groups of a batch that has just begun; :meth:`logits` then runs them and the next, in one pass.

        Args:
            state: after :meth:`decode_state` or :meth:`restart`.
            tokens: int64 [B, n], of whole groups; none at all change nothing.
            released: VAR's positions in that pass see one another without a mask, as in the released code of Distilled
                Decoding: other logits than those of a group after the other.

        Raises:
            UserError: the batch is under way; n tokens end within a group, or are all there are.
        """
        sizes = first_groups(self.groups, tokens.shape[1])
        if state.group:
            raise UserError(f"{state.group} groups of this batch are fixed already; call restart before prefill")
        if len(sizes) == len(self.groups):
            raise UserError(f"{tokens.shape[1]} tokens are a whole image of {self.name}: nothing is left to draw")
        if sizes:
            self._prefill(state, tokens, sizes, released)

    @abstractmethod
    def _prefill(self, state: DecodeState, tokens: Tensor, sizes: tuple[int, ...], released: bool) -> None:
        """:meth:`prefill` of groups of ``sizes``, at least one."""

    @abstractmethod
    def cache_bytes(self, guided: bool) -> int:
        """Bytes of KV cache for one image."""

    @abstractmethod
    def new_student(self, generator: torch.Generator | None = None, layerwise: bool = True) -> Student:
        """A student in float32 that starts from this teacher, on its device.

        ``layerwise`` gives every block its own map of the noise/data embedding, where the family has one.
        """

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

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise UserError for settings that this teacher cannot be sampled with."""
        self.guidance_weights(sampling.guidance, sampling.guidance_interval)
        entries, chosen = len(self.codebook), self.filter(sampling)
        if chosen.keeps_one and sampling.top_k != 1:
            raise UserError(
                f"top-p is {sampling.top_p:g}, which for {self.name} keeps one token whatever the noise; use 1 for all"
            )
        if chosen.top_k > entries:
            raise UserError(f"top-k is {sampling.top_k}, but {self.name} has {entries} tokens; use 0 for all")

    def check_labels(self, labels: Tensor) -> None:
        """Raise UserError for labels outside [0, num_classes)."""
        check_labels(labels, self.num_classes, self.name)
