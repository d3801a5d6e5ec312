"""Running an exported folder: class and noise in, pixels out.

Axes: B images, L tokens of an image, C codebook channels.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ddfast import ops
from ddfast.errors import UserError
from ddfast.models.base import check_labels

from .manifest import Manifest

Tensors = dict[str, Tensor]


def require(extra: str, *packages: str) -> None:
    """Raise UserError for packages that are not installed, with the extra that brings them."""
    missing = [name for name in packages if not installed(name)]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed: pip install 'ddfast[{extra}]'")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Stage(ABC):
    """One file of an exported folder, loaded: named tensors in, named tensors out.

    Attributes:
        runtime: what runs it, for people, e.g. "onnxruntime 1.31.1, CPU".
        inputs: names of what it takes.
        device: where inputs belong and outputs come.
    """

    runtime: str
    inputs: Sequence[str]
    device = torch.device("cpu")

    @abstractmethod
    def __call__(self, feeds: Tensors) -> Tensors:
        """Run it. Outputs may be overwritten by the next call."""


class Engine:
    """The stages of a folder one after the other.

    Attributes:
        manifest: of the folder.
        stages: by name, in order.
    """

    def __init__(self, manifest: Manifest, stages: Mapping[str, Stage]) -> None:
        self.manifest, self.stages = manifest, stages
        self.first = next(iter(stages.values()))

    @property
    def runtime(self) -> str:
        """What runs it; of a pair that is run in two ways, both."""
        return " and ".join(dict.fromkeys(stage.runtime for stage in self.stages.values()))

    @property
    def device(self) -> torch.device:
        return self.first.device

    def feeds(self, labels: Tensor, seed: int, samples: Tensor) -> Tensors:
        """The graph's inputs for ``labels`` int64 [B] and ``samples`` int64 [B], which number the noise of ``seed``.

        Raises UserError for what is no class or no seed.
        """
        shapes = self.manifest.shapes
        check_labels(labels, shapes.num_classes, str(self.manifest.student["name"]))
        if not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}; it must lie in [0, 2^63)")
        given = {"label": labels.to(self.device)}
        if self.manifest.seeded:
            return given | {"seed": torch.tensor([seed], device=self.device), "sample": samples.to(self.device)}
        noise = ops.normal_noise(seed, samples.to(self.device), 0, shapes.tokens, shapes.channels)
        return given | {"noise": noise}

    def run(self, feeds: Tensors) -> Tensors:
        """All stages on one batch: ``image`` float32 [B, 3, H, W] in [0, 1], and ``embeddings`` [B, L, C] where the
        folder has them."""
        values = dict(feeds)
        for stage in self.stages.values():
            values |= stage(values)
        return values

    def draw(self, labels: Tensor, seed: int, samples: Tensor) -> Iterator[Tensors]:
        """Outputs of :meth:`run` for any number of images, as many at a time as the graph takes."""
        batch = self.manifest.batch
        for part in torch.arange(len(labels)).split(batch.most):
            rows = torch.cat([part, part[-1:].expand(max(0, batch.least - len(part)))])  # a full batch, if need be
            values = self.run(self.feeds(labels[rows], seed, samples[rows]))
            outputs = ("image", "embeddings")
            yield {name: values[name][: len(part)].clone() for name in outputs if name in values}
