"""What is exported: a one- or few-step student and its decoder as plain modules, traced with every choice baked in.

Axes: B images, L tokens of an image, C codebook channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ddfast.errors import UserError
from ddfast.models import Distilled
from ddfast.models.base import Tokenizer
from ddfast.models.groups import starts
from ddfast.models.quantizer import MultiScaleQuantizer
from ddfast.sampling import few_step_plan

from .noise import graph_noise


@dataclass(frozen=True)
class Shapes:
    """Of one image: L, C, number of classes, side in pixels."""

    tokens: int
    channels: int
    num_classes: int
    image_size: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 1 <= value < 1 << 31:
                raise UserError(f"its {name} is {value}; it must be at least 1")

    @staticmethod
    def of(model: Distilled) -> Shapes:
        student = model.student
        side = cast(Tokenizer, model.tokenizer).image_size
        return Shapes(student.num_tokens, student.channels, student.num_classes, side)


def marked(label: Tensor, x: Tensor, num_classes: int) -> Tensor:
    """``x`` [B, ...], NaN where ``label`` int64 [B] is no class."""
    allowed = (label >= 0) & (label < num_classes)
    return torch.where(allowed.view(-1, *[1] * (x.dim() - 1)), x, torch.nan)


class Trunk(nn.Module):
    """Labels int64 [B] and noise float32 [B, L, C] to embeddings float32 [B, L, C]: Alg. 3, one pass a timestep.

    A label that is no class gives NaN, so that nobody takes another class's image for it: behind the last class is the
    one that stands for none, and runtimes differ in what they do beyond.
    """

    codebook: Tensor

    def __init__(self, model: Distilled, timesteps: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.student = deepcopy(model.student).to(dtype)
        self.register_buffer("codebook", model.codebook.detach().clone())
        self.ends, self.split = starts(model.student.groups), model.split
        self.plan = few_step_plan(timesteps, len(model.student.groups))

    def forward(self, label: Tensor, noise: Tensor) -> Tensor:
        x = noise[:, : self.ends[self.plan[0].stop]]
        for leg in self.plan:
            if leg.first:
                x = torch.cat([x, noise[:, self.ends[leg.first] : self.ends[leg.stop]]], dim=1)
            x = self.student.predict(label, x, leg.first, self.codebook, self.split, leg.stop)
        return marked(label, x, self.student.num_classes)


class SeededTrunk(nn.Module):
    """A trunk that makes its noise: labels int64 [B], a seed int64 [1] and samples int64 [B], which number them."""

    def __init__(self, trunk: Trunk, shapes: Shapes) -> None:
        super().__init__()
        self.trunk, self.shapes = trunk, shapes

    def forward(self, label: Tensor, seed: Tensor, sample: Tensor) -> Tensor:
        return self.trunk(label, graph_noise(seed, sample, self.shapes.tokens, self.shapes.channels))


class Decoder(nn.Module):
    """Embeddings float32 [B, L, C] to images float32 [B, 3, H, W] in [0, 1]."""

    def __init__(self, model: Distilled, dtype: torch.dtype) -> None:
        super().__init__()
        tokenizer = deepcopy(model.tokenizer)
        for module in tokenizer.modules():
            if isinstance(module, MultiScaleQuantizer):
                module.resample_by_matrices()
        self.tokenizer, self.dtype = tokenizer.to(dtype), dtype

    def forward(self, embeddings: Tensor) -> Tensor:
        return cast(Tokenizer, self.tokenizer).decode_embeddings(embeddings.to(self.dtype)).float()


class Whole(nn.Module):
    """Trunk and decoder: what a trunk takes to (image, embeddings)."""

    def __init__(self, trunk: nn.Module, decoder: Decoder, num_classes: int) -> None:
        super().__init__()
        self.trunk, self.decoder, self.num_classes = trunk, decoder, num_classes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.trunk(*inputs)
        image = self.decoder(embeddings)  # marked once more: some runtimes clamp NaN to black
        return marked(inputs[0], image, self.num_classes), embeddings
