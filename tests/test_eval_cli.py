"""``ddfast eval`` as its users meet it: what it says, writes and refuses."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import (
    by_samples,
    digit_images,
    fidelity,
    inception_file,
    needs_fidelity,
    pixels,
    save_npz,
    save_pictures,
    small_reference,
)
from PIL import Image

from ddfast.cli import eval as command
from ddfast.cli import main, read
from ddfast.errors import UserError

__all__ = ["inception_file", "small_reference"]  # fixtures


def ddfast_eval(*argv: str | Path) -> int:
    """Run the command as the parser hands it over."""
    args = read(["eval", *map(str, argv)])
    assert args is not None
    return command.run(args)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 200 real digits with their labels, and in a folder without."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = digit_images()
    save_npz(folder / "real.npz", images[:200], labels[:200])
    save_pictures(folder / "real", images[:200])
    return folder


def test_digits_are_measured_against_the_real_ones(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ddfast_eval(digits / "real.npz", "--digits", "--out", tmp_path / "eval") == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert result["samples"] == 200 and result["accuracy"] > 0.98 and result["recall"] > 0.2
    assert result["reference"]["path"] == "digits" and result["source"]["path"] == str(digits / "real.npz")
    assert f"{result['frechet_distance']:.3f}" in said and str(tmp_path / "eval") in said
    assert (tmp_path / "eval" / "eval.md").exists() and (tmp_path / "eval" / "samples.png").exists()
    assert ddfast_eval(digits / "real.npz", "--reference", "digits", "--out", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "eval.json").read_text()) == result


def test_two_folders_are_compared_and_a_folder_is_measured_once(digits: Path, tmp_path: Path) -> None:
    images, _ = digit_images()
    other = save_pictures(tmp_path / "other", images[200:])
    common = ["--digits", "--batch", "33"]
    saved = tmp_path / "other.npz"
    first = ["--reference", other, "--save-reference", saved, "--out", tmp_path / "a"]
    assert ddfast_eval(digits / "real", *common, *first) == 0
    assert ddfast_eval(digits / "real", *common, "--reference", saved, "--out", tmp_path / "b") == 0
    a, b = (json.loads((tmp_path / name / "eval.json").read_text()) for name in "ab")
    assert a["frechet_distance"] == b["frechet_distance"] > 0
    assert a["precision"] > 0.5 and b["precision"] is None and a["accuracy"] is None
    assert any("precision and recall are left out" in line for line in b["warnings"])


def test_a_folder_against_itself_is_at_zero(digits: Path, tmp_path: Path) -> None:
    folder = digits / "real"
    assert ddfast_eval(folder, "--reference", folder, "--digits", "--out", tmp_path) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["frechet_distance"] == pytest.approx(0.0, abs=1e-9)
    assert (result["precision"], result["recall"]) == (1.0, 1.0)


@pytest.mark.slow  # the network is compared with theirs in test_evaluation.py, and the rest is that of digits
@needs_fidelity
def test_inception_measures_two_sets_of_pictures(
    tmp_path: Path, inception_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = save_npz(tmp_path / "samples.npz", pixels(6, 24), torch.arange(6))
    reference = save_pictures(tmp_path / "reference", pixels(5, 24, seed=1) // 2)
    options = ["--reference", reference, "--inception", inception_file, "--out", tmp_path / "out"]
    assert ddfast_eval(samples, *options, "--device", "cpu", "--save-reference", tmp_path / "r.npz") == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    module = fidelity("feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3("theirs", ["2048"], str(inception_file))
    want = by_samples(*(network(x)[0].double() for x in (pixels(6, 24), pixels(5, 24, seed=1) // 2)))
    assert result["frechet_distance"] == pytest.approx(want, rel=1e-4) and want > 0
    assert result["spatial_frechet_distance"] > 0 and result["accuracy"] is None
    assert 0 <= result["precision"] <= 1 and 1 <= result["inception_score"] <= 6
    assert result["extractor"]["released_weights"] is False
    said = capsys.readouterr().out
    assert "sFID" in said and "not the released ones" in said and "FID of few images" in said
    with np.load(tmp_path / "r.npz") as saved:
        assert saved["sigma"].shape == (2048, 2048) and saved["mu_s"].shape == (2023,)


def test_what_cannot_work_is_refused_before_work(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "w.pth"
    weights.touch()
    (tmp_path / "file").touch()
    large = save_npz(tmp_path / "large.npz", pixels(4, 32))
    one = save_npz(tmp_path / "one.npz", pixels(1))
    real = digits / "real"

    def work(*args: object) -> None:
        raise AssertionError("work has begun")

    for name in ("load_inception", "load_digits_features", "load_reference", "evaluate"):
        monkeypatch.setattr(command, name, work)

    def refused(message: str, *argv: str | Path) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=message):
            ddfast_eval(*argv)
        assert sorted(tmp_path.iterdir()) == before

    refused("--batch is 0", real, "--digits", "--batch", "0")
    refused("needs --reference", real, "--inception", weights)
    refused("needs --inception weights-inception", large, "--reference", real)
    refused("gone does not exist", tmp_path / "gone", "--digits")
    refused("gone does not exist", real, "--digits", "--reference", tmp_path / "gone")
    refused("gone.pth does not exist", large, "--reference", real, "--inception", tmp_path / "gone.pth")
    refused("w.pth is neither a folder of pictures nor an .npz", real, "--digits", "--reference", weights)
    refused("goes with --digits", large, "--reference", "digits", "--inception", weights)
    refused("neither a folder of pictures nor an .npz", weights, "--digits")
    refused("16x16 pixels, which are digits: use --digits", real, "--reference", real, "--inception", weights)
    refused("32x32 pixels, digits have 16x16", large, "--digits")
    refused("one.npz has one image", one, "--digits")
    refused("must end in .npz", real, "--digits", "--save-reference", tmp_path / "r.pt")
    refused("file is not a folder", real, "--digits", "--save-reference", tmp_path / "file" / "r.npz")
    refused("file is not a folder", real, "--digits", "--out", tmp_path / "file" / "out")
    refused("real holds .* but no evaluation", real, "--digits", "--out", real)
    refused("--device tpu", real, "--digits", "--device", "tpu")
    with pytest.raises(SystemExit):
        ddfast_eval(real, "--digits", "--inception", weights)
    assert "not allowed with" in capsys.readouterr().err


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ddfast_eval("--help")
    shown = capsys.readouterr().out.replace("\\\n", " ")
    examples = [line.split("#")[0].split() for line in shown.splitlines() if line.strip().startswith("ddfast eval ")]
    assert len(examples) >= 5
    for words in examples:
        args = read(words[1:])
        assert args is not None
        command.check_options(existing(args))


def existing(args: argparse.Namespace) -> argparse.Namespace:
    """The same options with every file there."""
    args.reference = args.reference and str(Path(__file__).parent)
    args.inception = args.inception and Path(__file__)
    return args


def test_the_command_is_light_to_import() -> None:
    assert not imported_by("ddfast.cli.eval", ["sklearn", "matplotlib", "torch_fidelity", "torchvision"])


def imported_by(module: str, names: Sequence[str]) -> list[str]:
    import subprocess
    import sys

    code = f"import sys, {module}; print(*[n for n in {list(names)!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_pictures_of_256_pixels_stay_as_they_are(tmp_path: Path) -> None:
    """A lossless round trip of what is measured: PNG and .npz hold the same images."""
    images = pixels(2, 256)
    folder, npz = save_pictures(tmp_path / "a", images), save_npz(tmp_path / "a.npz", images)
    for path in (folder, npz):
        assert torch.equal(next(command.open_images(path).batches(2)), images)
    with Image.open(folder / "0.png") as image:
        assert image.size == (256, 256)


@pytest.mark.usefixtures("small_reference")
def test_a_model_is_measured_like_its_pictures(tmp_path: Path) -> None:
    """The same samples drawn for it, from a folder of ``ddfast sample`` and from an .npz of it."""
    how = ["--teacher", "digits-llamagen", "--skip", "2", "--num", "60", "--classes", "2,zero", "--seed", "5"]
    for out in ("folder", "samples.npz"):
        assert main(["sample", *how, "--out", str(tmp_path / out)]) == 0
    results = {}
    for name, source in {"model": how, "folder": [tmp_path / "folder"], "npz": [tmp_path / "samples.npz"]}.items():
        assert ddfast_eval(*source, "--digits", "--out", tmp_path / f"of-{name}") == 0
        results[name] = json.loads((tmp_path / f"of-{name}" / "eval.json").read_text())
    for key in ("samples", "frechet_distance", "precision", "accuracy", "class_mix"):
        assert results["model"][key] == results["folder"][key] == results["npz"][key]
    assert results["model"]["class_mix"]["counts"] == {"0": 30, "2": 30}
    source = results["model"]["source"]
    assert source == results["folder"]["source"]["sampling"]
    assert (source["way"], source["plan"], source["seed"]) == ("skip-2", ["teacher 0:14"], 5)
    assert source["teacher"]["guidance"] == 1.25 and len(source["teacher"]["sha256"]["transformer"]) == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("samples.npz --teacher digits-var --digits", "measures either images, a folder or an .npz, or a model"),
        ("--digits", "measures either images, a folder or an .npz, or a model"),
        ("--teacher digits-var", "needs --reference"),
        ("--teacher digits-var --digits --num 1", "digits-var has one image"),
        ("--teacher digits-var --inception w.pth --reference r", "does not exist"),
        ("--teacher digits-var --digits --steps 2", "--steps is a plan of a student"),
    ],
)
def test_models_that_cannot_be_measured_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ddfast_eval(*words.split())
