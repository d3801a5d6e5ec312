"""The feature classifier: it says which digit an image shows; Frechet distances are taken between its features."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ddfast.digits.data import NUM_CLASSES, Batches, Digits, augment
from ddfast.digits.loop import Progress, Schedule, fit, seeded
from ddfast.errors import UserError
from ddfast.evaluation.statistics import FeatureStatistics, feature_statistics
from ddfast.files import replacing
from ddfast.records import check_signature, restore, signed
from ddfast.tensors import check_finite, content_hash, read_note, read_safetensors

NAME = "digits-classifier"
FILE = f"{NAME}.safetensors"
FEATURES = 64
SCHEDULE = Schedule(steps=700, weight_decay=0.05)
AUGMENTATION = 1.25  # a little beyond what the teachers see, so that samples at the edge are still recognised
REFERENCE_COPIES = 7  # augmented copies of each training image behind the real data's statistics
REFERENCE_SEED = 20241217


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers on [N, 1, 16, 16] images in [0, 1]; 122k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations [N, 64] of ``images`` [N, 1, 16, 16], scaled by :func:`normalise_features`."""
        out: Tensor = self.trunk(images - 0.5)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [N, 10] of ``images`` [N, 1, 16, 16]."""
        out: Tensor = self.head(self.features(images))
        return out


def train_classifier(
    train: Digits, seed: int, progress: Progress, steps_scale: float = 1.0, schedule: Schedule = SCHEDULE
) -> DigitsClassifier:
    """A classifier fitted by cross-entropy to augmented training digits."""
    schedule = schedule.scaled(steps_scale)
    batches = Batches(train, schedule.batch, seed, AUGMENTATION)
    with seeded(seed):
        model = DigitsClassifier()

    def loss_at(_step: int) -> Tensor:
        images, labels = batches.next()
        return F.cross_entropy(model(images), labels, label_smoothing=0.02)

    fit("classifier", model, schedule, loss_at, progress)
    return model


def reference_images(train: Digits) -> tuple[Tensor, Tensor]:
    """The real data of every Frechet distance: each training image under 7 random augmentations, a fixed seed.

    Returns images [10059, 1, 16, 16] and labels [10059].
    """
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    images = augment(train.images.repeat(REFERENCE_COPIES, 1, 1, 1), generator)
    return images, train.labels.repeat(REFERENCE_COPIES)


@torch.no_grad()
def extract(model: DigitsClassifier, images: Tensor, chunk: int = 1000) -> tuple[Tensor, Tensor]:
    """Features [N, 64] and logits [N, 10] of ``images`` [N, 1, 16, 16], ``chunk`` images at a time."""
    features = torch.cat([model.features(part) for part in images.split(chunk)])
    return features, model.head(features)


def reference_statistics(model: DigitsClassifier, train: Digits) -> FeatureStatistics:
    """Feature statistics of :func:`reference_images`."""
    return feature_statistics(extract(model, reference_images(train)[0])[0])


@torch.no_grad()
def normalise_features(model: DigitsClassifier, train: Digits) -> None:
    """Scale all features by one factor so that their variance over the real data is one on average.

    A Frechet distance grows with the square of the features' scale, which training leaves open: this fixes the unit.
    ReLU commutes with a positive factor, so the logits stay as they are.
    """
    variance = reference_statistics(model, train).covariance.diagonal().mean()
    factor = float(variance) ** -0.5
    last = model.trunk[-2]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(factor)
    last.bias.mul_(factor)
    model.head.weight.div_(factor)


@torch.no_grad()
def save_classifier(path: Path, model: DigitsClassifier, train: Digits) -> None:
    """Write the weights in float16 with the real data's statistics, measured after rounding, in float64. Atomic."""
    rounded = {key: value.half() for key, value in model.state_dict().items()}
    model.load_state_dict(rounded)
    reference = reference_statistics(model, train)
    tensors = {f"classifier.{key}": value for key, value in rounded.items()}
    tensors |= {"reference.mean": reference.mean, "reference.covariance": reference.covariance}
    header = signed({"name": NAME, "count": reference.count, "sha256": content_hash(tensors)})
    with replacing(path) as file:
        file.write(save(tensors, {"ddfast": json.dumps(header, sort_keys=True)}))


def load_classifier(path: Path) -> tuple[DigitsClassifier, FeatureStatistics]:
    """Read what :func:`save_classifier` wrote: the classifier in float32 and the real data's statistics.

    Raises UserError for a file that is missing, damaged or something else.
    """
    metadata, tensors = read_safetensors(path)
    what = "digits classifier; `ddfast digits train --only classifier` makes one"
    header = read_note(path, metadata, what)
    if header.get("name") != NAME:
        raise UserError(f"{path} is no {what}")
    if header.get("sha256") != content_hash(tensors):
        raise UserError(f"{path} is damaged: its tensors do not match their checksum; copy it again")
    if "checksum" in header:
        check_signature(header, f"the header of {path}", "copy it again")
    count = restore(int, header.get("count"), f"the header of {path}: count")
    check_finite(tensors, path)
    model = DigitsClassifier()
    prefix = "classifier."
    own = {key.removeprefix(prefix): t.float() for key, t in tensors.items() if key.startswith(prefix)}
    try:
        model.load_state_dict(own)
        reference = FeatureStatistics(tensors["reference.mean"], tensors["reference.covariance"], count)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path} holds another network than the digits classifier; copy it again") from error
    return model.requires_grad_(False).eval(), reference
