"""The teacher of the VAR family: a scale a group, with a static KV cache.

Axes: B images, R rows (2B while guided), n tokens of a scale, L tokens of all scales, D width, H heads, d head width,
V codebook size, C codebook channels, S positions of the latent map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import UserError
from ..kv_cache import KVCache
from .base import DecodeState, Sampling, Teacher, Tokenizer
from .groups import first_groups
from .linear import make_linear
from .quantizer import MultiScaleQuantizer
from .var import Block, VARTransformer
from .var_student import VARStudent, VARStudentConfig

Linear = Callable[[Tensor], Tensor]


class MultiScaleTokenizer(Tokenizer, Protocol):
    """A tokenizer with VAR's residual quantizer."""

    @property
    def quantizer(self) -> MultiScaleQuantizer: ...


@dataclass(frozen=True)
class _Layer:
    """A block's matrix products, and what its normalised queries are multiplied by."""

    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear
    modulation: Linear | None  # None where the modulation is shared
    shared: Tensor | None  # then what this block adds to it: [6, D]
    scale_H: Tensor | None


@dataclass(frozen=True)
class _Scale:
    """What one step of the residual quantizer needs: see ``ops.quantizer_step``."""

    up: Tensor | None
    taps: Tensor
    bias: Tensor
    down: Tensor | None


@dataclass(frozen=True)
class _Weights:
    """A transformer and its quantizer, ready for decoding."""

    layers: list[_Layer]
    shared_modulation: Linear | None
    head_modulation: Linear
    head: Linear
    word_embed: Linear
    positions_LD: Tensor
    codebook_VC: Tensor
    scales: list[_Scale]


class VARState(DecodeState):
    """Buffers of a batch of a VAR teacher.

    Attributes:
        inputs: float32 [R, n, D], the next scale's embedded input, and after a prefill those of the scales before it;
            becomes their residual stream.
        unmasked: whether these positions see one another without a mask.
        f_hat: float32 [B, S, C], the latent map so far.
    """

    inputs: Tensor
    unmasked: bool

    def __init__(self, capacity: int, weights: tuple[float, ...], teacher: VARTeacher, positions: int) -> None:
        super().__init__(capacity, weights)
        c, device, wide = teacher.transformer.config, teacher.device, teacher.wide
        rows, quantizer = capacity * (2 if self.guided else 1), teacher.quantizer
        width = c.embed_dim // c.num_heads
        self.cache = KVCache(c.depth, rows, c.num_heads, positions, width, teacher.dtype, device)
        widest = max(c.groups[: len(first_groups(c.groups, positions)) + 1])  # the input after the last is made, too
        most = rows * widest * c.embed_dim
        self._x = torch.empty(most, dtype=wide, device=device)
        self._h = torch.empty(most, dtype=teacher.dtype, device=device)
        self._heads = torch.empty(most, dtype=teacher.dtype, device=device)
        self.labels = torch.empty(rows, dtype=torch.int64, device=device)
        self.mods = torch.empty(c.depth, 6, rows, c.embed_dim, dtype=wide, device=device)
        self.head_mods = torch.empty(2, rows, c.embed_dim, dtype=wide, device=device)
        channels = quantizer.channels
        self._f_hat = torch.empty(capacity, quantizer.side**2, channels, dtype=wide, device=device)
        self._following = torch.empty(capacity * widest * channels, dtype=wide, device=device)

    @property
    def f_hat(self) -> Tensor:
        return self._f_hat[: self.batch]

    def following(self, n: int) -> Tensor:
        """[B, n, C] to hold the next scale's input map."""
        channels = self._f_hat.shape[2]
        return self._following[: self.batch * n * channels].view(self.batch, n, channels)

    def stream(self, rows: int, n: int) -> Tensor:
        """[R, n, D] to hold the residual stream."""
        return self._x[: rows * n * self.mods.shape[3]].view(rows, n, -1)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two buffers of the shape of x, for a branch's normed input and for what its heads attended to."""
        size = x.numel()
        if size > self._h.numel():  # several scales in one call
            self._h, self._heads = self._h.new_empty(size), self._heads.new_empty(size)
        return self._h[:size].view(x.shape), self._heads[:size].view(x.shape)


