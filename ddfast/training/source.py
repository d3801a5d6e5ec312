"""Where a trainer's pairs come from: a folder, in an order of its own, or the teacher, as they are needed.

Every choice is a function of the seed and the step, so a run that goes on at some step sees what it would have seen,
with any number of ranks.

Axes: b pairs of this rank and micro-batch, L tokens, C codebook channels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..models import Teacher
from ..pairs import Manifest, PairDataset, PairDecoder, Pairs
from .config import TrainConfig


def seeded(*numbers: int) -> torch.Generator:
    """A generator that is a function of some numbers >= 0, mixed well: torch's takes 32 bits of a seed on a CPU."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def draw_timesteps(config: TrainConfig, step: int) -> Tensor:
    """The timestep of every pair of a step's batch: int64 [batch], uniform over ``config.timesteps``."""
    choice = torch.randint(len(config.timesteps), (config.batch,), generator=seeded(config.seed, step, 1))
    return torch.tensor(config.timesteps)[choice]


class Source(Protocol):
    """Pairs by step."""

    def batch(self, step: int, part: range) -> Pairs:
        """The pairs at places ``part`` of step ``step``'s batch, on the training device."""
        ...

    def holdout(self, part: range) -> Pairs:
        """Some of the pairs that are never trained on, likewise."""
        ...


class StoredPairs:
    """Pairs of a folder, every one of them once an epoch, in an order drawn anew for each epoch."""

    def __init__(self, dataset: PairDataset, config: TrainConfig, device: torch.device) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.count = len(dataset) - config.holdout
        if self.count < 1:
            raise UserError(
                f"{dataset.folder} has {len(dataset)} pairs, and holdout {config.holdout} leaves none to train on; "
                "make more pairs or choose a smaller --holdout"
            )
        self._order: tuple[int, Tensor] = -1, torch.empty(0)

    def batch(self, step: int, part: range) -> Pairs:
        first = step * self.config.batch
        return self._read([self._place(first + i) for i in part])

    def holdout(self, part: range) -> Pairs:
        return self._read([self.count + i for i in part])

    def _place(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if self._order[0] != epoch:
            self._order = epoch, torch.randperm(self.count, generator=seeded(self.config.seed, epoch, 2))
        return int(self._order[1][place])

    def _read(self, index: list[int]) -> Pairs:
        pairs = torch.tensor(index)
        labels, tokens = self.dataset.rows(pairs)
        if self.device.type == "cuda":
            labels, tokens = labels.pin_memory(), tokens.pin_memory()
        return Pairs(
            labels.to(self.device, non_blocking=True),
            tokens.to(self.device, non_blocking=True),
            self.dataset.noise(pairs, self.device),
        )


class OnlinePairs:
    """Pairs that the teacher makes for each batch: none is seen twice. Pair i of the manifest belongs to step
    i // batch; those after the last step are the holdout. ``micro`` are made at a time."""

    def __init__(self, teacher: Teacher, manifest: Manifest, config: TrainConfig, micro: int) -> None:
        self.config = config
        self._decoder = PairDecoder(teacher, manifest, micro)

    def batch(self, step: int, part: range) -> Pairs:
        return self._make(step * self.config.batch + part.start, len(part))

    def holdout(self, part: range) -> Pairs:
        return self._make(self.config.steps * self.config.batch + part.start, len(part))

    def _make(self, first: int, count: int) -> Pairs:
        made = []
        for start in range(0, count, self._decoder.batch):
            size = min(self._decoder.batch, count - start)
            made.append(self._decoder.pairs(first + start, size))
        return Pairs(*(torch.cat(parts) for parts in zip(*made, strict=True)))
