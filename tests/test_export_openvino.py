from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddfast.errors import UserError
from ddfast.export.build import Job, check, export_student, open_engine
from ddfast.export.manifest import Batch, Manifest
from ddfast.export.openvino import AT_ONCE
from ddfast.models import Distilled, load_student
from ddfast.models.autoencoder import Upsample

ov = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def model(pyramid_student_file: Path) -> Distilled:
    return load_student(pyramid_student_file)


def exported(model: Distilled, out: Path, precision: str = "mixed", **changes: Any) -> Manifest:
    job = Job(model, "openvino", precision, (0,), layout="pair", progress=lambda stage: None, **changes)
    return export_student(job, out, min_agreement=0.9)


@pytest.fixture(scope="module")
def folders(model: Distilled, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student in every precision; ``mixed`` for batches of exactly 3, ``fp32`` with the noise made in the graph."""
    base = tmp_path_factory.mktemp("openvino")
    exported(model, base / "mixed", "mixed", batch=Batch(3, 3, 3))
    exported(model, base / "fp32", "fp32", seeded=True)
    exported(model, base / "bf16", "bf16")
    exported(model, base / "int8", "int8")
    return {path.name: path for path in base.iterdir()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def runs_bfloat16() -> bool:
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_a_folder_holds_a_graph_of_every_stage_and_nothing_of_the_way_there(folders: dict[str, Path]) -> None:
    for path in folders.values():
        names = {file.name for file in path.iterdir()}
        assert names == {"trunk.xml", "trunk.bin", "decoder.xml", "decoder.bin", "manifest.json"}


def test_weights_of_a_bfloat16_stage_take_half_the_room(folders: dict[str, Path]) -> None:
    def size(precision: str, stage: str) -> int:
        return (folders[precision] / f"{stage}.bin").stat().st_size

    assert min(size("mixed", "trunk"), size("fp32", "trunk")) > 1.5 * size("bf16", "trunk")
    assert size("mixed", "decoder") == size("bf16", "decoder") < 0.7 * size("fp32", "decoder")


def test_float32_is_torchs_result(folders: dict[str, Path]) -> None:
    """Of more images than a trunk takes at once, each with noise of its own."""
    parity = open_engine(folders["fp32"]).manifest.parity
    assert parity["num"] > AT_ONCE["trunk"]
    assert parity["token_agreement"] == 1
    assert parity["image_error"] < 2e-5


def test_a_mixed_folder_has_torchs_tokens_and_a_close_picture(folders: dict[str, Path]) -> None:
    manifest = open_engine(folders["mixed"]).manifest
    assert manifest.precision == {"trunk": "fp32", "decoder": "bf16"}
    assert manifest.parity["token_agreement"] == 1
    assert manifest.parity["decoder_psnr"] > 40


@pytest.mark.skipif(not runs_bfloat16(), reason="this CPU has no bfloat16")
def test_only_stages_that_shall_be_are_rounded(folders: dict[str, Path]) -> None:
    errors = {name: open_engine(path).manifest.parity for name, path in folders.items()}
    assert errors["mixed"]["embedding_error"] < 5e-5 < errors["bf16"]["embedding_error"]
    assert errors["fp32"]["decoder_error"] < 5e-5 < errors["mixed"]["decoder_error"]
    assert open_engine(folders["bf16"]).runtime.endswith("CPU, bf16")
    assert open_engine(folders["mixed"]).runtime.split(" and ")[1:] == [open_engine(folders["bf16"]).runtime]


@pytest.mark.skipif(not runs_bfloat16(), reason="this CPU has no bfloat16")
def test_int8_is_in_the_wide_layers_and_its_loss_is_measured(folders: dict[str, Path]) -> None:
    manifest = open_engine(folders["int8"]).manifest
    assert manifest.precision == {"trunk": "int8", "decoder": "int8"} and "int8" in manifest.parity["runtime"]
    core = ov.Core()
    trunk, decoder = (core.read_model(folders["int8"] / f"{stage}.xml") for stage in ("trunk", "decoder"))
    codes = [op for op in trunk.get_ops() if op.get_type_name() == "Constant" and op.get_element_type() == ov.Type.i8]
    assert len(codes) == manifest.built["int8_layers"]["trunk"] >= 8
    kinds = [op.get_type_name() for op in decoder.get_ops()]
    assert kinds.count("FakeQuantize") == 2 * manifest.built["int8_layers"]["decoder"]
    assert 0.9 <= manifest.parity["token_agreement"] < 1 and 25 < manifest.parity["decoder_psnr"] < 60


def test_int8_convolutions_stay_within_their_calibrated_ranges() -> None:
    """Of two wide convolutions, one narrow: the wide one is rounded, to half a step of its output's parts."""
    from openvino import opset13 as ops

    from ddfast.export.openvino_int8 import input_ranges, quantize_convolutions

    rng = np.random.default_rng(0)
    x = ops.parameter([-1, 64, 5, 5], np.float32, name="x")
    weights = [rng.normal(size=shape).astype(np.float32) / 24 for shape in ((64, 64, 3, 3), (3, 64, 1, 1))]
    wide = ops.convolution(x, ops.constant(weights[0]), [1, 1], [1, 1], [1, 1], [1, 1])
    narrow = ops.convolution(wide, ops.constant(weights[1]), [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([ops.result(narrow)], [x], "two")
    images = rng.normal(size=(3, 64, 5, 5)).astype(np.float32)
    run = ov.Core().compile_model(model.clone(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    want = run(images)[0]
    ranges = input_ranges(model, images)
    ((least, most),) = ranges.values()
    assert least == images.min() and most == images.max()
    assert quantize_convolutions(model, ranges) == 1
    got = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 1e-4 < error < 0.02


def test_images_do_not_depend_on_how_they_are_batched(folders: dict[str, Path]) -> None:
    """A trunk takes 8 at once and a decoder 1, whatever the folder's batch is."""
    engine, fixed = open_engine(folders["fp32"]), open_engine(folders["mixed"])
    labels, samples = torch.arange(11) % 5, torch.arange(11)
    whole = torch.cat([part["image"] for part in engine.draw(labels, 4, samples)])
    single = torch.cat(
        [part["image"] for i in samples for part in engine.draw(labels[i : i + 1], 4, samples[i : i + 1])]
    )
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-5)
    tokens = torch.cat([part["embeddings"] for part in engine.draw(labels, 4, samples)])
    in_threes = torch.cat([part["embeddings"] for part in fixed.draw(labels, 4, samples)])
    torch.testing.assert_close(in_threes, tokens, rtol=0, atol=1e-4)


def test_outputs_outlive_the_next_call(folders: dict[str, Path]) -> None:
    engine = open_engine(folders["fp32"])
    labels, samples = torch.tensor([1, 2]), torch.arange(2)
    first = engine.run(engine.feeds(labels, 0, samples))
    kept = first["image"].clone()
    engine.run(engine.feeds(labels, 1, samples))
    assert torch.equal(first["image"], kept)


def test_a_seed_that_openvino_would_round_is_refused(folders: dict[str, Path]) -> None:
    engine = open_engine(folders["fp32"])
    with pytest.raises(UserError, match=r"a seed of 16777216 is more .* numbers below 2\^24"):
        list(engine.draw(torch.tensor([1]), 1 << 24, torch.arange(1)))
    with pytest.raises(UserError, match="a sample of 16777217 is more"):
        list(engine.draw(torch.tensor([1]), 1, torch.tensor([(1 << 24) + 1])))
    assert list(engine.draw(torch.tensor([1]), (1 << 24) - 1, torch.arange(1)))


def test_it_takes_as_many_threads_as_torch(folders: dict[str, Path], one_thread: None) -> None:
    stage: Any = open_engine(folders["fp32"]).first
    assert stage.model.get_property("INFERENCE_NUM_THREADS") == 1


def test_what_cannot_be_exported_or_run_is_refused(model: Distilled, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no layout 'whole'; use pair"):
        check(Job(model, "openvino", "mixed", (0,)))
    with pytest.raises(UserError, match="no precision fp16; use mixed, fp32, bf16, int8"):
        check(Job(model, "openvino", "fp16", (0,), layout="pair"))
    with pytest.raises(UserError, match="runs on CPUs, not on cuda"):
        open_engine(folders["fp32"], "cuda")


class Block(nn.Module):
    """What is rewritten: an upsampling between normalised maps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.out = nn.GroupNorm(4, 12), Upsample(12), nn.Conv2d(12, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.up(F.silu(self.norm(x))))


def test_rewritten_graphs_compute_the_same(tmp_path: Path) -> None:
    from ddfast.export.rewrite import fold_upsampling, norm_by_channels

    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(2, 12, 5, 7) * 3 + 20  # means far from zero
    for parameter in block.norm.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        want = block(x)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.onnx.export(block, (x,), dynamo=True, opset_version=20, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(str(tmp_path / "block.onnx"))
    model = ov.Core().read_model(tmp_path / "block.onnx")
    assert fold_upsampling(model) == 1 and norm_by_channels(model) == 1
    kinds = {op.get_type_name() for op in model.get_ops()}
    assert "ConvolutionBackpropData" in kinds and not kinds & {"MVN", "Interpolate"}
    got = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-5)
