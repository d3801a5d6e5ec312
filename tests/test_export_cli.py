"""``ddfast export``, ``run`` and ``bench``, and ``eval`` of an exported folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import small_reference
from PIL import Image

from ddfast.cli import main, read
from ddfast.export.manifest import Batch, read_manifest
from ddfast.files import file_sha256
from ddfast.models import load_student, load_teacher, save_student
from ddfast.models.checkpoints import load_bundle, make_part
from ddfast.models.zoo import BUNDLED
from ddfast.sampling import Sampler, few_step_plan

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

__all__ = ["small_reference"]  # a fixture


@pytest.fixture(scope="module")
def folder(raster_student_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a tiny student as ONNX."""
    out = tmp_path_factory.mktemp("exported") / "engine"
    words = ["export", "--student", str(raster_student_file), "--to", "onnx", "--steps", "2", "--batches", "1,4,8"]
    assert main([*words, "--parity-images", "4", "--out", str(out)]) == 0
    return out


def test_options_reach_the_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.timesteps == (0, 2) and manifest.batch == Batch(1, 4, 8) and manifest.parity["num"] == 4
    assert manifest.precision == {"whole": "fp32"}


def test_a_script_for_another_machine_is_a_folder_too(raster_student_file: Path, tmp_path: Path) -> None:
    words = ["export", "--student", str(raster_student_file), "--to", "tensorrt", "--script", "--parity-images", "2"]
    words += ["--batches", "1,2,4"]  # as in test_export_tensorrt.py, where the same graph is traced
    assert main([*words, "--workspace", "2048", "--min-agreement", "0.9", "--out", str(tmp_path / "there")]) == 0
    assert "workspace:2048" in (tmp_path / "there" / "build.sh").read_text()
    assert main(["run", str(tmp_path / "there"), "--out", str(tmp_path / "x.png")]) == 2


def test_run_draws_what_sample_draws(
    folder: Path, raster_student_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(folder), "--classes", "3,1", "--num", "5", "--seed", "4"]
    assert main([*words, "--out", str(tmp_path / "x.npz")]) == 0
    assert "5 images, 2 steps" in (said := capsys.readouterr().out) and "by onnxruntime" in said
    data, model = np.load(tmp_path / "x.npz"), load_student(raster_student_file)
    assert data["arr_1"].tolist() == [3, 1, 3, 1, 3]
    sampler = Sampler(model)
    plan = few_step_plan((0, 2), len(model.student.groups))
    want = sampler.images(torch.tensor([3, 1, 3, 1, 3]), sampler.noise(4, torch.arange(5)), plan)
    assert np.abs(data["arr_0"].astype(int) - want.mul(255).permute(0, 2, 3, 1).numpy()).max() <= 0.51
    assert main([*words, "--out", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 5 * 64


def test_a_folder_of_run_is_gone_on_with(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(folder), "--out", str(tmp_path), "--batch", "3", "--num"]
    assert main([*words, "7"]) == 0 and main([*words, "9"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 9
    assert main([*words, "9", "--seed", "3"]) == 2
    assert "seed is 1, not 3" in capsys.readouterr().err


def test_bench_tells_latency_by_batch(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "latency.json"
    assert main(["bench", str(folder), "--batches", "1,4,64", "--seconds", "0", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["batch"] for row in record["rows"]] == [1, 4] and record["timesteps"] == [0, 2]
    for row in record["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["calls"] >= 3
    assert "64 images at once" in capsys.readouterr().err


@pytest.mark.usefixtures("small_reference")
def test_eval_measures_an_exported_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of the student that test_bench_export.py traces, too."""
    teacher = load_teacher("digits-var")
    student = teacher.new_student(torch.Generator().manual_seed(0))
    part = make_part(student.kind, student.settings, student.state_dict(), "test")
    tokenizer = load_bundle(BUNDLED / "digits-var.safetensors")[1]["tokenizer"]
    save_student(tmp_path / "s.safetensors", "s", part, tokenizer, (0,), len(teacher.groups) // 2, "digits-var")
    out = str(tmp_path / "engine")
    assert main(["export", "--student", str(tmp_path / "s.safetensors"), "--to", "onnx", "--out", out]) == 0
    assert main(["eval", out, "--digits", "--num", "50", "--out", str(tmp_path / "eval")]) == 0
    record = json.loads((tmp_path / "eval" / "eval.json").read_text())
    source, model = record["source"], Path(out) / "model.onnx"
    assert (source["target"], source["way"], source["files"][model.name]) == ("onnx", "1 step", file_sha256(model))
    assert record["samples"] == 50 and set(record["class_mix"]["counts"].values()) == {5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--to onnx --steps 3", "--steps is 3; tiny-dd was trained on the timesteps 0,2: use 1 to 2"),
        ("--to onnx --timesteps 2", "must begin at 0 and rise"),
        ("--to onnx --batches 8,4,1", "batches 8,4,1 must rise"),
        ("--to onnx --batches 1,2", "is neither a number of images nor three like 1,8,64"),
        ("--to onnx --precision fp8", "onnx has no precision fp8"),
        ("--to onnx --min-agreement 2", "--min-agreement is 2.0; it must lie in [0, 1]"),
        ("--to onnx --parity-images 0", "0 images cannot be compared"),
        ("--to onnx --device tpu", "--device tpu"),
        ("--to onnx --script", "--script is for --to tensorrt, not for onnx"),
        ("--to tensorrt --compute-capabilities 8.9", "--compute-capabilities is for --to tensorrt-rtx"),
        ("--to tensorrt-rtx --compute-capabilities 9.0", "TensorRT-RTX has no compute capability '9.0'"),
        ("--to tensorrt --script --workspace 0", "--workspace is 0 MiB"),
        ("--to triton-server --layout pair", "triton-server has no layout 'pair'; use whole"),
        ("--to openvino --layout whole", "openvino has no layout 'whole'; use pair"),
        ("--to aoti --precision fp16", "fp16 on a CPU is slower than fp32"),
    ],
)
def test_bad_options_of_export_are_refused(
    raster_student_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    out = tmp_path / "out"
    assert main(["export", "--student", str(raster_student_file), *options.split(), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run {folder} --classes 99 --out {tmp}/x.png", "99"),
        ("run {folder} --num 0 --out {tmp}/x.png", "--num is 0"),
        ("run {folder} --out {tmp}/x.txt", "must end in .png"),
        ("run {tmp} --out {tmp}/x.png", "is no exported folder"),
        ("run {folder} --seed -3 --out {tmp}/x.npz", "seed is -3"),
        ("bench {folder} --batches 9", "takes 1 to 8 images at once, not 9"),
        ("bench {folder} --batches one", "'one' is no list of numbers"),
        ("bench {folder} --seconds -1", "--seconds is -1.0"),
    ],
)
def test_bad_options_of_run_and_bench_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main(words.format(folder=folder, tmp=tmp_path).split()) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["export", "run", "bench", "sample", "eval", "train", "pairs", "report", "convert"])
def test_examples_of_help_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    examples = [shlex.split(line, comments=True) for line in lines if line.startswith(f"ddfast {command}")]
    assert examples, text
    for words in examples:
        assert read(words[1:]) is not None
