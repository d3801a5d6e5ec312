"""Exported folders: what their graphs compute, what they say of themselves, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import student_part
from torch import Tensor

from ddfast import ops
from ddfast.errors import UserError, WorkError
from ddfast.export import build
from ddfast.export.build import Job, export_student, open_engine
from ddfast.export.engine import Engine
from ddfast.export.int8 import quantize
from ddfast.export.manifest import Batch, Manifest, read_manifest
from ddfast.export.onnx import OnnxStage
from ddfast.export.parity import psnr
from ddfast.models import Distilled, load_student, load_teacher
from ddfast.records import signed
from ddfast.sampling import few_step

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

BATCH = Batch(1, 4, 8)  # the same wherever it does not matter, so that a student is traced only once


def quiet(job: Job, **changes: Any) -> Job:
    return replace(job, progress=lambda what: None, **changes)


@pytest.fixture(scope="module")
def model(student_file: Path) -> Distilled:
    return load_student(student_file)


@pytest.fixture(scope="module")
def raster(raster_student_file: Path) -> Distilled:
    return load_student(raster_student_file)


@pytest.fixture(scope="module")
def folder(model: Distilled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` as ONNX: float32, one step, any batch up to 8."""
    out = tmp_path_factory.mktemp("exported") / "engine"
    export_student(quiet(Job(model, "onnx", "fp32", (0,), BATCH)), out)
    return out


@pytest.fixture
def engine(folder: Path) -> Engine:
    return open_engine(folder)


def expected(model: Distilled, num: int, timesteps: tuple[int, ...] = (0,), seed: int = 1) -> Tensor:
    """Images [num, 3, H, W] by torch: samples 0.. of ``seed``, classes in turn."""
    student = model.student
    noise = ops.normal_noise(seed, torch.arange(num), 0, student.num_tokens, student.channels)
    labels = torch.arange(num) % student.num_classes
    return model.images(few_step(student, labels, noise, model.codebook, timesteps, model.split))


def drawn(engine: Engine, num: int, seed: int = 1) -> Tensor:
    labels = torch.arange(num) % engine.manifest.shapes.num_classes
    return torch.cat([part["image"] for part in engine.draw(labels, seed, torch.arange(num))])


def test_the_graph_is_class_and_noise_to_pixels(folder: Path, model: Distilled) -> None:
    """By onnxruntime alone, as a user without ddfast has it."""
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    student, side = model.student, model.tokenizer.image_size
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    assert inputs == {
        "label": ("tensor(int64)", ["batch"]),
        "noise": ("tensor(float)", ["batch", student.num_tokens, student.channels]),
    }
    assert b".py" not in (folder / "model.onnx").read_bytes()  # nor a stack trace of where it was exported
    (output,) = session.get_outputs()
    assert (output.name, output.type, output.shape) == ("image", "tensor(float)", ["batch", 3, side, side])
    noise = ops.normal_noise(1, torch.arange(5), 0, student.num_tokens, student.channels)
    (image,) = session.run(None, {"label": np.arange(5), "noise": noise.numpy()})
    torch.testing.assert_close(torch.from_numpy(image), expected(model, 5), rtol=0, atol=2e-5)


def test_any_number_of_images_is_the_same_images(engine: Engine, model: Distilled) -> None:
    want = expected(model, 19, seed=7)
    for num in (1, 8, 19):
        torch.testing.assert_close(drawn(engine, num, seed=7), want[:num], rtol=0, atol=2e-5)


