"""Exported students on a GPU: onnxruntime and TensorRT against torch, CUDA graphs, streams; and what make gpu times."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gpu_export
import pytest
import torch
from engine_helpers import needs_gpu
from gpu_cases import Ceilings
from torch import Tensor

from ddfast.errors import UserError
from ddfast.export.bench import Latency
from ddfast.export.build import Job, check, export_student, open_engine
from ddfast.export.engine import Engine
from ddfast.export.manifest import Batch
from ddfast.models import load_student

CUDA = torch.device("cuda", 0)
LEAST = {"fp32": 0.99, "fp16": 0.9, "bf16": 0.7, "fp8": 0.5}  # of tokens, of a tiny student with random weights


def make_engine(file: Path, out: Path, target: str, precision: str, **changes: Any) -> Engine:
    """A student exported and opened on the GPU; the test is skipped where a package is missing."""
    pytest.importorskip("onnxscript")
    job = Job(load_student(file), target, precision, (0,), Batch(1, 4, 8), progress=lambda what: None, **changes)
    try:
        check(job)
    except UserError as error:
        pytest.skip(str(error))
    export_student(job, out, min_agreement=LEAST[precision], num=16)
    try:
        return open_engine(out, CUDA)
    except UserError as error:
        if not any(reason in str(error) for reason in ("has no CUDA", "is for compute capabilities")):
            raise
        pytest.skip(str(error))


def feeds_of(engine: Engine, batch: int, seed: int = 0) -> dict[str, Tensor]:
    return engine.feeds(torch.arange(batch) % engine.manifest.shapes.num_classes, seed, torch.arange(batch))


def stage_of(engine: Engine) -> Any:
    return next(iter(engine.stages.values()))


@pytest.mark.gpu
@needs_gpu
def test_onnxruntime_on_cuda_draws_what_the_cpu_draws(student_file: Path, tmp_path: Path) -> None:
    engine = make_engine(student_file, tmp_path / "onnx", "onnx", "fp32")
    assert engine.runtime.endswith("CUDA") and engine.device.type == "cuda"
    here = open_engine(tmp_path / "onnx", "cpu")
    found, want = engine.run(feeds_of(engine, 3))["image"], here.run(feeds_of(here, 3))["image"]
    assert found.device.type == "cuda"
    alike = (found.cpu() - want).abs().amax((1, 2, 3)) < 1e-2  # an image whose tokens are equal
    assert alike.sum() >= 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "layout"), [("fp32", "whole"), ("fp16", "pair"), ("bf16", "whole")])
def test_a_tensorrt_engine_draws_torchs_tokens(student_file: Path, tmp_path: Path, precision: str, layout: str) -> None:
    engine = make_engine(student_file, tmp_path / "engine", "tensorrt", precision, layout=layout)
    parity, built = engine.manifest.parity, engine.manifest.built
    assert parity["token_agreement"] >= LEAST[precision] and parity["runtime"] == engine.runtime
    assert built["gpu"]["name"] == torch.cuda.get_device_name() and built["tensorrt"] in engine.runtime
    drawn = list(engine.draw(torch.zeros(11, dtype=torch.int64), 5, torch.arange(11)))  # 8, and 3
    images, size = torch.cat([part["image"] for part in drawn]), engine.manifest.shapes.image_size
    assert images.shape == (11, 3, size, size) and 0 <= images.min() < images.max() <= 1


@pytest.mark.gpu
@needs_gpu
def test_a_tensorrt_engine_in_fp8(student_file: Path, tmp_path: Path) -> None:
    engine = make_engine(student_file, tmp_path / "engine", "tensorrt", "fp8", options={"fp8_bar": 0.2})
    assert any(layer["fp8"] for layer in engine.manifest.built["fp8"]["layers"].values())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_in_a_cuda_graph_and_on_other_streams_draws_the_same(
    student_file: Path, tmp_path: Path, target: str
) -> None:
    engine = make_engine(student_file, tmp_path / "engine", target, "fp16")
    stage, first, other = stage_of(engine), feeds_of(engine, 4), feeds_of(engine, 4, seed=9)
    want = [stage(feeds)["image"].clone() for feeds in (first, other)]
    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream(CUDA))
    with torch.cuda.stream(side):
        beside = stage(other)["image"].clone()
    side.synchronize()
    assert torch.equal(beside, want[1])
    stage.stream = side
    given = stage(first)["image"]
    side.synchronize()
    assert torch.equal(given, want[0])
    stage.stream = None
    graphed = gpu_export.Graphed(stage)
    before = torch.cuda.memory_allocated(CUDA)
    for feeds, image in zip((first, other, first), (*want, want[0]), strict=True):
        assert torch.equal(graphed(feeds)["image"], image)
    assert torch.cuda.memory_allocated(CUDA) - before < 2 * sum(t.nbytes for t in first.values()) + 4096


@pytest.mark.gpu
@needs_gpu
def test_a_stage_refuses_tensors_of_the_cpu(student_file: Path, tmp_path: Path) -> None:
    engine = make_engine(student_file, tmp_path / "engine", "tensorrt", "fp16")
    feeds = {name: value.cpu() for name, value in feeds_of(engine, 2).items()}
    with pytest.raises(UserError, match="label must be torch.int64 .* on cuda:0, not torch.int64 .* on cpu"):
        stage_of(engine)(feeds)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")
def test_exports_are_timed_by_every_way_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def latency(engine: Engine, batch: int, seconds: float) -> Latency:
        asked.append(batch)
        assert engine.run(feeds_of(engine, batch))["image"].shape[0] == batch
        return Latency(batch, 1.0 * batch, 0.0, 0.0, 0.0, 1)

    monkeypatch.setattr(gpu_export, "latency", latency)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = gpu_export.ExportCase(
        "digits-var", (1, 64)
    )  # for the batches of test_bench_export.py, where the same graph is traced
    row = gpu_export.measure_case(case, Ceilings(1e10, 1e12), torch.device("cpu"))
    assert list(row["ms"]) == ["torch bf16", "onnxruntime"] and asked == [1, 64, 1, 64]
    assert "--script writes" in row["missing"]["TensorRT"]
    assert row["ms"]["onnxruntime"] == {"1": 1.0, "64": 64.0}
    flop = 1e9 * row["gflop_per_image"]
    assert row["ceiling_ms"]["64"] >= 64e3 * flop / 1e12 and flop > 1e6
    told = gpu_export.line(row)
    assert told.startswith("export digits-var batch 1/64 ") and told.endswith("without TensorRT")
    assert gpu_export.line({"name": "x", "problem": "out of time"}).endswith("out of time")
    assert [case.teacher for case in gpu_export.export_cases()] == ["digits-var", "var-d16", "llamagen-b-256"]
