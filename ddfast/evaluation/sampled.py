"""Images drawn as they are asked for, by a model or by an exported one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..sampling import Plan, Sampler


@dataclass(frozen=True)
class DrawnImages(ABC):
    """Sample i is of class i modulo their number, in turn, and starts from the noise of pair i.

    Attributes:
        classes: in turn.
        num: N, the number of samples.
        seed: of the noise.
        how: JSON-able, what else decides the images; "way" names it for people.
    """

    classes: tuple[int, ...]
    num: int
    seed: int
    how: dict[str, Any]

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the model."""

    @property
    @abstractmethod
    def num_classes(self) -> int: ...

    @property
    @abstractmethod
    def size(self) -> int:
        """H and W"""

    @abstractmethod
    def draw(self, samples: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W], on the CPU, of the ``samples`` int64 [B]."""

    def __len__(self) -> int:
        return self.num

    @property
    def labels(self) -> Tensor:
        """int64 [N]"""
        return self.labels_of(torch.arange(self.num))

    def labels_of(self, samples: Tensor) -> Tensor:
        """Labels int64 [B] of the ``samples`` int64 [B]."""
        return torch.tensor(self.classes)[samples % len(self.classes)]

    def facts(self) -> dict[str, Any]:
        every = self.num_classes
        classes = "all" if self.classes == tuple(range(every)) else list(self.classes)
        which = {"classes": classes, "num_classes": every, "num": self.num, "seed": self.seed, "size": self.size}
        return self.how | which

    def batches(self, n: int) -> Iterator[Tensor]:
        """All images in order, uint8 [b, 3, H, W] with b = ``n`` but for the last."""
        for first in range(0, self.num, n):
            yield self.draw(torch.arange(first, min(first + n, self.num)))


def to_bytes(images_B3HW: Tensor, name: str) -> Tensor:
    """Images in [0, 1] as uint8 on the CPU; UserError where ``name`` drew what is no number, which would be black."""
    if not bool(images_B3HW.isfinite().all()):
        raise UserError(f"images of {name} are not finite: its weights are damaged, or overflow in a type too narrow")
    return images_B3HW.mul(255).round().byte().cpu()


@dataclass(frozen=True)
class SampledImages(DrawnImages):
    """The images of a plan."""

    sampler: Sampler
    plan: Plan

    @property
    def name(self) -> str:
        return self.sampler.name

    @property
    def num_classes(self) -> int:
        return self.sampler.num_classes

    @property
    def size(self) -> int:
        return int(self.sampler.tokenizer.image_size)  # type: ignore[arg-type]

    def draw(self, samples: Tensor) -> Tensor:
        labels = self.labels_of(samples).to(self.sampler.device)
        images = self.sampler.images(labels, self.sampler.noise(self.seed, samples), self.plan)
        return to_bytes(images, self.name)
