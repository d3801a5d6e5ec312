"""What samples are compared with: statistics from a file, images, or the digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..digits.classifier import extract, reference_images
from ..digits.data import load_digits
from ..errors import UserError
from ..files import file_sha256, replacing
from .features import DigitsFeatures, FeatureExtractor, measure
from .images import IMAGES, check_npz, keys, open_images, read_member, reading_npz
from .names import DIGITS
from .statistics import FeatureStatistics

STORED = ("mu", "sigma", "mu_s", "sigma_s", "count", "network")
ROUNDING = 1e-6  # of a covariance's largest entry or eigenvalue: its files are float32 at times
MOST_FEATURES = 50_000  # kept of a reference: distances to a million images would take days
Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: how many images of a stage are through the network."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        pool, spatial: statistics; ``spatial`` is None where they are not known.
        features: float32 [M, D] for precision and recall, or None.
        missing: why ``features`` is None.
        facts: JSON-able: where it comes from.
    """

    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    features: Tensor | None
    missing: str
    facts: dict[str, Any]


def quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def load_reference(
    path: Path | str, extractor: FeatureExtractor, batch: int = 64, progress: Progress = quiet
) -> Reference:
    """A reference by what ``path`` is.

    - ``"digits"``: the real data's statistics, stored with the classifier; its features where scikit-learn is there.
    - an .npz with ``mu`` and ``sigma`` (pytorch-fid, TTUR), and with ``mu_s`` and ``sigma_s`` for sFID (ADM's
      VIRTUAL_imagenet256_labeled.npz, and :func:`save_reference`); its ``arr_0``, images, gives precision and recall.
    - an .npz with ``arr_0`` alone, or a folder of pictures: everything from the images.

    Of more than 50,000 images, every n-th gives precision and recall.

    Raises:
        UserError: nothing of that sort is there, or its statistics are of another network.
    """
    if path == DIGITS:
        return _digits(extractor)
    path = Path(path)
    stored = {} if path.is_dir() else _stored(path, extractor)
    if not {"mu", IMAGES} & stored.keys() and not path.is_dir():
        raise UserError(f"{path} is no reference: it holds neither mu and sigma nor images ({IMAGES})")
    facts: dict[str, Any] = {"path": str(path)}
    if path.is_file():
        facts["sha256"] = file_sha256(path)
    pool = _gaussian(stored, "mu", "sigma", path)
    spatial = _gaussian(stored, "mu_s", "sigma_s", path)
    if pool is not None and IMAGES not in stored:
        return Reference(pool, spatial, None, f"{path} holds statistics without images", facts)
    source = open_images(path)
    check_side(source.size, extractor, path)
    stride = -(-len(source) // MOST_FEATURES)
    measured = measure(source.batches(batch), extractor, stride, lambda done: progress("reference", done, len(source)))
    facts |= source.facts() | {"features": len(measured.features)}
    if pool is None:
        pool, spatial = measured.pool, measured.spatial
    return Reference(pool, spatial, measured.features, "", facts)


def check_side(side: int, extractor: FeatureExtractor, path: Path | str) -> None:
    """Raise UserError for images that the network does not take."""
    if extractor.side not in (None, side):
        raise UserError(f"the images of {path} are {side}x{side}; the {extractor.name} takes {extractor.side} pixels")


def _digits(extractor: FeatureExtractor) -> Reference:
    if not isinstance(extractor, DigitsFeatures):
        raise UserError(f"the reference {DIGITS} is measured by the digits classifier, not by {extractor.name}")
    features, missing = None, ""
    facts = {"path": DIGITS, "images": extractor.reference.count, "size": extractor.side}
    try:
        features = extract(extractor.model, reference_images(load_digits()[0])[0])[0]
        facts["features"] = len(features)
    except UserError as error:
        missing = str(error)
    return Reference(extractor.reference, None, features, missing, facts)


def _stored(path: Path, extractor: FeatureExtractor) -> dict[str, Any]:
    """The arrays of an .npz but its images, which are named only; UserError for statistics of another network."""
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path} is no reference; name a folder of pictures or an .npz")
    arrays: dict[str, Any] = {}
    with reading_npz(path) as archive:
        for name in keys(archive):
            arrays[name] = read_member(archive, name) if name in STORED else None
    for name, wanted in (("mu", extractor.num_features), ("mu_s", extractor.num_spatial)):
        if name in arrays and arrays[name].shape != (wanted,):
            raise UserError(
                f"{name} of {path} is {list(arrays[name].shape)}; the {extractor.name} has {wanted} of these"
            )
    network = arrays.get("network")
    if network is not None and str(network) != extractor.facts()["weights_sha256"]:
        raise UserError(f"{path} was measured by a network with other weights; measure its images again")
    return arrays


