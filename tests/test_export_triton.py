from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddfast.errors import UserError
from ddfast.export import triton_server
from ddfast.export.build import Job, check, export_student, open_engine
from ddfast.export.manifest import Batch, read_manifest
from ddfast.models import Distilled, load_student

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


BATCH = Batch(1, 4, 8)  # that of test_export.py, where the same students are traced


def job(model: Distilled, precision: str = "fp32", **changes: Any) -> Job:
    return replace(Job(model, "triton-server", precision, (0,), BATCH, progress=lambda what: None), **changes)


@pytest.fixture(scope="module")
def model(student_file: Path) -> Distilled:
    return load_student(student_file)


@pytest.fixture(scope="module")
def exported(model: Distilled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("server") / "models"
    export_student(job(model, single_file=1 << 10), out)
    return out


def parsed(text: str) -> Any:
    """config.pbtxt as the server reads it: by the messages of NVIDIA's own client, loaded alone from its package, which
    asks for an older protobuf than ours when it is installed with gRPC."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("needs tritonclient")
    name = "tritonclient.grpc.model_config_pb2"
    if name not in sys.modules:
        path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    from google.protobuf import text_format

    return text_format.Parse(text, sys.modules[name].ModelConfig())


def graph_dims(value: Any) -> list[int]:
    """-1 for what varies."""
    return [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]


def config_dims(value: Any, gathered: bool) -> list[int]:
    """What the server gives the graph for an input or an output of the config."""
    dims = list(value.reshape.shape) if value.HasField("reshape") else list(value.dims)
    return [-1, *dims] if gathered else dims


def assert_config_fits(config: Any, graph: Any) -> None:
    """Names, types and dims of the config are the graph's own."""
    types = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    for declared, own in ((config.input, graph.input), (config.output, graph.output)):
        assert [value.name for value in declared] == [value.name for value in own]
        for value, real in zip(declared, own, strict=True):
            kind = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[value.data_type].name
            assert kind == types[real.type.tensor_type.elem_type]
            assert config_dims(value, config.max_batch_size > 0) == graph_dims(real)


def test_the_folder_is_a_model_repository(exported: Path) -> None:
    files = sorted(p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file())
    assert files == ["ddfast/1/model.onnx", "ddfast/1/model.onnx.data", "ddfast/config.pbtxt", "manifest.json"]
    assert set(read_manifest(exported).files) == set(files) - {"manifest.json"}


def test_the_config_says_what_the_graph_takes_and_gives(exported: Path) -> None:
    config = parsed((exported / "ddfast/config.pbtxt").read_text())
    graph = onnx.load(str(exported / "ddfast/1/model.onnx"), load_external_data=False).graph
    assert_config_fits(config, graph)
    assert [value.name for value in graph.output] == ["image"]
    assert (config.name, config.backend, config.max_batch_size) == ("ddfast", "onnxruntime", 8)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert list(config.input[0].dims) == [1] and config.input[0].HasField("reshape")


@pytest.mark.parametrize("changes", [{"seeded": True}, {"batch": Batch(3, 3, 3)}], ids=["seeded", "fixed"])
def test_what_cannot_be_gathered_takes_whole_batches(model: Distilled, changes: dict[str, Any]) -> None:
    wanted = job(model, **changes)
    config = parsed(triton_server.config(wanted))
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    _, feeds, _ = wanted.traced("whole", torch.float32)
    batch = 3 if wanted.batch.fixed else -1
    shapes = {name: [1] if name == "seed" else [batch, *value.shape[1:]] for name, value in feeds.items()}
    assert {value.name: config_dims(value, gathered=False) for value in config.input} == shapes
    assert list(config.output[0].dims) == [batch, 3, 12, 12]


def test_the_repository_runs_here_and_gives_torch_s_images(exported: Path) -> None:
    parity = read_manifest(exported).parity
    assert parity["token_agreement"] == 1 and parity["images_alike"] == 1 and parity["image_error"] < 2e-5
    images = [part["image"] for part in open_engine(exported).draw(torch.arange(5), 0, torch.arange(5))]
    assert torch.cat(images).shape == (5, 3, 12, 12)


@pytest.mark.parametrize("file", ["ddfast/config.pbtxt", "ddfast/1/model.onnx.data"])
def test_a_file_that_was_changed_is_refused(exported: Path, file: str) -> None:
    path = exported / file
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + b"#")
        with pytest.raises(UserError, match=f"{file} is not the file that its manifest lists"):
            open_engine(exported)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("precision", "backend", "instance", "kind"),
    [
        ("fp32", None, None, "KIND_AUTO"),
        ("fp16", None, "gpu", "KIND_GPU"),
        ("int8", None, "cpu", "KIND_CPU"),
        ("bf16", None, None, "KIND_GPU"),
        ("fp16", "tensorrt", None, "KIND_GPU"),
    ],
)
def test_the_config_says_where_the_model_runs(
    model: Distilled, precision: str, backend: str | None, instance: str | None, kind: str
) -> None:
    text = triton_server.config(job(model, precision, options={"backend": backend, "instance": instance}))
    config = parsed(text)
    group = config.instance_group[0]
    assert type(group).Kind.Name(group.kind) == kind and group.count == 1
    assert config.backend == (backend or "onnxruntime")
    outputs = ["image", "embeddings"] if backend else ["image"]
    assert [value.name for value in config.output] == outputs


