"""TensorRT and TensorRT-RTX as far as a machine without a GPU goes: engines for RTX GPUs are really built."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_student
from torch import Tensor

from ddfast.errors import UserError, WorkError
from ddfast.models import Distilled, load_student

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from ddfast.export import tensorrt, tensorrt_rtx, trt_common  # noqa: E402
from ddfast.export.build import Job, check, export_student, open_engine  # noqa: E402
from ddfast.export.manifest import Batch, read_manifest  # noqa: E402
from ddfast.export.onnx import OnnxStage  # noqa: E402

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
H200 = {"name": "NVIDIA H200", "compute_capability": "9.0", "driver": "580.1", "cuda": "13.0"}


@pytest.fixture(scope="module")
def students(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Distilled]:
    """A tiny one of each family."""
    folder = tmp_path_factory.mktemp("students")
    files = {f: tiny_student(folder / f"{f}.safetensors", str(bundle), f) for f, bundle in bundles.items()}
    return {family: load_student(file) for family, file in files.items()}


@pytest.fixture(scope="module")
def student(students: dict[str, Distilled]) -> Distilled:
    return students["llamagen"]


def make_job(model: Distilled, target: str = "tensorrt", precision: str = "fp16", **changes: Any) -> Job:
    settings = {"batch": Batch(1, 2, 4), "progress": lambda what: None} | changes
    return Job(model, target, precision, (0,), **settings)


@pytest.fixture(scope="module")
def scripted(student: Distilled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("script") / "there"
    export_student(make_job(student, options={"script": True}), out, min_agreement=0.5, num=4)
    return out


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0)) -> None:
    """As far as looking at it goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


# RTX engines