def _gaussian(stored: dict[str, Any], mean: str, covariance: str, path: Path) -> FeatureStatistics | None:
    """Statistics under two names, None where neither is there."""
    mu, sigma = stored.get(mean), stored.get(covariance)
    if mu is None and sigma is None:
        return None
    if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        shapes = [None if a is None else list(a.shape) for a in (mu, sigma)]
        raise UserError(f"{mean} and {covariance} of {path} are {shapes[0]} and {shapes[1]}; expected [D] and [D, D]")
    if any(a.dtype.kind not in "fiu" or not np.isfinite(a).all() for a in (mu, sigma)):
        raise UserError(f"{mean} and {covariance} of {path} are not all finite numbers; copy it again")
    check_covariance(sigma, f"{covariance} of {path}")
    return FeatureStatistics(
        torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)), _count(stored, path)
    )


def check_covariance(sigma_DD: np.ndarray[Any, Any], name: str) -> None:
    """Raise UserError unless a matrix can be a covariance: symmetric, without negative eigenvalues, not all zeros."""
    sigma = torch.from_numpy(sigma_DD.astype(np.float64))
    largest = float(sigma.abs().max())
    if not largest:
        raise UserError(f"{name} is all zeros: all images of that reference would be alike; measure images instead")
    if float((sigma - sigma.T).abs().max()) > ROUNDING * largest:
        raise UserError(f"{name} is not symmetric, so it is no covariance; write the whole matrix, not one triangle")
    values = torch.linalg.eigvalsh(sigma)
    if float(values[0]) < -ROUNDING * max(1.0, len(values) ** 0.5) * float(values.abs().max()):
        raise UserError(f"{name} has the negative eigenvalue {float(values[0]):.3g}, so it is no covariance")


def _count(stored: dict[str, Any], path: Path) -> int | None:
    """How many images a file says are behind its statistics."""
    count = stored.get("count")
    if count is None:
        return None
    if count.shape != () or count.dtype.kind not in "iu" or int(count) < 2:
        raise UserError(f"count of {path} is {count.dtype} {count.tolist()}; it is one number of images, at least 2")
    return int(count)


def check_saved(path: Path) -> None:
    """The rule for a file of :func:`save_reference`: absent, or one of these; never images, nor others' statistics."""
    check_npz(path, STORED, "a reference of --save-reference")
    if path.exists() and path.stat().st_size:
        with reading_npz(path) as archive:
            if "network" not in keys(archive):
                raise UserError(f"{path} exists and is no reference of --save-reference; choose another name")


def save_reference(path: Path, reference: Reference, extractor: FeatureExtractor) -> None:
    """Write the statistics as an .npz, so that images are measured once: ``mu`` and ``sigma``, ``mu_s`` and ``sigma_s``
    where they are known, the ``count`` of images, and as ``network`` the SHA-256 of the weights behind them. Atomic.
    """
    arrays: dict[str, Any] = {"network": extractor.facts()["weights_sha256"]}
    arrays |= {"mu": reference.pool.mean.numpy(), "sigma": reference.pool.covariance.numpy()}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean.numpy(), "sigma_s": reference.spatial.covariance.numpy()}
    if reference.pool.count is not None:
        arrays["count"] = reference.pool.count
    with replacing(path) as file:
        np.savez(file, **arrays)
