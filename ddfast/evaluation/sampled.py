"""Images drawn from a model as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sampling import Plan, Sampler


@dataclass(frozen=True)
class SampledImages:
    """The images of a plan: sample i is of class i modulo their number, in turn, and starts from the noise of pair i.

    Attributes:
        classes: in turn.
        num: N, the number of samples.
        seed: of the noise.
        how: JSON-able, what else decides the images.
    """

    sampler: Sampler
    plan: Plan
    classes: tuple[int, ...]
    num: int
    seed: int
    how: dict[str, Any]

    def __len__(self) -> int:
        return self.num

    @property
    def size(self) -> int:
        return int(self.sampler.tokenizer.image_size)  # type: ignore[arg-type]

    @property
    def labels(self) -> Tensor:
        """int64 [N]"""
        return self.labels_of(torch.arange(self.num))

    def labels_of(self, samples: Tensor) -> Tensor:
        """Labels int64 [B] of the ``samples`` int64 [B]."""
        return torch.tensor(self.classes)[samples % len(self.classes)]

    def facts(self) -> dict[str, Any]:
        every = self.sampler.num_classes
        classes = "all" if self.classes == tuple(range(every)) else list(self.classes)
        which = {"classes": classes, "num_classes": every, "num": self.num, "seed": self.seed, "size": self.size}
        return self.how | which

    def draw(self, samples: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W], on the CPU, of the ``samples`` int64 [B]."""
        labels = self.labels_of(samples).to(self.sampler.device)
        images = self.sampler.images(labels, self.sampler.noise(self.seed, samples), self.plan)
        return images.mul(255).round().byte().cpu()

    def batches(self, n: int) -> Iterator[Tensor]:
        """All images in order, uint8 [b, 3, H, W] with b = ``n`` but for the last."""
        for samples in torch.arange(self.num).split(n):
            yield self.draw(samples)
