"""The digits teachers: their data, metrics and training, and the quality of the weights that ship."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddfast.cli import main
from ddfast.digits.classifier import (
    FILE,
    DigitsClassifier,
    extract,
    load_classifier,
    normalise_features,
    reference_images,
    reference_statistics,
)
from ddfast.digits.data import Batches, Digits, augment, enlarge, load_digits
from ddfast.digits.evaluate import Quality, measure_teacher
from ddfast.digits.loop import Ema, Schedule, fit
from ddfast.digits.metrics import accuracy, psnr
from ddfast.digits.tokenizer import quantize_with_loss, round_trip_psnr, scales_kept
from ddfast.digits.train import NAMES, classifier_accuracy, train_digits
from ddfast.errors import UserError
from ddfast.evaluation.statistics import FeatureStatistics, feature_statistics, frechet_distance
from ddfast.models import load_teacher
from ddfast.models.checkpoints import load_bundle
from ddfast.models.digits import DigitsTokenizer, DigitsTokenizerConfig
from ddfast.models.zoo import BUNDLED

TEACHERS = {"digits-var": 0.45, "digits-llamagen": 0.28}  # the largest Frechet distance allowed
CONFIGS = [DigitsTokenizerConfig(), DigitsTokenizerConfig(vocab_size=32, patch_nums=(4,), share_phi=0)]


def quiet(stage: str, step: int, steps: int, loss: float) -> None:
    pass


@cache
def digits() -> tuple[Digits, Digits]:
    return load_digits()


@cache
def shipped_classifier() -> tuple[DigitsClassifier, FeatureStatistics]:
    return load_classifier(BUNDLED / FILE)


@cache
def shipped_tokenizer(name: str) -> DigitsTokenizer:
    module = load_bundle(BUNDLED / f"{name}.safetensors")[1]["tokenizer"].build(torch.float32, "cpu")
    assert isinstance(module, DigitsTokenizer)
    return module


@cache
def quality(name: str) -> dict[str, Quality]:
    return measure_teacher(load_teacher(name), *shipped_classifier())


def tokenizer(config: DigitsTokenizerConfig) -> DigitsTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DigitsTokenizer(config).requires_grad_(False)


# --- data


def test_split_is_stratified_and_disjoint() -> None:
    train, test = digits()
    assert len(train) == 1437 and len(test) == 360
    shares = test.labels.bincount(minlength=10) / (test.labels.bincount() + train.labels.bincount())
    assert ((shares - 0.2).abs() < 0.01).all()
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_images_are_enlarged_in_place() -> None:
    _, test = digits()
    large = enlarge(test.images)
    assert large.shape == (360, 1, 16, 16) and 0 <= large.min() and large.max() <= 1
    small = torch.nn.functional.avg_pool2d(large, 2)
    error = (small - test.images).abs().mean()
    for moved in (test.images.roll(1, 2), test.images.roll(1, 3), test.images.flip(2), test.images.flip(3)):
        assert error < 0.4 * (small - moved).abs().mean()


def test_augmentation_moves_images_a_little() -> None:
    _, test = digits()
    still = augment(test.images, torch.Generator().manual_seed(0), strength=0.0)
    moved = augment(test.images, torch.Generator().manual_seed(0))
    assert torch.equal(still, enlarge(test.images))
    assert 0.02 < (moved - still).abs().mean() < 0.15


def test_batches_repeat_by_seed() -> None:
    train, _ = digits()
    a, b, c = (Batches(train, 8, seed).next()[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_absent_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'ddfast\[digits\]'"):
        load_digits()


# --- metrics


def random_statistics(seed: int, rank: int = 12) -> FeatureStatistics:
    x = torch.randn(200, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mix = torch.randn(rank, 12, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return feature_statistics(x @ mix + seed)


@pytest.mark.parametrize("rank", [12, 5])
def test_frechet_distance_equals_scipy(rank: int) -> None:
    a, b = random_statistics(0, rank), random_statistics(3)
    root = scipy.linalg.sqrtm((a.covariance + 1e-12 * torch.eye(12)).numpy() @ b.covariance.numpy())
    want = float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    a = random_statistics(0)
    moved = FeatureStatistics(a.mean + 2.0, a.covariance, a.count)
    assert frechet_distance(a, moved) == pytest.approx(12 * 4.0, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-7)


def test_statistics_of_one_row_are_refused() -> None:
    with pytest.raises(UserError, match="at least two rows"):
        feature_statistics(torch.zeros(1, 4))


def test_accuracy_and_psnr() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
    assert psnr(torch.full((2, 3), 0.6), torch.full((2, 3), 0.5)) == pytest.approx(20.0, abs=1e-4)


# --- training


def test_schedule_warms_up_and_ends_near_zero() -> None:
    schedule = Schedule(steps=100, lr=1.0, warmup=10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.95 and rates[-1] < 1e-3
    assert schedule.scaled(0.001).steps == 2


def test_fit_minimises_and_ema_averages() -> None:
    model = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    target = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
    ema, losses = Ema(model, 0.5), []

    def loss_at(_step: int) -> Tensor:
        return (model(x) - target).square().mean()

    schedule = Schedule(steps=200, lr=0.1, weight_decay=0.0)
    fit("line", model, schedule, loss_at, lambda *told: losses.append(told[3]), lambda _step: ema.update())
    assert losses[-1] < 1e-3 * losses[0]
    before = model.weight.clone()
    ema.copy_to_module()
    torch.testing.assert_close(model.weight, before, atol=0.05, rtol=0)


def test_ema_starts_at_the_first_value() -> None:
    model = torch.nn.Linear(2, 2)
    first = model.weight.detach().clone()
    ema = Ema(model, 0.9)
    ema.update()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update()
    ema.copy_to_module()
    torch.testing.assert_close(model.weight, first + 0.1 / 0.19)  # weights 0.09 and 0.1 of the two values


@pytest.mark.parametrize("config", CONFIGS, ids=["scales", "raster"])
def test_training_quantizes_as_the_tokenizer_does(config: DigitsTokenizerConfig) -> None:
    model = tokenizer(config)
    images = enlarge(digits()[1].images[:20])
    f = model.latents(images).requires_grad_()
    everything = torch.full((20,), len(config.patch_nums))
    f_st, loss, tokens, vectors = quantize_with_loss(model.quantizer, f, everything, 1.0)
    assert torch.equal(torch.cat(tokens, dim=1), model.encode(images))
    torch.testing.assert_close(f_st, model.quantizer.f_hat(torch.cat(tokens, dim=1)), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(f_st.sum(), f)
    assert torch.equal(gradient, torch.ones_like(f)) and loss > 0
    assert [v.shape[1] for v in vectors] == [pn * pn for pn in config.patch_nums]


def test_scale_dropout_decodes_the_coarser_scales_only() -> None:
    model = tokenizer(CONFIGS[0])
    kept = scales_kept(4, 0.5, 2000, torch.Generator().manual_seed(0))
    assert (kept.bincount(minlength=5) / 2000 - torch.tensor([0, 1, 1, 1, 3]) / 6).abs().max() < 0.05
    assert (scales_kept(1, 0.0, 50, torch.Generator()) == 1).all()
    f = model.latents(enlarge(digits()[1].images[:4]))
    f_st, _, tokens, _ = quantize_with_loss(model.quantizer, f, torch.tensor([1, 2, 3, 4]), 1.0)
    f_hat = model.quantizer.empty_f_hat(4)
    for scale, part in enumerate(tokens):
        f_hat, _ = model.quantizer.embed_step(scale, part, f_hat)
        torch.testing.assert_close(f_st[scale], f_hat[scale], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=["scales", "raster"])
def test_rescaling_latents_changes_no_token_and_no_image(config: DigitsTokenizerConfig) -> None:
    images = enlarge(digits()[1].images[:50])
    plain, scaled = tokenizer(config), tokenizer(config)
    scaled.rescale_latents(4.0)  # a power of two: exact
    tokens = plain.encode(images)
    assert torch.equal(scaled.encode(images), tokens) and tokens.unique().numel() > 4
    assert torch.equal(scaled.codebook, 4 * plain.codebook)
    torch.testing.assert_close(scaled.decode(tokens), plain.decode(tokens), atol=1e-6, rtol=0)


def test_normalised_features_have_unit_variance_and_the_same_logits() -> None:
    train, test = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitsClassifier()
    before = extract(model, enlarge(test.images))[1]
    normalise_features(model, train)
    torch.testing.assert_close(extract(model, enlarge(test.images))[1], before, atol=1e-5, rtol=1e-5)
    assert float(reference_statistics(model, train).covariance.diagonal().mean()) == pytest.approx(1.0, rel=1e-4)


def test_training_is_reproducible_and_files_load(tmp_path: Path) -> None:
    for folder in "ab":
        train_digits(tmp_path / folder, NAMES, 3, 0.001, quiet)
    train_digits(tmp_path / "c", ("digits-llamagen",), 4, 0.001, quiet)
    for file in (FILE, *(f"{name}.safetensors" for name in TEACHERS)):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    llamagen = "digits-llamagen.safetensors"
    assert (tmp_path / "a" / llamagen).read_bytes() != (tmp_path / "c" / llamagen).read_bytes()
    load_classifier(tmp_path / "a" / FILE)
    for name in TEACHERS:
        teacher = load_teacher(str(tmp_path / "a" / f"{name}.safetensors"))
        assert teacher.name == name and teacher.codebook.std() == pytest.approx(1.0, abs=1e-2)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([FILE, *(f"{n}.safetensors" for n in TEACHERS)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "seed is -1"),
        (["--steps-scale", "0"], "steps scale is 0.0"),
        (["--out", FILE], "not a folder"),
    ],
)
def test_bad_training_options_are_refused(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(FILE).touch()
    assert main(["digits", "train", "--out", "out", *options]) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


# --- what ships


def test_shipped_files_are_small() -> None:
    files = list(BUNDLED.glob("digits-*.safetensors"))
    assert len(files) == 3 and sum(f.stat().st_size for f in files) < 4.5e6


def test_shipped_classifier() -> None:
    train, test = digits()
    model, reference = shipped_classifier()
    assert classifier_accuracy(model, test) >= 0.99
    assert reference.count == 7 * len(train)
    images, labels = reference_images(train)
    features, logits = extract(model, images)
    assert accuracy(logits, labels) >= 0.99
    assert frechet_distance(feature_statistics(features), reference) < 1e-3
    assert float(reference.covariance.diagonal().mean()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", TEACHERS)
def test_shipped_tokenizer(name: str) -> None:
    model = shipped_tokenizer(name)
    assert round_trip_psnr(model, digits()[1]) >= 25.0
    assert model.codebook.std() == pytest.approx(1.0, abs=0.01)
    assert model.image_size == 16


@pytest.mark.slow  # fewer images of one teacher, compared with others of it, are judged in test_report_cli.py
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("way", ["teacher", "flow map"])
def test_shipped_teacher(name: str, way: str) -> None:
    got = quality(name)[way]
    assert got.accuracy >= 0.98
    assert got.fd <= TEACHERS[name]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def other_file(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("damage", "message"), [(flip_a_bit, "damaged"), (cut, "complete"), (other_file, "no digits classifier")]
)
def test_damaged_classifier_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes((BUNDLED / FILE).read_bytes())
    load_classifier(path)
    damage(path)
    with pytest.raises(UserError, match=message):
        load_classifier(path)
