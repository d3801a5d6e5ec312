"""The teacher of the LlamaGen family: a token a group, with a static KV cache.

Axes: B images, R rows (2B while guided), D width, H heads, Hk heads of keys and values, d head width, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import UserError
from ..kv_cache import KVCache
from .attention import causal
from .base import DecodeState, Sampling, Teacher, Tokenizer
from .linear import make_linear
from .llamagen import Block, LlamaGenTransformer, rope_2d
from .llamagen_student import LlamaGenStudent, LlamaGenStudentConfig

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """A block's matrix products and the weights of its norms."""

    qkv: Linear
    wo: Linear
    w13: Linear
    w2: Linear
    attention_norm_D: Tensor
    ffn_norm_D: Tensor


@dataclass(frozen=True)
class _Weights:
    """A transformer ready for decoding."""

    layers: list[_Layer]
    norm_D: Tensor
    output: Linear
    rope: Tensor


class LlamaGenState(DecodeState):
    """Buffers of a batch of a LlamaGen teacher.

    Attributes:
        inputs: float32 [R, n, D], the next position's embedding, and after a prefill those of all before it; becomes
            their residual stream.
    """

    def __init__(self, capacity: int, weights: tuple[float, ...], teacher: LlamaGenTeacher, positions: int) -> None:
        super().__init__(capacity, weights)
        c, device, dtype = teacher.transformer.config, teacher.device, teacher.dtype
        rows = capacity * (2 if self.guided else 1)
        self.cache = KVCache(c.n_layer, rows, c.kv_heads, positions, c.head_dim, dtype, device)
        self.labels = torch.empty(rows, dtype=torch.int64, device=device)
        self.prompt: Tensor | None = None
        self._x = torch.empty(rows, 1, c.dim, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self._h = torch.empty(rows, 1, c.dim, dtype=dtype, device=device)
        self._heads = torch.empty(rows, c.n_head, c.head_dim, dtype=dtype, device=device)
        self._hidden = torch.empty(rows, 1, c.ffn_hidden, dtype=dtype, device=device)

    def begin(self, batch: int) -> None:
        super().begin(batch)
        self.prompt = None

    @property
    def inputs(self) -> Tensor:
        return self._x[: self.rows] if self.prompt is None else self.prompt

    def branches(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers for a branch's normed input, what its heads attended to, and its hidden layer, at n positions."""
        rows, own = self.rows, (self._h, self._heads, self._hidden)
        h, heads, hidden = (t[:rows] if n == 1 else t.new_empty(rows * n, *t.shape[1:]) for t in own)
        return h.view(rows, n, -1), heads, hidden.view(rows, n, -1)


class LlamaGenTeacher(Teacher):
    """LlamaGen behind the teacher wall. Guided logits are uncond + guidance (cond - uncond); with an interval n >= 0
    only tokens 0..n+1 are guided, as in the official sampler."""

    filter_rule = "llamagen"
    steps_alike = True
    transformer: LlamaGenTransformer

    def __init__(self, name: str, transformer: LlamaGenTransformer, tokenizer: nn.Module) -> None:
        super().__init__(name)
        self.transformer = transformer
        self.tokenizer = tokenizer
        config = transformer.config
        self.groups = (1,) * config.block_size
        self.num_classes = config.num_classes
        if self._tokenizer.codebook.shape[0] != config.vocab_size:
            raise UserError(
                f"tokenizer with {self._tokenizer.codebook.shape[0]} codebook entries does not fit {name}, "
                f"which needs {config.vocab_size}"
            )

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.tokenizer  # type: ignore[return-value]

    def plain_sampling(self) -> Sampling:
        return Sampling(guidance=1.0, top_k=0, top_p=1.0)

    def guidance_weights(self, guidance: float, interval: int = -1) -> tuple[float, ...]:
        guided = len(self.groups) if interval < 0 else interval + 2
        return tuple(guidance if i < guided else 1.0 for i in range(len(self.groups)))

    def cache_bytes(self, guided: bool) -> int:
        c = self.transformer.config
        per_row = 2 * c.n_layer * c.kv_heads * c.head_dim * c.block_size * self.dtype.itemsize
        return per_row * (2 if guided else 1)

    def new_student(self, generator: torch.Generator | None = None, layerwise: bool = True) -> LlamaGenStudent:
        config = LlamaGenStudentConfig(**asdict(self.transformer.config), codebook_dim=self.codebook.shape[1])
        student = LlamaGenStudent(config)
        student.init_weights(generator)
        student.init_with_teacher(self.transformer, generator)
        return student.to(self.device)

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.transformer.layers))

    def _matrices(self) -> Iterator[nn.Parameter]:
        return (p for m in self.transformer.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False))

    def _build(self, precision: str) -> _Weights:
        model, c = self.transformer, self.transformer.config
        wide = torch.promote_types(self.dtype, torch.float32)

        def pack(*parts: nn.Linear) -> Linear:
            weights = [part.weight.detach() for part in parts]
            return make_linear(torch.cat(weights) if len(weights) > 1 else weights[0], None, precision=precision)

        def layer(block: Block) -> _Layer:
            feed = block.feed_forward
            return _Layer(
                qkv=pack(block.attention.wqkv),
                wo=pack(block.attention.wo),
                w13=pack(feed.w1, feed.w3),
                w2=pack(feed.w2),
                attention_norm_D=block.attention_norm.weight.detach().to(wide),
                ffn_norm_D=block.ffn_norm.weight.detach().to(wide),
            )

        return _Weights(
            layers=[layer(block) for block in self._blocks()],
            norm_D=model.norm.weight.detach().to(wide),
            output=pack(model.output),
            rope=rope_2d(math.isqrt(c.block_size), c.head_dim, c.rope_base).to(self.device, wide),
        )

    def _new_state(self, capacity: int, weights: tuple[float, ...], positions: int) -> LlamaGenState:
        return LlamaGenState(capacity, weights, self, positions)

    @torch.inference_mode()
    def restart(self, state: DecodeState, labels: Tensor) -> None:
        assert isinstance(state, LlamaGenState)
        self._weights()
        state.begin(len(labels))
        batch, rows = state.batch, state.rows
        state.labels[:batch].copy_(labels)
        state.labels[batch:rows].fill_(self.num_classes)
        state.inputs.copy_(self.transformer.cls_embedding(state.labels[:rows]).unsqueeze(1))

    @torch.inference_mode()
    def logits(self, state: DecodeState) -> tuple[Tensor, Tensor | None]:
        assert isinstance(state, LlamaGenState)
        c, weights, rows = self.transformer.config, self._built(), state.rows
        x, eps, length = state.inputs, c.norm_eps, state.cache.length
        n = x.shape[1]
        h, heads, hidden = state.branches(n)
        flat, scale = heads.view(rows, n, c.dim), c.head_dim**-0.5
        branch: Tensor | None = None
        for layer, kv in zip(weights.layers, state.cache.layers(rows), strict=True):
            ops.add_rms_norm(x, branch, layer.attention_norm_D, eps, h)
            qkv = layer.qkv(h).view(rows, n, -1, c.head_dim)
            ops.append_rotated(qkv, c.n_head, weights.rope, kv, length)
            if n == 1:
                ops.decode_attention(qkv[:, 0, : c.n_head], kv, length, scale, heads)
            else:
                k, v = kv[:, :, :, :n].unbind(0)
                mixed_RHnd = causal(qkv[:, :, : c.n_head].transpose(1, 2), k, v, scale)
                heads.copy_(mixed_RHnd.transpose(1, 2).flatten(0, 1))
            ops.add_rms_norm(x, layer.wo(flat), layer.ffn_norm_D, eps, h)
            ops.swiglu(layer.w13(h), hidden)
            branch = layer.w2(hidden)
        assert branch is not None
        if n > 1:  # only the last position's logits are wanted
            x, branch, h = (t[:, -1:].contiguous() for t in (x, branch, h))
        ops.add_rms_norm(x, branch, weights.norm_D, eps, h)
        return state.split(weights.output(h))

    @torch.inference_mode()
    def append(self, state: DecodeState, tokens: Tensor) -> None:
        assert isinstance(state, LlamaGenState)
        state.cache.advance(state.inputs.shape[1])
        state.group += 1
        state.prompt = None
        if state.group < len(self.groups):
            embedded = self.transformer.tok_embeddings(tokens)
            state.inputs.view(state.copies, state.batch, 1, -1).copy_(embedded)

    def _prefill(self, state: DecodeState, tokens: Tensor, sizes: tuple[int, ...], released: bool) -> None:
        assert isinstance(state, LlamaGenState)
        state.group = len(sizes)
        first = self.transformer.cls_embedding(state.labels[: state.rows]).unsqueeze(1)
        embedded = self.transformer.tok_embeddings(tokens).repeat(state.copies, 1, 1)
        state.prompt = torch.cat([first, embedded], dim=1).to(torch.promote_types(self.dtype, torch.float32))
