"""How far a student's prediction is from the end of its trajectory: the first term of its loss (arXiv 2412.17153).

A sample's distance does not depend on the others of its batch, so a mean over samples is the same however they are
divided among ranks and micro-batches.

Axes: B samples, L tokens of an image, C codebook channels.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..digits.classifier import FILE as CLASSIFIER_FILE
from ..digits.classifier import load_classifier
from ..errors import UserError, reason
from ..files import require_readable, say_once
from ..models.zoo import BUNDLED
from .config import DISTANCES
from .lpips import MIN_SIDE, VGG_FILE, load_lpips

CLASSIFIER = "digits-classifier"
PIXELS = 8 * 256 * 256  # decoded at a time
SAME = 0.01  # features that differ by less of the largest are the same up to rounding, TF32's too

Extract = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""Images [B, 3, H, W] in [0, 1] to features: one tensor [B, ...] or several."""


class Distance(ABC):
    """A distance between embeddings."""

    @abstractmethod
    def __call__(self, predicted_BLC: Tensor, target_BLC: Tensor, unknown_BL: Tensor) -> Tensor:
        """Distances float32 [B], with a gradient for ``predicted`` alone.

        ``unknown`` bool [B, L]: the positions that were noise; elsewhere ``predicted`` is the target.
        """


class L2(Distance):
    """The mean of squared differences over a sample's unknown positions and all channels."""

    def __call__(self, predicted_BLC: Tensor, target_BLC: Tensor, unknown_BL: Tensor) -> Tensor:
        squared_BL = (predicted_BLC.float() - target_BLC.detach().float()).square().mean(2)
        return (squared_BL * unknown_BL).sum(1) / unknown_BL.sum(1)


class PerceptualDistance(Distance):
    """A network's distance between decoded images.

    Images are not clamped: a predicted pixel outside [0, 1] still has a gradient. The target's are not either, so that
    equal embeddings are at distance 0. Everything is in float32, under autocast too. A tokenizer's activations are many
    times the student's, so a few images at a time are decoded, and decoded again for the gradient.

    Args:
        tokenizer: one of ``ddfast.models``; its ``decode_continuous`` is used. Frozen here.
        network: takes predicted and target images [B, 3, H, W], nominally in [0, 1]; gives distances [B]. Frozen here.
    """

    def __init__(self, tokenizer: nn.Module, network: nn.Module) -> None:
        self._decode = cast(Callable[[Tensor], Tensor], tokenizer.decode_continuous)
        self.tokenizer, self.network = tokenizer.requires_grad_(False), network.requires_grad_(False)

    def __call__(self, predicted_BLC: Tensor, target_BLC: Tensor, unknown_BL: Tensor) -> Tensor:
        some = max(1, PIXELS // cast(int, self.tokenizer.image_size) ** 2)
        parts = zip(predicted_BLC.float().split(some), target_BLC.detach().float().split(some), strict=True)
        with torch.autocast(predicted_BLC.device.type, enabled=False):
            return torch.cat([checkpoint(self._some, *part, use_reentrant=False) for part in parts])

    def _some(self, predicted: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            image = self._decode(target)
        return self.network(self._decode(predicted), image)


class FeatureDistance(nn.Module):
    """The mean squared difference of features; of several tensors, the mean of theirs.

    Args:
        extract: the network that gives the features. What of it is a module is to be in eval mode.
    """

    def __init__(self, extract: Extract) -> None:
        super().__init__()
        self.extract = extract

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W]."""
        pairs = zip(features_of(self.extract, predicted), features_of(self.extract, target), strict=True)
        return torch.stack([(p - t).square().flatten(1).mean(1) for p, t in pairs]).mean(0)


def features_of(extract: Extract, images: Tensor) -> list[Tensor]:
    """The features of ``images`` in float32, as a list."""
    out = extract(images)
    return [t.float() for t in ([out] if isinstance(out, Tensor) else out)]


class ClassifierFeatures(nn.Module):
    """Penultimate features [B, 64] of the bundled digits classifier, of an image's first channel."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
            self.classifier, _ = load_classifier(BUNDLED / CLASSIFIER_FILE)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images[:, :1])


