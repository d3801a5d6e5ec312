"""What samples are measured with: by hand, against scipy's formulas and against torch-fidelity's functions."""

from __future__ import annotations

import builtins
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from evaluation_helpers import (
    Flat,
    by_samples,
    digit_images,
    digits_features,
    fidelity,
    inception_file,
    needs_fidelity,
    noise,
    pixels,
    save_npz,
    save_pictures,
)
from PIL import Image
from torch import Tensor

from ddfast.digits.classifier import extract
from ddfast.errors import UserError
from ddfast.evaluation import reference as reference_module
from ddfast.evaluation.evaluate import class_mix, evaluate, first_pictures, markdown, print_result, write_result
from ddfast.evaluation.features import (
    Inception,
    load_inception,
    measure,
)
from ddfast.evaluation.images import open_images
from ddfast.evaluation.metrics import inception_score, precision_recall
from ddfast.evaluation.reference import DIGITS, Reference, load_reference, save_reference
from ddfast.evaluation.statistics import FeatureStatistics, RunningStatistics, feature_statistics, frechet_distance
from ddfast.files import file_sha256

__all__ = ["inception_file"]  # a fixture

# --- statistics


def by_sqrtm(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The formula as TTUR and the ADM evaluator have it."""
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    return float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()) - 2 * np.trace(root).real


def test_running_statistics_are_those_of_all_at_once() -> None:
    x = noise(500, 12) @ noise(12, 12, seed=1) + 1e4  # a mean far from zero
    running = RunningStatistics()
    for part in x.split(33):
        running.add(part)
    got = running.result()
    assert got.count == 500
    torch.testing.assert_close(got.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(got.covariance, torch.cov(x.T), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(feature_statistics(x).covariance, torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_statistics_of_one_image_are_refused() -> None:
    running = RunningStatistics()
    running.add(torch.zeros(1, 4))
    with pytest.raises(UserError, match="at least two images; there are 1"):
        running.result()


def test_frechet_distance_of_well_conditioned_gaussians_is_that_of_sqrtm() -> None:
    a, b = feature_statistics(noise(900, 64)), feature_statistics(noise(700, 64, seed=1) * 1.5 + 0.3)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-10)


def test_frechet_distance_of_one_dimension_is_the_difference_of_means_and_deviations() -> None:
    a, b = (
        FeatureStatistics(torch.tensor([m]).double(), torch.tensor([[s * s]]).double(), 9) for m, s in ((1, 2), (4, 7))
    )
    assert frechet_distance(a, b) == pytest.approx((1 - 4) ** 2 + (2 - 7) ** 2, rel=1e-14)


@pytest.mark.parametrize("count", [20, 63])
def test_frechet_distance_holds_for_fewer_samples_than_features(count: int) -> None:
    x, y = noise(count, 64), noise(count + 9, 64, seed=1) + 0.1
    a, b = feature_statistics(x), feature_statistics(y)
    assert frechet_distance(a, b) == pytest.approx(by_samples(x, y), rel=1e-11)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)


@needs_fidelity
@pytest.mark.parametrize(("count", "dim"), [(900, 64), (30, 64), (60, 512)])
def test_frechet_distance_is_that_of_torch_fidelity(count: int, dim: int) -> None:
    theirs = fidelity("metric_fid")
    x, y = noise(count, dim), noise(count + 9, dim, seed=1) * 1.2 + 0.2
    want = theirs.fid_statistics_to_metric(*(theirs.fid_features_to_statistics(f) for f in (x, y)), verbose=False)
    got = frechet_distance(feature_statistics(x), feature_statistics(y))
    assert got == pytest.approx(want["frechet_inception_distance"], rel=1e-9 if count > dim else 1e-5)
    assert got == pytest.approx(by_samples(x, y), rel=1e-11)


# --- Inception Score, precision and recall


def test_inception_score_of_certain_and_even_classes_is_their_number() -> None:
    certain = torch.eye(5).repeat(4, 1) * 2000  # probabilities below the smallest double are zero
    assert inception_score(certain) == pytest.approx(5.0, rel=1e-12)
    assert inception_score(torch.zeros(8, 5)) == pytest.approx(1.0, rel=1e-12)
    assert inception_score(certain[:1]) == 1.0


def test_inception_score_is_the_mean_over_parts() -> None:
    logits = torch.cat([torch.eye(4).repeat(2, 1) * 2000, torch.zeros(3, 4)])
    assert inception_score(logits, split=8) == pytest.approx((4.0 + 1.0) / 2, rel=1e-12)
    assert inception_score(logits, split=4) == pytest.approx((4.0 + 4.0 + 1.0) / 3, rel=1e-12)


def test_inception_score_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(0, 4\)"):
        inception_score(torch.zeros(0, 4))


@needs_fidelity
def test_inception_score_is_that_of_torch_fidelity() -> None:
    logits = noise(600, 100).float() * 4
    want = fidelity("metric_isc").isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, split=200) == pytest.approx(want, rel=1e-12)


def test_precision_and_recall_of_points_on_a_line() -> None:
    reference = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radii to the second neighbour: 3, 2, 3, 6
    samples = torch.tensor([[-3.5], [-3.0], [5.0], [13.5], [100.0]])  # radii: 8.5, 8, 8.5, 17, 95
    assert precision_recall(samples, reference, neighbours=2) == (2 / 5, 1.0)
    far = samples + 1000
    assert precision_recall(far, reference, neighbours=2) == (0.0, 0.0)
    assert precision_recall(reference, reference, neighbours=1) == (1.0, 1.0)


def test_a_radius_does_not_count_the_point_itself_but_counts_its_copies() -> None:
    reference = torch.tensor([[0.0], [0.0], [10.0], [11.0]])  # radii to the nearest: 0, 0, 1, 1
    samples = torch.tensor([[0.5], [9.5], [0.0], [50.0]])
    assert precision_recall(samples, reference, neighbours=1)[0] == 2 / 4


def test_precision_and_recall_do_not_depend_on_the_chunk() -> None:
    x, y = noise(150, 40).float(), noise(130, 40, seed=1).float() * 0.9
    whole = precision_recall(x, y)
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1 and whole[0] != whole[1]
    assert precision_recall(x, y, chunk=7) == whole
    assert precision_recall(x + 500, y + 500) == pytest.approx(whole, abs=0.02)


@needs_fidelity
@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_torch_fidelity(neighbours: int) -> None:
    x, y = noise(500, 60).float(), noise(400, 60, seed=1).float() * 0.9 + 0.1
    want = fidelity("metric_prc").calculate_precision_recall_full(x, y, neighbours)
    assert 0.01 < min(want) and max(want) < 0.99
    assert precision_recall(x, y, neighbours, chunk=64) == pytest.approx(want, abs=1e-6)


def test_precision_and_recall_of_too_few_are_refused() -> None:
    with pytest.raises(UserError, match="more than 3 images; samples: 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(UserError, match="more than 3 images; reference: 2"):
        precision_recall(torch.zeros(9, 2), torch.zeros(2, 2))


# --- networks


def test_the_digits_classifier_sees_the_mean_over_colours() -> None:
    images, labels = digit_images()
    extractor = digits_features()
    out = extractor(images)
    assert out.pool.shape == (300, extractor.num_features) and out.logits.shape == (300, extractor.num_classes)
    assert out.spatial is None and (out.logits.argmax(-1) == labels).double().mean() > 0.98
    pool, logits = extract(extractor.model, images[:, :1].float() / 255)
    torch.testing.assert_close(out.pool, pool, rtol=1e-4, atol=1e-4)
    coloured = images.float() * torch.tensor([1.5, 1.0, 0.5]).view(3, 1, 1) / 1.5
    mixed = extractor(coloured.byte())
    torch.testing.assert_close(mixed.logits, extractor((images.float() / 1.5).byte()).logits, rtol=0, atol=0.3)


def test_measuring_keeps_every_nth_feature_and_all_statistics() -> None:
    images, _ = digit_images()
    extractor, told = digits_features(), list[int]()
    got = measure(images.split(11), extractor, 4, told.append)
    want = extractor(images)
    torch.testing.assert_close(got.features, want.pool[::4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logits, want.logits[::4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pool.mean, want.pool.double().mean(0), rtol=1e-5, atol=1e-5)
    assert got.spatial is None and got.pool.count == 300 and told == [*range(11, 300, 11), 300]


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> Inception:
    return load_inception(inception_file)


@needs_fidelity
def test_inception_is_that_of_torch_fidelity(inception: Inception, inception_file: Path) -> None:
    module = fidelity("feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3("theirs", ["logits_unbiased", "2048"], str(inception_file))
    seen: list[Tensor] = []
    theirs.Mixed_6d.register_forward_hook(lambda _module, _input, out: seen.append(out))
    images = pixels(2, 40)
    logits, pool = theirs(images)
    got = inception(images)
    torch.testing.assert_close(got.pool, pool)
    torch.testing.assert_close(got.logits, logits)
    assert got.pool.shape == (2, inception.num_features) and got.logits.shape == (2, inception.num_classes)
    assert got.spatial is not None and got.spatial.shape == (2, inception.num_spatial) == (2, 2023)
    mixed = seen[0].numpy()  # [2, 768, 17, 17], its first channels those of the first branch
    want = np.stack([[mixed[i, c, h, w] for h in range(17) for w in range(17) for c in range(7)] for i in range(2)])
    torch.testing.assert_close(got.spatial, torch.from_numpy(want))
    assert got.spatial.std() > 1e-3 and (got.pool[0] - got.pool[1]).abs().max() > 1e-3


@needs_fidelity
def test_inception_says_which_file_it_is(inception: Inception, inception_file: Path) -> None:
    facts = json.loads(json.dumps(inception.facts()))
    assert facts["weights_sha256"] == file_sha256(inception_file)
    assert facts["released_weights"] is False and "torch-fidelity 0." in facts["network"]
    released = Inception(inception.network, "6726825d" + "0" * 56, "0.4.0")
    assert released.facts()["released_weights"] is True


@needs_fidelity
def test_files_of_other_networks_are_refused(tmp_path: Path, inception_file: Path) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(UserError, match="w.pth does not exist"):
        load_inception(path)
    torch.save({"features.0.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"(?s)w.pth is not FID's InceptionV3; bring weights-inception.*features.0"):
        load_inception(path)
    data = inception_file.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint"):
        load_inception(path)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (builtins.exec, ("raise SystemExit('code from the file has run')",))


@needs_fidelity
def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth holds more than weights: objects of exec, .* ddfast runs none"):
        load_inception(tmp_path / "w.pth")


def test_absent_torch_fidelity_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ddfast\[eval\]'"):
        load_inception(tmp_path / "w.pth")


# --- references


def expected(images: Tensor) -> tuple[FeatureStatistics, FeatureStatistics]:
    out = Flat()(images)
    assert out.spatial is not None
    return feature_statistics(out.pool), feature_statistics(out.spatial)


def close(got: FeatureStatistics | None, want: FeatureStatistics) -> None:
    assert got is not None
    torch.testing.assert_close((got.mean, got.covariance), (want.mean, want.covariance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_reference_of_images_is_measured(tmp_path: Path, kind: str) -> None:
    images, told = pixels(20), list[tuple[str, int, int]]()
    path = save_pictures(tmp_path / "a", images) if kind == "folder" else save_npz(tmp_path / "a.npz", images)
    reference = load_reference(path, Flat(), 8, lambda *done: told.append(done))
    pool, spatial = expected(images)
    close(reference.pool, pool)
    close(reference.spatial, spatial)
    assert reference.pool.count == 20 and reference.features is not None
    torch.testing.assert_close(reference.features, Flat()(images).pool)
    assert told == [("reference", 8, 20), ("reference", 16, 20), ("reference", 20, 20)]
    assert reference.facts["path"] == str(path) and ("sha256" in reference.facts) == (kind == "npz")


def test_a_reference_of_the_adm_evaluator_has_statistics_of_more_images_than_it_holds(tmp_path: Path) -> None:
    many, images, path = pixels(200, seed=5), pixels(20), tmp_path / "VIRTUAL.npz"
    pool, spatial = expected(many)
    np.savez(
        path,
        arr_0=images.permute(0, 2, 3, 1).numpy(),
        mu=pool.mean.float().numpy(),
        sigma=pool.covariance.numpy(),
        mu_s=spatial.mean.numpy(),
        sigma_s=spatial.covariance.numpy(),
    )
    reference = load_reference(path, Flat())
    close(reference.pool, FeatureStatistics(pool.mean.float().double(), pool.covariance, None))
    close(reference.spatial, spatial)
    assert reference.pool.count is None and reference.features is not None and len(reference.features) == 20


def test_a_reference_of_statistics_alone_has_no_precision(tmp_path: Path) -> None:
    pool, _ = expected(pixels(30))
    np.savez(tmp_path / "a.npz", mu=pool.mean.numpy(), sigma=pool.covariance.numpy())
    reference = load_reference(str(tmp_path / "a.npz"), Flat())
    close(reference.pool, pool)
    assert reference.spatial is None and reference.features is None
    assert reference.missing == f"{tmp_path / 'a.npz'} holds statistics without images"


def test_a_large_reference_keeps_some_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels(20)
    monkeypatch.setattr(reference_module, "MOST_FEATURES", 7)
    reference = load_reference(save_npz(tmp_path / "a.npz", images), Flat(), 6)
    close(reference.pool, expected(images)[0])
    assert reference.features is not None and reference.facts["features"] == 7
    torch.testing.assert_close(reference.features, Flat()(images).pool[::3])


def test_a_saved_reference_is_the_same(tmp_path: Path) -> None:
    reference = load_reference(save_pictures(tmp_path / "a", pixels(20)), Flat())
    save_reference(tmp_path / "new" / "a.npz", reference, Flat())
    again = load_reference(tmp_path / "new" / "a.npz", Flat())
    for got, want in ((again.pool, reference.pool), (again.spatial, reference.spatial)):
        assert got is not None and want is not None and got.count == want.count == 20
        assert torch.equal(got.mean, want.mean) and torch.equal(got.covariance, want.covariance)
    with np.load(tmp_path / "new" / "a.npz") as data:
        assert set(data) == {"mu", "sigma", "mu_s", "sigma_s", "count", "network"}
    other = Flat()
    other.facts = lambda: {"weights_sha256": "0" * 64}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="a.npz was measured by a network with other weights"):
        load_reference(tmp_path / "new" / "a.npz", other)


def test_references_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    mu, sigma = np.zeros(3), np.eye(3)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_reference(path, Flat())

    refused("a.npz does not exist")
    for arrays, message in (
        ({"x": mu}, "holds neither mu and sigma nor images"),
        ({"mu": np.zeros(2048), "sigma": sigma}, r"mu of .* is \[2048\]; the flat has 3"),
        (
            {"mu": mu, "sigma": sigma, "mu_s": np.zeros(2023), "sigma_s": sigma},
            r"mu_s of .* is \[2023\]; the flat has 4",
        ),
        ({"mu": mu}, r"mu and sigma of .* are \[3\] and None"),
        ({"mu": mu, "sigma": np.eye(4)}, r"are \[3\] and \[4, 4\]"),
        ({"mu": mu, "sigma": sigma, "mu_s": np.zeros(4)}, r"mu_s and sigma_s of .* are \[4\] and None"),
        ({"mu": mu, "sigma": np.full((3, 3), np.nan)}, "not all finite numbers"),
        ({"mu": mu.astype(bool), "sigma": sigma}, "not all finite numbers"),
        ({"mu": np.array([None] * 3), "sigma": sigma}, "cannot be read as an .npz"),
    ):
        np.savez(path, **arrays)
        refused(message)
    path.write_bytes(b"no zip")
    refused("cannot be read as an .npz")
    with pytest.raises(UserError, match="the reference digits is measured by the digits classifier, not by flat"):
        load_reference(DIGITS, Flat())
    with pytest.raises(UserError, match="are 32x32; the digits classifier takes 16 pixels"):
        load_reference(save_pictures(tmp_path / "large", pixels(4, 32)), digits_features())


def test_the_digits_reference_is_that_of_the_bundle() -> None:
    reference = load_reference(DIGITS, digits_features())
    assert reference.features is not None and len(reference.features) == reference.pool.count == 10059
    assert frechet_distance(feature_statistics(reference.features), reference.pool) < 1e-3


def test_the_digits_reference_without_scikit_learn_leaves_precision_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise UserError("the digits come with scikit-learn, not installed")

    monkeypatch.setattr(reference_module, "load_digits", absent)
    reference = load_reference(DIGITS, digits_features())
    assert reference.features is None and "scikit-learn" in reference.missing and reference.pool.count == 10059


# --- from images to figures


@pytest.fixture(scope="module")
def digits_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = digit_images()
    return save_npz(tmp_path_factory.mktemp("digits") / "real.npz", images, labels)


@pytest.fixture(scope="module")
def result(digits_npz: Path) -> dict[str, Any]:
    extractor = digits_features()
    return evaluate(open_images(digits_npz), load_reference(DIGITS, extractor), extractor)


def test_real_digits_are_near_the_real_digits(result: dict[str, Any]) -> None:
    assert result["samples"] == 300 and result["spatial_frechet_distance"] is None
    assert 0 < result["frechet_distance"] < 2.5 and result["accuracy"] > 0.98
    assert result["precision"] > 0.98 and 0.3 < result["recall"] <= 1 and 8 < result["inception_score"] <= 10
    mix = result["class_mix"]
    assert mix["classes"] == 10 and sum(mix["counts"].values()) == 300
    assert mix["fewest"] == min(mix["counts"].values()) and mix["most"] == max(mix["counts"].values())
    assert json.loads(json.dumps(result)) == result and result["warnings"] == []
    assert set(result["versions"]) == {"ddfast", "torch"}


def test_noise_is_far_from_the_real_digits(tmp_path: Path, result: dict[str, Any]) -> None:
    extractor = digits_features()
    source = open_images(save_npz(tmp_path / "a.npz", pixels(100), torch.arange(100) % 10))
    told: list[tuple[str, int, int]] = []
    got = evaluate(source, load_reference(DIGITS, extractor), extractor, 40, lambda *done: told.append(done))
    assert got["frechet_distance"] > 10 * result["frechet_distance"] and got["accuracy"] < 0.5
    assert got["precision"] < 0.1 and told == [("samples", 40, 100), ("samples", 80, 100), ("samples", 100, 100)]
    assert got["warnings"] == ["FD of few images is biased upwards: 100 samples, 64 features"]


def test_the_figures_are_those_of_the_functions(tmp_path: Path) -> None:
    x, y = pixels(30), pixels(40, seed=1) // 2
    reference = load_reference(save_npz(tmp_path / "y.npz", y), Flat())
    got = evaluate(open_images(save_pictures(tmp_path / "x", x)), reference, Flat(), 7)
    fx, fy = Flat()(x), Flat()(y)
    assert fx.spatial is not None and fy.spatial is not None
    assert got["frechet_distance"] == pytest.approx(by_sqrtm(feature_statistics(fx.pool), feature_statistics(fy.pool)))
    want = by_sqrtm(feature_statistics(fx.spatial), feature_statistics(fy.spatial))
    assert got["spatial_frechet_distance"] == pytest.approx(want)
    assert got["inception_score"] == pytest.approx(inception_score(fx.logits))
    assert (got["precision"], got["recall"]) == precision_recall(fx.pool, fy.pool)
    assert got["accuracy"] is None and got["class_mix"] is None


def test_labels_of_another_numbering_are_not_called_wrong(tmp_path: Path) -> None:
    source = open_images(save_npz(tmp_path / "a.npz", pixels(40), torch.arange(40) % 2))
    reference = load_reference(save_npz(tmp_path / "y.npz", pixels(40, seed=1)), Flat())
    got = evaluate(source, reference, Flat())
    assert got["accuracy"] is None and got["class_mix"]["counts"] == {"0": 20, "1": 20}


def test_what_lessens_the_figures_is_said(tmp_path: Path) -> None:
    few = open_images(save_npz(tmp_path / "a.npz", pixels(3, 32)))
    small = save_npz(tmp_path / "y.npz", pixels(4))
    got = evaluate(few, load_reference(small, Flat()), Flat())
    assert got["precision"] is None and got["recall"] is None
    assert got["warnings"] == [
        "FID of few images is biased upwards: 3 samples, 3 features",
        "FID of few images is biased upwards: 4 reference images, 3 features",
        "precision and recall are left out: they need more than 3 images of each side",
        "the samples are 32 pixels wide, the reference's images 16",
    ]
    statistics = Reference(*expected(pixels(30)), None, "no images", {})
    assert evaluate(few, statistics, Flat())["warnings"][1:] == ["precision and recall are left out: no images"]


def test_one_sample_is_refused(tmp_path: Path) -> None:
    statistics = Reference(*expected(pixels(30)), None, "no images", {})
    with pytest.raises(UserError, match="at least two samples"):
        evaluate(open_images(save_npz(tmp_path / "a.npz", pixels(1))), statistics, Flat())


def test_many_classes_are_counted_without_naming_them() -> None:
    mix = class_mix(torch.arange(1000).repeat(3)[:2500])
    assert mix == {"classes": 1000, "fewest": 2, "most": 3}


def test_a_result_becomes_a_page_and_a_table(tmp_path: Path, digits_npz: Path, result: dict[str, Any]) -> None:
    write_result(tmp_path / "new", result, *first_pictures(open_images(digits_npz)))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["eval.json", "eval.md", "samples.png"]
    assert json.loads((tmp_path / "new" / "eval.json").read_text()) == result
    with Image.open(tmp_path / "new" / "samples.png") as image:
        assert image.size == (10 * 68 + 4, 6 * 84 + 4)
    page = (tmp_path / "new" / "eval.md").read_text().splitlines()
    head, rule, row = (line.strip("|").split("|") for line in page[2:5])
    assert [cell.strip() for cell in head] == ["samples", "FD", "IS", "precision", "recall", "accuracy"]
    assert len(rule) == len(row) == 6 and float(row[1]) == pytest.approx(result["frechet_distance"], abs=5e-4)
    assert any("samples.png" in line for line in page) and any(str(digits_npz) in line for line in page)


def test_a_page_names_fid_where_inception_measured(tmp_path: Path) -> None:
    reference = load_reference(save_npz(tmp_path / "y.npz", pixels(40, seed=1)), Flat())
    got = evaluate(open_images(save_npz(tmp_path / "a.npz", pixels(3))), reference, Flat())
    page = markdown(got)
    assert "| samples | FID | sFID | IS |" in page and "> FID of few images" in page


def test_a_printed_table_holds_the_figures(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result | {"warnings": ["a [note] of many words"]})
    out = capsys.readouterr().out
    assert "FD" in out and f"{result['frechet_distance']:.3f}" in out and "note: a [note] of many words" in out