def test_the_manifest_says_what_was_found(folder: Path, model: Distilled) -> None:
    manifest = read_manifest(folder)
    assert manifest.student["sha256"] == model.sha256 and manifest.student["tokenizer"] == model.tokenizer_sha256
    assert manifest.parity["token_agreement"] == manifest.parity["images_alike"] == 1
    assert manifest.parity["image_error"] <= 2e-5 and manifest.parity["decoder_psnr"] > 90
    assert set(manifest.files) == {"model.onnx"} == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert manifest.built["opset"] == 20 and manifest.built["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("var", {"layerwise": False}),
        ("var", {"shared_aln": True}),
        ("var", {"attn_l2_norm": False}),
        ("llamagen", {"n_kv_head": 1}),
    ],
)
def test_every_kind_of_student_is_traced(family: str, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """In both steps of two, for any batch."""
    file = request.getfixturevalue("pyramid_student_file" if family == "var" else "raster_student_file")
    student: Any = student_part(family, **changes).build(torch.float32, "cpu")
    other = replace(load_student(file), student=student)
    job = Job(other, "onnx", "fp32", (0, 2))
    module, feeds, _ = job.traced("trunk", torch.float32)
    shapes = job.dynamic_shapes("trunk", feeds)
    program = torch.export.export(module, tuple(feeds.values()), dynamic_shapes=shapes)
    noise = ops.normal_noise(1, torch.arange(5), 0, student.num_tokens, student.channels)
    labels = torch.arange(5) % student.num_classes
    want = few_step(student, labels, noise, other.codebook, (0, 2), other.split)
    torch.testing.assert_close(program.module()(labels, noise), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # the first of one step in float32 is exported in other tests, a tiny one in float16 too
@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_digits_students_lose_no_token_in_float32_and_few_in_float16(name: str, tmp_path: Path) -> None:
    teacher = load_teacher(name)
    student = teacher.new_student(torch.Generator().manual_seed(0)).requires_grad_(False).eval()
    timesteps = (0, len(teacher.groups) // 2)
    model = Distilled(name, student, teacher.tokenizer, name, timesteps, len(teacher.groups), "", "")
    full = export_student(quiet(Job(model, "onnx", "fp32", timesteps)), tmp_path / "32", num=64)
    assert full.parity["token_agreement"] == 1 and full.parity["image_error"] <= 2e-5
    half = export_student(quiet(Job(model, "onnx", "fp16", (0,))), tmp_path / "16", 0.995, num=64)
    assert half.parity["token_agreement"] >= 0.995 and 40 < half.parity["decoder_psnr"] < full.parity["decoder_psnr"]
    weights = [facts["bytes"] for m in (full, half) for facts in m.files.values()]
    assert weights[1] < 0.6 * weights[0]


@pytest.mark.parametrize("teacher", ["var", pytest.param("llamagen", marks=pytest.mark.slow)], indirect=True)
def test_two_steps_a_pair_and_a_fixed_batch(model: Distilled, tmp_path: Path) -> None:
    job = Job(model, "onnx", "fp32", (0, 2), Batch(3, 3, 3), layout="pair", single_file=0)
    manifest = export_student(quiet(job), tmp_path / "pair")
    assert list(manifest.stages) == ["trunk", "decoder"]
    assert set(manifest.files) == {f"{stage}.onnx{end}" for stage in manifest.stages for end in ("", ".data")}
    engine = open_engine(tmp_path / "pair")
    torch.testing.assert_close(drawn(engine, 7), expected(model, 7, (0, 2)), rtol=0, atol=2e-5)
    sizes = {
        onnx.load(tmp_path / "pair" / f).graph.input[0].type.tensor_type.shape.dim[0].dim_value
        for f in manifest.stages.values()
    }
    assert sizes == {3}


def test_a_large_whole_graph_has_its_weights_beside_it(raster: Distilled, tmp_path: Path) -> None:
    export_student(quiet(Job(raster, "onnx", "fp32", (0,), BATCH, single_file=0)), tmp_path / "large")
    onnx.checker.check_model(str(tmp_path / "large" / "model.onnx"))
    assert (tmp_path / "large" / "model.onnx.data").stat().st_size > 1000
    torch.testing.assert_close(drawn(open_engine(tmp_path / "large"), 4), expected(raster, 4), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("teacher", "layout"),
    [
        ("var", "pair"),  # as in test_export_openvino.py
        pytest.param("var", "whole", marks=pytest.mark.slow),
        pytest.param("llamagen", "whole", marks=pytest.mark.slow),
    ],
    indirect=["teacher"],
)
def test_noise_made_in_the_graph_is_the_noise_of_everywhere_else(model: Distilled, layout: str, tmp_path: Path) -> None:
    job = Job(model, "onnx", "fp32", (0,), seeded=True, layout=layout)
    manifest = export_student(quiet(job), tmp_path / "seeded")
    engine = open_engine(tmp_path / "seeded")
    assert manifest.inputs == tuple(engine.first.inputs) == ("label", "seed", "sample")  # type: ignore[attr-defined]
    torch.testing.assert_close(drawn(engine, 5, 2**40 + 3), expected(model, 5, seed=2**40 + 3), rtol=0, atol=5e-5)


def test_int8_weights_are_smaller_and_their_loss_is_measured(raster: Distilled, tmp_path: Path) -> None:
    manifest = export_student(quiet(Job(raster, "onnx", "int8", (0,), BATCH)), tmp_path / "int8", 0)
    graph = onnx.load(tmp_path / "int8" / "model.onnx").graph
    undone = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    small = {value.name: value for value in graph.initializer if value.data_type == onnx.TensorProto.INT8}
    assert {node.input[0] for node in undone} == set(small) and len(small) >= 4
    assert not {name.removesuffix(".int8") for name in small} & {value.name for value in graph.initializer}
    numbers = sum(math.prod(value.dims) for value in graph.initializer)
    assert manifest.files["model.onnx"]["bytes"] < 0.6 * 4 * numbers
    assert 0 < manifest.parity["token_agreement"] <= 1 and 25 < manifest.parity["decoder_psnr"] < 80


def test_int8_is_within_half_a_step_of_every_weight() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 4, 3, 3)).astype(np.float32)
    weight[2] = 0
    for axis in (0, 1):
        whole, scale = quantize(weight, axis)
        steps = scale.reshape([-1 if i == axis else 1 for i in range(4)])
        assert whole.dtype == np.int8 and (np.abs(whole * steps - weight) <= steps * 0.5001).all()


def test_too_few_equal_tokens_leave_nothing_behind(
    raster: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*arguments: Any) -> dict[str, Any]:
        return {"token_agreement": 0.98, "decoder_psnr": 50.0}

    monkeypatch.setattr(build, "measure", other)
    with pytest.raises(WorkError, match=r"only 98.00% of the exported tokens are torch's, below --min-agreement 0.999"):
        export_student(quiet(Job(raster, "onnx", "fp32", (0,), BATCH)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_not_finite_is_no_export(
    raster: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxStage.__call__

    def overflowing(stage: OnnxStage, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        found = run(stage, feeds)
        found["image"][-1, 0, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(OnnxStage, "__call__", overflowing)
    with pytest.raises(WorkError, match="exported image is not finite: too narrow a type; use --precision bf16"):
        export_student(quiet(Job(raster, "onnx", "fp32", (0,), BATCH)), tmp_path / "out", 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_overflow_is_no_export(raster: Distilled, tmp_path: Path) -> None:
    """fp16 exports that turn black: 70,000 is infinite in it."""
    broken = replace(raster, tokenizer=deepcopy(raster.tokenizer))
    quantizer: Any = broken.tokenizer
    with torch.no_grad():
        quantizer.decoder[0].weight.mul_(1e7)
    with pytest.raises(WorkError, match="exported image is not finite: too narrow a type; use --precision bf16"):
        export_student(quiet(Job(broken, "onnx", "fp16", (0,), BATCH)), tmp_path / "out", 0)
    assert not list(tmp_path.iterdir())


def change(**entries: Any) -> Callable[[Path], None]:
    """What a forger does: other entries, signed again."""

    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(signed(json.loads(path.read_text()) | entries)))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is no exported folder: it has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (change(kind="pairs"), "belongs to something else"),
        (change(format=9), "has format 9, this is for format 2"),
        (change(batch={"least": 3, "best": 2, "most": 1}), "batches 3,2,1 must rise"),
        (change(target="abacus"), "is for abacus, which this version does not know"),
        (lambda f: (f / "model.onnx").unlink(), "lacks model.onnx, which its manifest lists"),
        (lambda f: (f / "model.onnx").write_bytes(b"x" * 9), "is not the file that its manifest lists"),
    ],
)
def test_a_folder_that_is_not_as_it_says_is_refused(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert open_engine(copy).manifest == read_manifest(folder)
    damage(copy)
    with pytest.raises(UserError, match=message):
        open_engine(copy)


def test_one_changed_bit_is_noticed(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(UserError, match="is not the file"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "abacus"}, "no target is called 'abacus'; use onnx, tensorrt"),
        ({"precision": "fp8"}, "onnx has no precision fp8; use fp32, fp16, bf16, int8"),
        ({"layout": "trio"}, "onnx has no layout 'trio'; use whole or pair"),
        ({"timesteps": (1,)}, "must begin at 0 and rise"),
        ({"timesteps": (0, 99)}, "timestep 99 is no group"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    raster: Distilled, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export_student(quiet(Job(raster, "onnx", "fp32", (0,)), **changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_refused(folder: Path, model: Distilled) -> None:
    before = read_manifest(folder)
    with pytest.raises(UserError, match="is there already; remove it, or choose another --out"):
        export_student(quiet(Job(model, "onnx", "fp32", (0,))), folder)
    assert read_manifest(folder) == before


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if ``packages`` were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else found(name, *a))


def test_a_missing_package_names_its_extra(
    folder: Path, raster: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onnxruntime", "openvino", "onnxscript")
    with pytest.raises(UserError, match=r"onnxruntime is not installed: pip install 'ddfast\[export\]'"):
        open_engine(folder)
    for target in ("onnx", "openvino"):
        with pytest.raises(UserError, match=r"onnxscript.* is not installed: pip install 'ddfast\["):
            export_student(quiet(Job(raster, target, "fp32", (0,), layout="pair")), tmp_path / "out")


def test_a_graph_runs_in_openvino_where_that_is_what_is_there(
    folder: Path, model: Distilled, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    without(monkeypatch, "onnxruntime")
    engine = open_engine(folder)
    assert engine.runtime.startswith("OpenVINO") and engine.runtime.endswith("f32")
    torch.testing.assert_close(drawn(engine, 11), expected(model, 11), rtol=0, atol=2e-5)


def test_bfloat16_is_compared_by_what_runs_it(
    raster: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    graph = export_student(quiet(Job(raster, "onnx", "bf16", (0,), BATCH)), tmp_path / "bf16", 0.5)
    assert graph.built["opset"] == 22 and graph.parity["runtime"].startswith("OpenVINO")
    without(monkeypatch, "openvino")
    traced = export_student(quiet(Job(raster, "onnx", "bf16", (0,), BATCH)), tmp_path / "torch", 0.5)
    assert "in place of onnxruntime" in traced.parity["runtime"]
    with pytest.raises(UserError, match="onnxruntime has no bfloat16 on a CPU: pip install"):
        open_engine(tmp_path / "torch")


def test_bad_labels_and_seeds_are_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="label 5 is not a class of tiny-dd"):
        list(engine.draw(torch.tensor([0, 5]), 1, torch.arange(2)))
    with pytest.raises(UserError, match="seed is -1"):
        list(engine.draw(torch.tensor([0]), -1, torch.arange(1)))


def test_psnr_is_of_images_from_0_to_1() -> None:
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a) == float("inf") and psnr(a, a + 0.1) == pytest.approx(20)
    assert psnr(a, a + 1) == pytest.approx(0, abs=1e-6)


def test_every_target_is_a_module_that_says_what_it_needs() -> None:
    for target in build.TARGETS:
        module = build.target_module(target)
        assert module.PRECISIONS and set(module.PRECISIONS) <= set(build.MIN_AGREEMENT), target
        assert isinstance(module.PACKAGES, tuple) and isinstance(module.EXTRA, str | type(None))


def test_a_manifest_survives_being_written(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest) and manifest.batch == Batch(1, 4, 8) and not manifest.batch.fixed
    manifest.write(tmp_path)
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    assert read_manifest(tmp_path) == manifest