def load_program(path: Path, device: torch.device | str) -> nn.Module:
    """A network saved by ``torch.export.save``, frozen, on ``device``. Such a file is a program, and reading it runs
    it: nothing can make a stranger's safe.

    Raises UserError when the file is no such thing.
    """
    from torch.export.passes import move_to_device_pass  # takes a second to import

    require_readable(path)
    say_once(f"{path} is a program, and is run: use only your own, or one whose maker you trust")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise UserError(f"{path} is damaged: the checksum of {damaged} differs; copy it again")
        program = torch.export.load(path)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes of the loader
        raise UserError(
            f"{path} cannot be read as a program of torch.export.save; is it complete? ({reason(error)})"
        ) from error
    return move_to_device_pass(program, str(device)).module().requires_grad_(False)


def check_features(extract: Extract, name: str, side: int, device: torch.device | str) -> None:
    """Run a frozen feature network once, on random images [2, 3, side, side].

    Raises:
        UserError: it does not take these images, or one alone; it gives something else than tensors with a row an
            image; an image's features depend on the others or on chance; or the images get no gradient from it.
    """
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    try:
        both, first = features_of(extract, images), features_of(extract, images[:1])
    except Exception as error:  # whatever a user's network may raise
        raise UserError(
            f"{name} does not map images [B, 3, {side}, {side}], for every B, to a tensor or a tuple of them; "
            f"export it with that size and a dynamic batch ({reason(error)})"
        ) from error
    shapes = [list(t.shape) for t in both]
    if not both or any(t.ndim < 2 or len(t) != 2 for t in both) or any(len(t) != 1 for t in first):
        raise UserError(f"{name} gives features of shapes {shapes} for 2 images; each must be [B, ...]")
    if any(not bool((b[:1] - f).abs().max() <= SAME * f.abs().max()) for b, f in zip(both, first, strict=True)):
        raise UserError(f"{name} gives an image other features beside another image; export it in eval mode")
    if not any(t.requires_grad for t in both):
        raise UserError(f"{name} gives the images no gradient; export it without torch.no_grad() inside")


def make_distance(
    name: str,
    tokenizer: nn.Module,
    *,
    lpips_weights: str | Path | None = None,
    features: str | Path | None = None,
    device: torch.device | str,
) -> Distance:
    """The distance called "l2", "lpips" or "features".

    Args:
        tokenizer: the teacher's, on ``device``; "l2" leaves it alone, the others freeze it.
        lpips_weights: file of VGG16, ``vgg16-397923af.pth``.
        features: "digits-classifier", or a .pt2 file of ``torch.export.save``. Load no file you do not trust.
        device: where embeddings will be.

    Raises:
        UserError: an unknown name, a missing or a superfluous option, or a file that does not fit.
    """
    if name not in DISTANCES:
        raise UserError(f"no distance is called {name!r}; use one of {', '.join(DISTANCES)}")
    for option, given, wanted in (("--lpips-weights", lpips_weights, "lpips"), ("--features", features, "features")):
        if given is not None and name != wanted:
            raise UserError(f"{option} {given} is not for the distance {name}; drop it, or use the distance {wanted}")
    if name == "l2":
        return L2()
    side = cast(int, tokenizer.image_size)
    network = lpips_network(lpips_weights, side) if name == "lpips" else feature_network(features, side, device)
    return PerceptualDistance(tokenizer, network.to(device))


def lpips_network(weights: str | Path | None, side: int) -> nn.Module:
    """LPIPS for images of ``side`` pixels; UserError for what it needs and does not get."""
    if weights is None:
        raise UserError(
            f"the distance lpips needs torchvision's VGG16 weights for ImageNet: bring {VGG_FILE} from PyTorch's model "
            "hub (https://download.pytorch.org/models) and name it with --lpips-weights"
        )
    if side < MIN_SIDE:
        raise UserError(f"the distance lpips needs images of {MIN_SIDE} pixels, not {side}; use another distance")
    return load_lpips(Path(weights))


def feature_network(features: str | Path | None, side: int, device: torch.device | str) -> nn.Module:
    """The feature distance for images of ``side`` pixels on ``device``; UserError for a network that does not suit."""
    if features is None:
        raise UserError(f"the distance features needs a network: name {CLASSIFIER} or a .pt2 file with --features")
    extract: nn.Module
    if str(features) == CLASSIFIER:
        extract = ClassifierFeatures().to(device)
    elif Path(features).suffix == ".pt2":
        extract = load_program(Path(features), device)
    else:
        raise UserError(f"--features {features} is neither {CLASSIFIER} nor a .pt2 file made by torch.export.save")
    check_features(extract, str(features), side, device)
    return FeatureDistance(extract)