@pytest.mark.parametrize("family", [pytest.param("var", marks=pytest.mark.slow), "llamagen"])
def test_an_rtx_engine_is_built_without_a_gpu(students: dict[str, Distilled], family: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "rtx"
    manifest = export_student(make_job(students[family], "tensorrt-rtx"), out, min_agreement=0.5, num=4)
    assert manifest == read_manifest(out) and set(manifest.files) == {"model.rtx"}
    built, shapes = manifest.built, manifest.shapes
    each = [shapes.tokens, shapes.channels]
    profile = {"label": [[1], [2], [4]], "noise": [[1, *each], [2, *each], [4, *each]]}
    assert built["profile"] == {"whole": profile}
    assert built["engines"]["whole"]["bytes"] == (out / "model.rtx").stat().st_size > 50_000
    assert built["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    assert "in place of the engine" in manifest.parity["runtime"] and manifest.parity["token_agreement"] > 0.9
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA GPU here"):
            open_engine(out)
    with pytest.raises(UserError, match="does not run on cpu"):
        open_engine(out, "cpu")


@pytest.mark.slow  # fp16 is built above, and what fp8 makes of a graph is in test_export_fp8.py
@pytest.mark.parametrize(("family", "precision", "layout"), [("llamagen", "bf16", "pair"), ("var", "fp8", "whole")])
def test_rtx_engines_of_other_precisions(
    students: dict[str, Distilled], tmp_path: Path, family: str, precision: str, layout: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    batch, options = Batch(2, 2, 2), {"fp8_bar": 0.2}
    settings: dict[str, Any] = {"layout": layout, "batch": batch, "options": options, "seeded": family == "llamagen"}
    job = make_job(students[family], "tensorrt-rtx", precision, **settings)
    manifest = export_student(job, tmp_path / "rtx", min_agreement=0.4, num=4)
    assert manifest.built["profile"] == {}  # the batch is fixed
    assert set(manifest.files) == {f"{name}.rtx" for name in (("trunk", "decoder") if layout == "pair" else ["model"])}
    if precision == "fp8":
        assert manifest.built["compute_capabilities"] == ["8.9", "12.0"]
        layers = manifest.built["fp8"]["layers"]
        assert sum(layer["fp8"] for layer in layers.values()) >= 8
        assert not any(layer["fp8"] for name, layer in layers.items() if "n_d_embed" in name)  # constants of the graph
    else:
        assert "bf16" in manifest.parity["runtime"]


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("fp16", {"compute_capabilities": ["9.0"]}, "no compute capability '9.0'; use 7.5, 8.0"),
        ("bf16", {"compute_capabilities": ["7.5", "8.9"]}, "bf16 needs a GPU of compute capability 8.0 or later"),
        ("fp8", {"compute_capabilities": ["8.6"]}, "fp8 needs a GPU of compute capability 8.9 or later, not 8.6"),
        ("fp16", {"workspace": 0}, "--workspace is 0 MiB"),
        ("fp8", {"fp8_bar": 1.5}, "--fp8-bar is 1.5"),
        ("fp8", {"fp8_images": 0}, "--fp8-images is 0"),
        ("int8", {}, "tensorrt-rtx has no precision int8; use fp16, bf16, fp32, fp8"),
    ],
)
def test_what_no_rtx_engine_can_be_built_for_is_refused(
    student: Distilled, precision: str, options: dict[str, Any], message: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UserError, match=message):
        check(make_job(student, "tensorrt-rtx", precision, options=options))


def test_rtx_engines_run_on_what_they_are_for_and_later() -> None:
    assert tensorrt_rtx.runs_on("8.6", ["8.0", "8.6"]) and not tensorrt_rtx.runs_on("8.9", ["8.0", "8.6"])
    assert tensorrt_rtx.runs_on("12.1", ["8.9", "12.0"]) and not tensorrt_rtx.runs_on("9.0", ["8.9", "12.0"])


def test_a_graph_that_rtx_cannot_read_says_why(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(WorkError, match=r"cannot read model.onnx: \S+"):
        trt_common.build_engine(trt, tmp_path / "model.onnx", tmp_path / "model.rtx", {}, lambda config: None)
    assert not (tmp_path / "model.rtx").exists()


# TensorRT's own builder: RTX's stands for it, which has the same calls


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_a_tensorrt_build_keeps_timings_and_says_what_it_is_for(
    student: Distilled, scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, timings = pytest.importorskip("tensorrt_rtx"), tmp_path / "cache" / "h200.timing"
    monkeypatch.setattr(tensorrt, "package", lambda: trt)
    monkeypatch.setattr(tensorrt, "here", lambda: CPU)
    monkeypatch.setattr(trt_common, "gpu_facts", lambda device: H200)

    def write_graphs(job: Job) -> tuple[dict[str, Path], dict[str, Any]]:
        shutil.copytree(scripted / trt_common.GRAPHS, job.folder / trt_common.GRAPHS)
        return {"whole": job.folder / trt_common.GRAPHS / "model.onnx"}, {}

    monkeypatch.setattr(trt_common, "write_graphs", write_graphs)
    job = make_job(student, options={"timing_cache": timings, "workspace": 512}, folder=tmp_path)
    built = tensorrt.build(job)
    assert (built["gpu"], built["tensorrt"]) == (H200, trt.__version__)
    assert timings.stat().st_size > 0 and (tmp_path / "model.plan").stat().st_size > 50_000
    assert not (tmp_path / trt_common.GRAPHS).exists()
    assert tensorrt.default_cache("11.1.0", H200).name == "tensorrt-11.1.0-nvidia-h200.timing"


def test_no_engine_is_begun_without_a_gpu_or_tensorrt(student: Distilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="built on the GPU that runs it, and torch sees no CUDA GPU here; --script"):
        check(make_job(student))
    on_gpu(monkeypatch, "NVIDIA A100", (8, 0))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt" else find_spec(name))
    with pytest.raises(UserError, match=r"tensorrt is not installed: pip install 'ddfast\[tensorrt\]'"):
        check(make_job(student))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="fp8 needs a GPU of compute capability 8.9 or later, not 8.0"):
        check(make_job(student, precision="fp8"))
    check(make_job(student, precision="bf16"))


def test_a_timing_cache_that_cannot_be_written_is_refused(student: Distilled, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder, not a file"):
        check(make_job(student, options={"timing_cache": tmp_path}))


# Scripts


def test_a_script_holds_graph_and_commands(scripted: Path, student: Distilled) -> None:
    manifest, shapes = read_manifest(scripted), Job(student, "tensorrt", "fp16", (0,)).shapes
    assert set(manifest.files) == {"build.sh", "graph/model.onnx"} and manifest.built["script"] == "build.sh"
    assert manifest.parity["token_agreement"] > 0.9 and os.access(scripted / "build.sh", os.X_OK)
    each = f"x{shapes.tokens}x{shapes.channels}"
    lines = [line.strip() for line in (scripted / "build.sh").read_text().splitlines()]
    assert lines[0] == "#!/bin/sh"
    assert (
        f"trtexec --onnx=graph/model.onnx --minShapes=label:1,noise:1{each} --optShapes=label:2,noise:2{each} "
        f"--maxShapes=label:4,noise:4{each} --stronglyTyped --noTF32 --timingCacheFile=timing.cache "
        "--saveEngine=model.plan --skipInference"
    ) in lines
    n, c = shapes.tokens, shapes.channels
    assert (
        "polygraphy convert graph/model.onnx --convert-to trt --strongly-typed "
        f"--trt-min-shapes 'label:[1]' 'noise:[1,{n},{c}]' --trt-opt-shapes 'label:[2]' 'noise:[2,{n},{c}]' "
        f"--trt-max-shapes 'label:[4]' 'noise:[4,{n},{c}]' "
        "--load-timing-cache timing.cache --save-timing-cache timing.cache -o model.plan"
    ) in lines
    with pytest.raises(UserError, match="has not been built yet: run .*build.sh on the GPU"):
        open_engine(scripted)


def test_a_scripts_options_and_stages(student: Distilled) -> None:
    options = {"script": True, "workspace": 2048, "timing_cache": "my cache"}
    job = make_job(student, layout="pair", batch=Batch(8, 8, 8), options=options)
    lines = tensorrt.script(job).splitlines()
    commands = [line.split() for line in lines if line.lstrip().startswith("trtexec")]
    assert [words[1] for words in commands] == ["--onnx=graph/trunk.onnx", "--onnx=graph/decoder.onnx"]
    assert not any("Shapes" in word for words in commands for word in words)
    assert all(words[-1] == "--memPoolSize=workspace:2048" for words in commands)
    assert all("'--timingCacheFile=my cache'" in line for line in lines if "trtexec -" in line)
    assert sum("--pool-limit workspace:2048M" in line for line in lines) == 2
    seeded = make_job(student, layout="pair", seeded=True, options={"script": True})
    assert list(trt_common.profile(seeded, "trunk")) == ["label", "sample"]
    assert list(trt_common.profile(seeded, "decoder")) == ["embeddings"]


@pytest.mark.parametrize("tool", ["trtexec", "polygraphy"])
def test_the_script_runs_its_tool(scripted: Path, tmp_path: Path, tool: str) -> None:
    fake = tmp_path / "bin" / tool
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    subprocess.run([scripted / "build.sh", tool], check=True, env=environment, cwd=tmp_path)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    names = [a.partition(":")[0] for a in arguments if a.startswith(("label", "noise"))]
    assert names == (["label", "noise"] * 3 if tool == "polygraphy" else [])
    assert ("--saveEngine=model.plan" if tool == "trtexec" else "model.plan") in arguments


def test_a_script_that_was_run_becomes_an_engine_folder(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(scripted, tmp_path / "there")
    with pytest.raises(UserError, match="lacks model.plan: run .*build.sh first"):
        tensorrt.record(folder)
    (folder / "model.plan").write_bytes(b"an engine")
    on_gpu(monkeypatch)
    with pytest.raises(UserError, match="not known to be of this GPU: run `python -m ddfast.export.tensorrt"):
        open_engine(folder)
    monkeypatch.setattr(tensorrt, "package", lambda: SimpleNamespace(__version__="11.1.0"))
    monkeypatch.setattr(trt_common, "gpu_facts", lambda device: H200)
    tensorrt.record(folder)
    manifest = read_manifest(folder)
    assert manifest.built["gpu"] == H200 and manifest.built["tensorrt"] == "11.1.0" and "model.plan" in manifest.files
    with pytest.raises(UserError, match="holds no script"):
        tensorrt.record(folder)


# Another GPU, another version


@pytest.mark.parametrize(
    ("name", "capability", "version", "message"),
    [
        (
            "NVIDIA A100",
            (8, 0),
            "11.1.0",
            r"on NVIDIA H200 \(compute capability 9.0\), and this is NVIDIA A100 \(8.0\)",
        ),
        ("NVIDIA H200", (9, 1), "11.1.0", r"NVIDIA H200 \(compute capability 9.0\), and this is NVIDIA H200 \(9.1\)"),
        ("NVIDIA H200", (9, 0), "11.2.0", "was built by TensorRT 11.1.0, and 11.2.0 is installed"),
    ],
)
def test_an_engine_of_another_gpu_or_version_is_refused_before_it_is_read(
    scripted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    version: str,
    message: str,
) -> None:
    path = tmp_path / "model.plan"
    path.touch()
    on_gpu(monkeypatch, name, capability)
    # No Runtime: an attempt to read would be an AttributeError.
    monkeypatch.setattr(tensorrt, "package", lambda: SimpleNamespace(__version__=version))
    manifest = replace(read_manifest(scripted), built={"gpu": H200, "tensorrt": "11.1.0"})
    with pytest.raises(UserError, match=message):
        tensorrt.open_stage(path, "whole", manifest, GPU)


@pytest.mark.parametrize(
    ("capability", "version", "message"),
    [
        ((9, 0), "1.7", "is for compute capabilities 8.9, 12.0, and a GPU has 9.0"),
        ((8, 9), "1.8", "was built by TensorRT-RTX 1.7, and 1.8 is installed"),
    ],
)
def test_an_rtx_engine_for_other_gpus_or_of_another_version_is_refused(
    scripted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    version: str,
    message: str,
) -> None:
    path = tmp_path / "model.rtx"
    path.touch()
    on_gpu(monkeypatch, "a GPU", capability)
    monkeypatch.setattr(tensorrt_rtx, "package", lambda: SimpleNamespace(__version__=version))
    built = {"compute_capabilities": ["8.9", "12.0"], "tensorrt_rtx": "1.7"}
    with pytest.raises(UserError, match=message):
        tensorrt_rtx.open_stage(path, "whole", replace(read_manifest(scripted), built=built), GPU)


# Running: an execution context that reads and writes the addresses it is given, by onnxruntime


def fake_tensorrt(calls: list[Any]) -> SimpleNamespace:
    kinds = {"tensor(int64)": ("INT64", np.int64), "tensor(float)": ("FLOAT", np.float32)}

    class Context:
        def __init__(self, session: Any) -> None:
            self.session, self.addresses, self.shapes = session, {}, {}

        def set_device_memory(self, address: int, size: int) -> None:
            calls.append(("memory", size))

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            calls.append(("shape", name, shape))
            self.shapes[name] = shape
            return True

        def execute_async_v3(self, stream: int) -> bool:
            calls.append(("run", stream))
            feeds = {}
            for value in self.session.get_inputs():
                kind = np.dtype(kinds[value.type][1])
                count = int(np.prod(self.shapes[value.name]))
                data = ctypes.string_at(self.addresses[value.name], count * kind.itemsize)
                feeds[value.name] = np.frombuffer(data, kind).reshape(self.shapes[value.name])
            for value, found in zip(self.session.get_outputs(), self.session.run(None, feeds), strict=True):
                found = np.ascontiguousarray(found)
                ctypes.memmove(self.addresses[value.name], found.ctypes.data, found.nbytes)
            return True

    class Engine:
        device_memory_size_v2 = 4096

        def __init__(self, data: bytes) -> None:
            self.session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
            self.inputs = {v.name: v for v in self.session.get_inputs()}
            self.values = self.inputs | {v.name: v for v in self.session.get_outputs()}
            self.num_io_tensors = len(self.values)

        def get_tensor_name(self, index: int) -> str:
            return list(self.values)[index]

        def get_tensor_mode(self, name: str) -> str:
            return "in" if name in self.inputs else "out"

        def get_tensor_dtype(self, name: str) -> str:
            return kinds[self.values[name].type][0]

        def get_tensor_shape(self, name: str) -> list[int]:
            return [d if isinstance(d, int) else -1 for d in self.values[name].shape]

        def create_execution_context(self, strategy: str) -> Context:
            calls.append(("context", strategy))
            return Context(self.session)

    severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)
    return SimpleNamespace(
        __name__="tensorrt",
        __version__="11.1.0",
        ILogger=type("ILogger", (), {"Severity": severity}),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda data: Engine(data) if data else None),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        DataType=SimpleNamespace(INT64="INT64", FLOAT="FLOAT"),
    )


@pytest.fixture
def calls() -> list[Any]:
    return []


@pytest.fixture
def stage(scripted: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> trt_common.EngineStage:
    trt = fake_tensorrt(calls)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(trt_common, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    graph = scripted / "graph" / "model.onnx"
    return trt_common.EngineStage(trt, graph, Batch(1, 2, 4), CPU, lambda e: tensorrt.make_context(trt, e))


def feeds_of(student: Distilled, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    noise = torch.randn(batch, student.student.num_tokens, student.student.channels, generator=generator)
    return {"label": torch.arange(batch), "noise": noise}


def test_a_stage_binds_tensors_where_they_are(
    stage: trt_common.EngineStage, scripted: Path, student: Distilled, calls: list[Any]
) -> None:
    plain = OnnxStage(scripted / "graph" / "model.onnx", "fp16", CPU)
    assert calls == [("context", "user"), ("memory", 4096)]
    addresses = set()
    for batch in (2, 2, 4, 1):
        feeds = feeds_of(student, batch)
        found = stage(feeds)
        for name, want in plain(feeds).items():
            assert found[name].shape == want.shape and found[name].is_contiguous()
            torch.testing.assert_close(found[name], want, atol=1e-3, rtol=0)
        addresses.add(found["image"].data_ptr())
    assert len(addresses) == 1  # every call writes the same buffer
    shapes = [call[1:] for call in calls if call[0] == "shape"]
    each = student.student.num_tokens, student.student.channels
    assert shapes == [(name, (n, *s)) for n in (2, 4, 1) for name, s in (("label", ()), ("noise", each))]
    assert [call[1] for call in calls if call[0] == "run"] == [7] * 4


def test_a_given_stream_is_used_and_torchs_default_one_is_not(
    stage: trt_common.EngineStage, student: Distilled, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[int, int]] = []

    def stream(number: int) -> Any:
        return SimpleNamespace(cuda_stream=number, wait_stream=lambda other: waits.append((number, other.cuda_stream)))

    stage.stream = stream(9)
    stage(feeds_of(student, 2))
    assert calls[-1] == ("run", 9) and not waits
    stage.stream = None
    monkeypatch.setattr(trt_common, "current_stream", lambda device: stream(0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream(5))
    stage(feeds_of(student, 2))
    assert calls[-1] == ("run", 5) and waits == [(5, 0), (0, 5)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"label": torch.zeros(2, dtype=torch.int32)},
            r"label must be torch.int64 \[2\] on cpu, not torch.int32 \[2\]",
        ),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"noise must be torch.float32 \[3, "),
        ({"noise": torch.zeros(2, 1, 1)}, r"noise must be .* not torch.float32 \[2, 1, 1\]"),
    ],
)
def test_a_stage_refuses_other_tensors(
    stage: trt_common.EngineStage, student: Distilled, changed: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stage(feeds_of(student, 2) | changed)


def test_a_stage_refuses_batches_outside_of_its_profile(stage: trt_common.EngineStage, student: Distilled) -> None:
    with pytest.raises(UserError, match="takes 1 to 4 images at once, not 5"):
        stage(feeds_of(student, 5))


def test_an_engine_that_does_not_load_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    path = tmp_path / "model.plan"
    path.touch()
    with pytest.raises(WorkError, match="tensorrt 11.1.0 cannot load .*model.plan: no reason was given"):
        trt_common.EngineStage(fake_tensorrt([]), path, Batch(1, 2, 4), CPU, lambda engine: None)
