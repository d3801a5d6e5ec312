"""The networks whose features are compared: Inception from a file the user names, and the bundled digits classifier.

Axes: B images, D features, S spatial features, K classes.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..digits.classifier import FEATURES, FILE, extract, load_classifier
from ..digits.data import IMAGE_SIZE, NUM_CLASSES
from ..errors import UserError
from ..files import file_sha256
from ..models.checkpoints import read_tensors, shortened
from ..models.zoo import BUNDLED
from ..tensors import check_finite
from .names import INCEPTION_FILE
from .statistics import FeatureStatistics, RunningStatistics

INCEPTION_ORIGIN = "github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7  # TensorFlow's mixed_6/conv
_declared: list[torch.library.Library] = []  # what is declared lives as long as this


class Features(NamedTuple):
    """What a network makes of images.

    pool: float32 [B, D]; spatial: float32 [B, S] or None; logits: float32 [B, K].
    """

    pool: Tensor
    spatial: Tensor | None
    logits: Tensor


class FeatureExtractor(Protocol):
    """A network that turns uint8 images [B, 3, H, W] into :class:`Features`, all on ``device``.

    Attributes:
        name: of the network, for people.
        distance: what people call the Frechet distance of its features: FID or FD.
        num_features, num_spatial, num_classes: D, S (0 if there are none) and K.
        names_labels: whether its classes are the samples' labels, so that an accuracy can be had.
        side: height and width of its images; None where it takes any.
        device: where it runs.
    """

    name: str
    distance: str
    num_features: int
    num_spatial: int
    num_classes: int
    names_labels: bool
    side: int | None
    device: torch.device

    def facts(self) -> dict[str, Any]:
        """JSON-able: which network, the SHA-256 of its file, how it prepares images."""

    def __call__(self, images_B3HW: Tensor) -> Features: ...


class Inception:
    """InceptionV3 of 2015-12-05 as FID knows it: pool_3 [B, 2048], the first 7 channels of mixed_6's first branch
    [B, 17 * 17 * 7] in the order (h, w, c), and the logits [B, 1008] without their bias, as OpenAI's ADM evaluator has
    them. Made by :func:`load_inception`.
    """

    name, distance = "InceptionV3", "FID"
    names_labels = False
    side: int | None = None
    num_features, num_spatial, num_classes = 2048, 17 * 17 * SPATIAL_CHANNELS, 1008

    def __init__(self, network: nn.Module, sha256: str, version: str) -> None:
        self.network, self.sha256, self.version = network, sha256, version
        self.device = next(network.parameters()).device
        self._spatial = torch.zeros(0)
        network.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _input: Any, h_BChw: Tensor) -> None:
        self._spatial = h_BChw[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def facts(self) -> dict[str, Any]:
        return {
            "network": f"{self.name} of 2015-12-05, torch-fidelity {self.version}",
            "distance": self.distance,
            "weights_sha256": self.sha256,
            "released_weights": self.sha256.startswith(Path(INCEPTION_FILE).stem.rpartition("-")[2]),
            "features": self.num_features,
            "preprocessing": "bilinear to 299x299 as TensorFlow 1 does, then (x - 128) / 128",
        }

    @torch.inference_mode()
    def __call__(self, images_B3HW: Tensor) -> Features:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pool, logits = self.network(images_B3HW.to(self.device))
        return Features(pool, self._spatial, logits)


def load_inception(weights: Path, device: torch.device | str = "cpu") -> Inception:
    """Inception with the weights of ``weights-inception-2015-12-05-6726825d.pth``, a file that the user brings.

    Raises UserError when torch-fidelity is not installed, and when the file is missing, damaged or of another network.
    """
    fidelity = import_fidelity()
    stream = io.BytesIO()
    tensors = read_tensors(weights)
    check_finite(tensors, weights)
    torch.save(tensors, stream)  # torch-fidelity's own loader would run code from the file
    stream.seek(0)
    try:
        network = fidelity.FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=stream
        )
    except RuntimeError as error:
        differences = shortened([line.strip()[:160] for line in str(error).splitlines()[1:]])
        raise UserError(
            f"{weights} is not FID's InceptionV3; bring {INCEPTION_FILE} from {INCEPTION_ORIGIN}:\n  "
            + "\n  ".join(differences)
        ) from error
    return Inception(network.to(device), file_sha256(weights), fidelity.__version__)


def import_fidelity() -> Any:
    """The module ``torch_fidelity``; UserError where it is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None or importlib.util.find_spec("torchvision") is None:
        raise UserError("FID's Inception comes with torch-fidelity, not installed: pip install 'ddfast[eval]'")
    declare_torchvision_operators()
    return importlib.import_module("torch_fidelity")


def declare_torchvision_operators() -> None:
    """Let torchvision be imported where its compiled operators, which FID does not need, cannot be loaded: PyPI's build
    of it, made for CUDA, beside a CPU build of torch. Its import asks for the declaration of two of them."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(library)
    except OSError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(declared)


class DigitsFeatures:
    """The bundled digits classifier in Inception's place: its 64 features and 10 logits of gray images. Made by
    :func:`load_digits_features`; ``reference`` are the real data's statistics."""

    name, distance = "digits classifier", "FD"
    names_labels = True
    side: int | None = IMAGE_SIZE
    num_features, num_spatial, num_classes = FEATURES, 0, NUM_CLASSES
    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        self.model, self.reference = load_classifier(path)
        self.sha256 = file_sha256(path)

    def facts(self) -> dict[str, Any]:
        return {
            "network": self.name,
            "distance": self.distance,
            "weights_sha256": self.sha256,
            "features": self.num_features,
            "preprocessing": "mean over colours, 0 to 1",
        }

    def __call__(self, images_B3HW: Tensor) -> Features:
        pool, logits = extract(self.model, images_B3HW.float().mean(1, keepdim=True) / 255)
        return Features(pool, None, logits)


def load_digits_features(path: Path = BUNDLED / FILE) -> DigitsFeatures:
    """The digits classifier of ``path``; UserError for another file."""
    return DigitsFeatures(path)


@dataclass(frozen=True)
class Measured:
    """Features of a set of images.

    Attributes:
        pool, spatial: statistics of all images; ``spatial`` is None where the network has none.
        features: float32 [n, D] on the CPU, of every ``stride``-th image.
        logits: float32 [n, K] likewise.
    """

    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    features: Tensor
    logits: Tensor


def measure(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    stride: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Run ``extractor`` over batches of uint8 images [B, 3, H, W]; ``advance`` is told how many are done."""
    pool, spatial, done = RunningStatistics(), RunningStatistics(), 0
    features: list[Tensor] = []
    logits: list[Tensor] = []
    for images in batches:
        out = extractor(images)
        pool.add(out.pool)
        if out.spatial is not None:
            spatial.add(out.spatial)
        kept = slice(-done % stride, None, stride)
        features.append(out.pool[kept].cpu())
        logits.append(out.logits[kept].cpu())
        done += len(images)
        advance(done)
    return Measured(pool.result(), spatial.result() if spatial.count else None, torch.cat(features), torch.cat(logits))
