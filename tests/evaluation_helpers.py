"""Images, features and networks for the tests of evaluation."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ddfast.digits.classifier import reference_images
from ddfast.digits.data import load_digits
from ddfast.evaluation.features import DigitsFeatures, Features, import_fidelity, load_digits_features
from ddfast.evaluation.images import write_npz

needs_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="the torch-fidelity package is not installed"
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def pixels(count: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=seeded(seed), dtype=torch.uint8)


def save_pictures(folder: Path, images: Tensor, pattern: str = "{}.png") -> Path:
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / pattern.format(i))
    return folder


def save_npz(path: Path, images: Tensor, labels: Tensor | None = None) -> Path:
    write_npz(path, len(images), images.shape[-1], images.split(7), labels)
    return path


@cache
def digits_features() -> DigitsFeatures:
    return load_digits_features()


@cache
def digit_images() -> tuple[Tensor, Tensor]:
    """The first 300 real digits as pictures uint8 [300, 3, 16, 16], and their labels."""
    images, labels = reference_images(load_digits()[0])
    return (images[:300] * 255).round().byte().expand(-1, 3, -1, -1), labels[:300]


@pytest.fixture
def small_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the digits only 1,000 pictures count for precision and recall: distances between all 10,000 take seconds."""
    monkeypatch.setattr(
        "ddfast.evaluation.reference.reference_images", lambda given: (reference_images(given)[0][:1000],)
    )


def by_samples(x_ND: Tensor, y_MD: Tensor) -> float:
    """The same from the features themselves, without any D x D matrix: exact for fewer samples than features.

    tr((S_x S_y)^(1/2)) is the sum of the singular values of X Y^T, X and Y centred and divided by sqrt(N - 1).
    """
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (x_ND, y_MD))
    trace = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return float((x_ND.mean(0) - y_MD.mean(0)).square().sum() + trace)


def fidelity(module: str) -> Any:
    import_fidelity()
    return importlib.import_module(f"torch_fidelity.{module}")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception with random weights that keep the size of activations, its file read without a download."""
    module = fidelity("feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return path


class Flat:
    """A network whose features are simple: means of colours, and the first pixels as spatial ones."""

    name, distance, num_features, num_spatial, num_classes = "flat", "FID", 3, 4, 3
    names_labels = False
    side: int | None = None
    device = torch.device("cpu")

    def facts(self) -> dict[str, Any]:
        return {"network": self.name, "distance": self.distance, "weights_sha256": "f" * 64}

    def __call__(self, images_B3HW: Tensor) -> Features:
        pool = images_B3HW.float().mean((2, 3))
        return Features(pool, images_B3HW[:, 0, 0, :4].float(), pool)
