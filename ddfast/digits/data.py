"""The real data: scikit-learn's 1797 digits, split once, enlarged to 16x16 and augmented by one bicubic resampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.errors import UserError

IMAGE_SIZE = 16
NUM_CLASSES = 10
TEST_SIZE = 360
SPLIT_SEED = 0
SOURCE_SIZE = 8  # side of a raw digit

MAX_ROTATION = math.radians(10.0)
MAX_SHIFT = 0.5 * 2 / SOURCE_SIZE  # half a raw pixel, in grid_sample's units where the image spans 2
MAX_SCALE = 0.08
MAX_SHEAR = 0.1


@dataclass(frozen=True)
class Digits:
    """One part of the data: ``images`` [N, 1, 8, 8] float32 in [0, 1] and ``labels`` [N] int64 in 0..9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits() -> tuple[Digits, Digits]:
    """The 1437 training and 360 test digits: a stratified split, always the same.

    Raises UserError when scikit-learn, which carries the data, is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("the digits come with scikit-learn, not installed: pip install 'ddfast[digits]'") from error
    raw = sklearn_digits()
    parts = train_test_split(
        raw.images, raw.target, test_size=TEST_SIZE, random_state=SPLIT_SEED, stratify=raw.target, shuffle=True
    )
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
    return _part(train_x, train_y), _part(test_x, test_y)


def _part(pixels: Tensor, labels: Tensor) -> Digits:
    return Digits(pixels.to(torch.float32).div(16.0).unsqueeze(1), labels.to(torch.int64))


def enlarge(images: Tensor) -> Tensor:
    """[N, 1, 8, 8] -> [N, 1, 16, 16] by bicubic resampling, clamped to [0, 1]; no augmentation."""
    identity = torch.eye(2, 3).expand(len(images), 2, 3)
    return _resample(images, identity)


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """[N, 1, 8, 8] -> [N, 1, 16, 16]: each image under its own random affine map, by one bicubic resampling.

    At strength 1: rotation within 10 degrees, shift within half a raw pixel, scale within 8 %, shear within 0.1,
    each uniform. ``strength`` multiplies all four.
    """
    n = len(images)
    u = (torch.rand(n, 5, generator=generator) * 2 - 1) * strength
    angle, scale, shear = u[:, 0] * MAX_ROTATION, 1 + u[:, 1] * MAX_SCALE, u[:, 2] * MAX_SHEAR
    cos, sin = angle.cos() * scale, angle.sin() * scale
    dx, dy = u[:, 3] * MAX_SHIFT, u[:, 4] * MAX_SHIFT
    theta = torch.stack([cos, cos * shear - sin, dx, sin, sin * shear + cos, dy], dim=1)
    return _resample(images, theta.view(n, 2, 3))


def _resample(images: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, [len(images), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False).clamp_(0, 1)


class Batches:
    """Endless augmented batches: images drawn with replacement by a generator of their own.

    Two objects with the same arguments give the same batches.
    """

    def __init__(self, data: Digits, batch: int, seed: int, strength: float = 1.0) -> None:
        self.data, self.batch, self.strength = data, batch, strength
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Images [batch, 1, 16, 16] in [0, 1] and labels [batch] int64."""
        index = torch.randint(len(self.data), (self.batch,), generator=self.generator)
        return augment(self.data.images[index], self.generator, self.strength), self.data.labels[index]