class VARTeacher(Teacher):
    """VAR behind the teacher wall. Its guidance grows linearly with the scale: w_k = 1 + guidance k / (K - 1)."""

    filter_rule = "var"
    steps_alike = False
    transformer: VARTransformer

    def __init__(self, name: str, transformer: VARTransformer, tokenizer: nn.Module) -> None:
        super().__init__(name)
        self.transformer = transformer
        self.tokenizer = tokenizer
        config, quantizer = transformer.config, self.quantizer
        self.groups = config.groups
        self.num_classes = config.num_classes
        have = (quantizer.patch_nums, *quantizer.codebook.shape)
        need = (config.patch_nums, config.vocab_size, config.codebook_dim)
        if have != need:
            raise UserError(
                f"this tokenizer does not fit {name}: its scales, codebook entries and channels are {have}, not {need}"
            )

    @property
    def _tokenizer(self) -> MultiScaleTokenizer:
        return self.tokenizer  # type: ignore[return-value]

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        return self._tokenizer.quantizer

    @property
    def wide(self) -> torch.dtype:
        """What residual stream, modulations and latent map are kept in."""
        return torch.promote_types(self.dtype, torch.float32)

    def plain_sampling(self) -> Sampling:
        return Sampling(guidance=0.0, top_k=0, top_p=0.0)

    def guidance_weights(self, guidance: float, interval: int = -1) -> tuple[float, ...]:
        if interval != -1:
            raise UserError(
                f"guidance_interval {interval} has no meaning for {self.name}, which ramps guidance; drop it"
            )
        last = max(len(self.groups) - 1, 1)
        return tuple(1 + guidance * k / last for k in range(len(self.groups)))

    def cache_bytes(self, guided: bool) -> int:
        c = self.transformer.config
        return 2 * c.depth * c.embed_dim * self.num_tokens * self.dtype.itemsize * (2 if guided else 1)

    def new_student(self, generator: torch.Generator | None = None, layerwise: bool = True) -> VARStudent:
        student = VARStudent(VARStudentConfig(**asdict(self.transformer.config), layerwise=layerwise))
        student.init_weights(generator)
        student.init_with_teacher(self.transformer, generator)
        return student.to(self.device)

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.transformer.blocks))

    def _matrices(self) -> Iterator[nn.Parameter]:
        return (p for m in self.transformer.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False))

    def _build(self, precision: str) -> _Weights:
        model, quantizer, wide = self.transformer, self.quantizer, self.wide

        def pack(linear: nn.Module, gelu: bool = False, chosen: str = precision) -> Linear:
            weight, bias = linear.get_parameter("weight").detach(), linear.get_parameter("bias").detach()
            return make_linear(weight, bias, precision=chosen, gelu=gelu)

        def layer(block: Block) -> _Layer:
            attn = block.attn
            return _Layer(
                qkv=make_linear(attn.mat_qkv.weight.detach(), attn.qkv_bias().detach(), precision=precision),
                proj=pack(attn.proj),
                fc1=pack(block.ffn.fc1, gelu=True),
                fc2=pack(block.ffn.fc2),
                modulation=None if self.transformer.config.shared_aln else pack(block.ada_lin[1], chosen="native"),
                shared=block.ada_gss.detach().to(wide)[0, 0] if self.transformer.config.shared_aln else None,
                scale_H=attn.head_scales().to(wide) if attn.l2_norm else None,
            )

        def scale(k: int) -> _Scale:
            up, down = (None if m is None else m.to(wide) for m in quantizer.matrices(k))
            taps, bias = quantizer.taps(k)
            return _Scale(up, taps.to(wide), bias.to(wide), down)

        return _Weights(
            layers=[layer(block) for block in self._blocks()],
            shared_modulation=pack(model.shared_ada_lin[1], chosen="native") if model.config.shared_aln else None,
            head_modulation=pack(model.head_nm.ada_lin[1], chosen="native"),
            head=pack(model.head),
            word_embed=pack(model.word_embed, chosen="native"),
            positions_LD=model.positions()[0].to(wide),
            codebook_VC=quantizer.codebook.detach().to(wide).contiguous(),
            scales=[scale(k) for k in range(len(self.groups))],
        )

    def _new_state(self, capacity: int, weights: tuple[float, ...], positions: int) -> VARState:
        return VARState(capacity, weights, self, positions)

    @torch.inference_mode()
    def restart(self, state: DecodeState, labels: Tensor) -> None:
        assert isinstance(state, VARState)
        model, weights = self.transformer, self._weights()
        state.begin(len(labels))
        rows, batch, dim = state.rows, state.batch, model.config.embed_dim
        state.labels[:batch].copy_(labels)
        state.labels[batch:rows].fill_(self.num_classes)
        cond_RD = model.class_emb(state.labels[:rows])
        active = F.silu(cond_RD)
        shared = None if weights.shared_modulation is None else weights.shared_modulation(active).view(rows, 6, dim)
        for i, layer in enumerate(weights.layers):
            if layer.modulation is not None:
                mods_R6D = layer.modulation(active).view(rows, 6, dim)
            else:
                mods_R6D = cast(Tensor, shared) + layer.shared
            state.mods[i, :, :rows].copy_(mods_R6D.transpose(0, 1))
        state.head_mods[:, :rows].copy_(weights.head_modulation(active).view(rows, 2, dim).transpose(0, 1))
        state.f_hat.zero_()
        state.unmasked = False
        first = self.groups[0]
        state.inputs = state.stream(rows, first)
        start = model.pos_start[0] + weights.positions_LD[:first]
        torch.add(cond_RD.unsqueeze(1), start, out=state.inputs)

    @torch.inference_mode()
    def logits(self, state: DecodeState) -> tuple[Tensor, Tensor | None]:
        assert isinstance(state, VARState)
        c, weights, cache = self.transformer.config, self._built(), state.cache
        x, eps = state.inputs, c.norm_eps
        rows, n, dim = x.shape
        width = dim // c.num_heads
        attn_scale = 1.0 if c.attn_l2_norm else 0.25 / math.sqrt(width)
        h, heads = state.branches(x)
        scales = [n] if state.unmasked else self._scales_in(state, n)
        branch: Tensor | None = None
        gate: Tensor | None = None
        for layer, mods, kv in zip(weights.layers, state.mods[:, :, :rows].unbind(0), cache.layers(rows), strict=True):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = mods.unbind(0)
            ops.add_layer_norm(x, branch, gate, scale1, shift1, eps, h)
            qkv = layer.qkv(h).view(rows, n, 3, c.num_heads, width)
            ops.append_normed(qkv, layer.scale_H, kv, cache.length)
            attend_by_scales(qkv[:, :, 0], kv, cache.start, scales, attn_scale, heads, h)
            ops.add_layer_norm(x, layer.proj(heads), gamma1, scale2, shift2, eps, h)
            branch, gate = layer.fc2(layer.fc1(h)), gamma2
        assert branch is not None
        scale, shift = state.head_mods[:, :rows].unbind(0)
        if n > scales[-1] or state.unmasked:  # only the last scale's logits are wanted
            last = self.groups[state.group]
            x, branch, h = (t[:, -last:].contiguous() for t in (x, branch, h))
        ops.add_layer_norm(x, branch, gate, scale, shift, eps, h)
        return state.split(weights.head(h))

    def _scales_in(self, state: DecodeState, n: int) -> list[int]:
        """Sizes of the scales that ``n`` positions to run belong to: the next one, and after a prefill those before."""
        first = state.group
        while sum(self.groups[first : state.group + 1]) < n:
            first -= 1
        return list(self.groups[first : state.group + 1])

    @torch.inference_mode()
    def append(self, state: DecodeState, tokens: Tensor) -> None:
        assert isinstance(state, VARState)
        state.cache.advance(state.inputs.shape[1])
        embedded = self._follow(state, tokens)
        state.unmasked = False
        if embedded is not None:
            state.inputs = state.stream(state.rows, embedded.shape[1])
            halves = state.inputs.view(state.copies, state.batch, *embedded.shape[1:])
            torch.add(embedded, self._positions(state), out=halves[0])
            halves[1:].copy_(halves[0])

    def _prefill(self, state: DecodeState, tokens: Tensor, sizes: tuple[int, ...], released: bool) -> None:
        assert isinstance(state, VARState)
        parts = [state.inputs]
        for tokens_Bn in tokens.split(list(sizes), dim=1):
            embedded = self._follow(state, tokens_Bn)
            assert embedded is not None
            parts.append((embedded + self._positions(state)).repeat(state.copies, 1, 1))
        state.inputs, state.unmasked = torch.cat(parts, dim=1), released

    def _positions(self, state: DecodeState) -> Tensor:
        """Position and level embeddings of the next scale: [n, D]."""
        start = sum(self.groups[: state.group])
        return self._built().positions_LD[start : start + self.groups[state.group]]

    def _follow(self, state: VARState, tokens: Tensor) -> Tensor | None:
        """One scale's tokens [B, n] into the latent map; the next scale's map, embedded [B, m, D], or None."""
        weights, k = self._built(), state.group
        scale = weights.scales[k]
        state.group += 1
        n = self.groups[k + 1] if k + 1 < len(self.groups) else 0
        following = state.following(n) if n else None
        ops.quantizer_step(
            tokens.contiguous(),
            weights.codebook_VC,
            scale.up,
            scale.taps,
            scale.bias,
            self.quantizer.quant_resi.ratio,
            state.f_hat,
            scale.down,
            following,
        )
        return None if following is None else weights.word_embed(following.to(self.dtype))


def attend_by_scales(
    q_RnHd: Tensor, kv: Tensor, start: int, scales: list[int], scale: float, heads_RnD: Tensor, spare_RnD: Tensor
) -> None:
    """Attention of consecutive scales, each to itself and what is before it in the cache.

    Args:
        kv: [2, R, H, L, d], filled up to these positions, which begin at ``start``.
        scales: n of each.
        heads_RnD: receives the heads' outputs.
        spare_RnD: is written over, where there are several scales.
    """
    rows, n, heads, width = q_RnHd.shape
    out, stop = heads_RnD.view(rows, n, heads, width), 0
    for size in scales:
        first, stop = stop, stop + size
        whole = len(scales) == 1
        part = out if whole else spare_RnD.view(-1)[: rows * size * heads * width].view(rows, size, heads, width)
        k, v = kv[:, :, :, : start + stop].unbind(0)
        ops.attention(q_RnHd[:, first:stop], k, v, scale, part)
        if not whole:
            out[:, first:stop] = part
