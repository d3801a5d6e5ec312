"""Images drawn by an exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddfast.evaluation.sampled import DrawnImages, to_bytes

from .engine import Engine


@dataclass(frozen=True)
class EngineImages(DrawnImages):
    engine: Engine

    @property
    def name(self) -> str:
        return str(self.engine.manifest.student["name"])

    @property
    def num_classes(self) -> int:
        return self.engine.manifest.shapes.num_classes

    @property
    def size(self) -> int:
        return self.engine.manifest.shapes.image_size

    def draw(self, samples: Tensor) -> Tensor:
        drawn = self.engine.draw(self.labels_of(samples), self.seed, samples)
        return torch.cat([to_bytes(part["image"], self.name) for part in drawn])


def engine_images(engine: Engine, classes: Sequence[int] | None, num: int, seed: int) -> EngineImages:
    """``num`` images of ``classes`` in turn, all of them for None."""
    every = range(engine.manifest.shapes.num_classes)
    return EngineImages(tuple(every if classes is None else classes), num, seed, facts_of(engine), engine)


def facts_of(engine: Engine) -> dict[str, Any]:
    """JSON-able: what decides the images."""
    m = engine.manifest
    steps = len(m.timesteps)
    facts: dict[str, Any] = {"way": f"{steps} step" + "s" * (steps > 1), "student": dict(m.student)}
    how = {"target": m.target, "precision": dict(m.precision), "timesteps": list(m.timesteps)}
    return facts | how | {"files": {name: f["sha256"] for name, f in m.files.items()}}