@pytest.mark.parametrize(
    ("precision", "changes", "message"),
    [
        ("fp8", {}, "triton-server has no precision fp8"),
        ("fp32", {"layout": "pair"}, "triton-server has no layout 'pair'"),
        ("fp32", {"options": {"backend": "openvino"}}, "no backend 'openvino'; use onnxruntime or tensorrt"),
        ("fp32", {"options": {"instance": "tpu"}}, "auto, cpu, gpu, not on 'tpu'"),
        ("bf16", {"options": {"instance": "cpu"}}, "onnxruntime has bfloat16 on GPUs only; use --instance gpu"),
        ("fp16", {"options": {"instance": "cpu", "backend": "tensorrt"}}, "TensorRT runs on GPUs only"),
        ("int8", {"options": {"backend": "tensorrt"}}, "TensorRT has no int8 here"),
        ("fp16", {"options": {"backend": "tensorrt", "script": True}}, "--script is for --to tensorrt"),
        ("fp32", {"batch": Batch(2, 4, 8)}, "batches of 1 and more, not of 2; use --batches 1,4,8"),
    ],
)
def test_what_the_server_cannot_run_is_refused(
    model: Distilled, precision: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(job(model, precision, **changes))


def test_a_tensorrt_engine_needs_its_gpu(model: Distilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="built on the GPU that runs it"):
        check(job(model, "fp16", options={"backend": "tensorrt"}))


def test_a_tensorrt_engine_goes_where_the_server_looks(
    model: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddfast.export import tensorrt

    def build(of: Job) -> dict[str, Any]:
        (of.folder / "model.plan").write_bytes(b"engine")
        return {"tensorrt": "11.0"}

    monkeypatch.setattr(tensorrt, "build", build)
    wanted = job(model, "fp16", options={"backend": "tensorrt"}, folder=tmp_path)
    assert triton_server.build(wanted) == {"tensorrt": "11.0", "backend": "tensorrt", "instance": "gpu"}
    assert wanted.manifest().stages == {"whole": "ddfast/1/model.plan"}
    assert (tmp_path / "ddfast/1/model.plan").read_bytes() == b"engine" and not (tmp_path / "model.plan").exists()


def test_the_client_feeds_what_the_config_names(model: Distilled) -> None:
    ast.parse(triton_server.CLIENT)
    config = triton_server.config(job(model))
    for name in ("label", "noise", "image"):
        assert f'"{name}"' in triton_server.CLIENT and f'name: "{name}"' in config
