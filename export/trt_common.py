"""What TensorRT and TensorRT-RTX share: engines out of ONNX graphs, and torch's CUDA tensors bound to them.

Axes: B images, L tokens of an image, C codebook channels.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddfast.errors import UserError, WorkError
from ddfast.files import write_atomic

from .engine import Engine, Stage, Tensors
from .fp8 import Fp8
from .manifest import Batch, Manifest

if TYPE_CHECKING:
    from .build import Job

Profile = dict[str, list[list[int]]]
"""Least, best and most shape of every input whose batch may vary."""

GRAPHS = "graph"
"""Folder of the ONNX graphs that engines are built from."""


def profile(job: Job, stage: str) -> Profile:
    """Of one stage's engine; empty for a fixed batch."""
    if job.batch.fixed:
        return {}
    each = [job.shapes.tokens, job.shapes.channels]
    inputs: dict[str, list[int]] = {"embeddings": each} if stage == "decoder" else {"label": []}
    if stage != "decoder":
        inputs |= {"sample": []} if job.seeded else {"noise": each}
    batch = job.batch
    return {name: [[batch.least, *shape], [batch.best, *shape], [batch.most, *shape]] for name, shape in inputs.items()}


def profiles(job: Job) -> dict[str, Profile]:
    return {stage: found for stage in job.stages("{}") if (found := profile(job, stage))}


def write_graphs(job: Job) -> tuple[dict[str, Path], dict[str, Any]]:
    """The ONNX graph of every stage, in the folder ``GRAPHS``, and what they were made with."""
    from . import onnx

    folder, found = job.folder / GRAPHS, {}
    folder.mkdir()
    facts: dict[str, Any] = dict(onnx.versions())
    fp8 = Fp8(job) if job.precision == "fp8" else None
    for stage, name in job.stages("{}.onnx").items():
        job.progress(f"{stage} to ONNX")
        found[stage] = folder / name
        change = None if stage == "decoder" else fp8
        onnx.export_stage(job, stage, found[stage], "fp16" if fp8 else job.precision, change)
    return found, facts | ({"fp8": fp8.record()} if fp8 else {})


def build_engine(
    trt: Any, graph: Path, plan: Path, shapes: Profile, configure: Callable[[Any], None], timings: Path | None = None
) -> dict[str, float]:
    """Parse a graph, build its engine as ``configure`` sets the builder's config up, and write it to ``plan``.

    ``timings`` is a file of kernels' timings, which this build takes and adds to. Returns seconds and bytes.

    Raises:
        WorkError: the parser or the builder refuses the graph, and why; ``timings`` are another GPU's.
    """
    begin = time.perf_counter()
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        told = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise WorkError(f"{trt.__name__} {trt.__version__} cannot read {graph.name}: {told}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # what is float32 in the graph is computed so
    if shapes:
        own = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            own.set_shape(name, least, best, most)
        if config.add_optimization_profile(own) < 0:
            raise WorkError(f"{trt.__name__} refuses the profile {shapes} of {graph.name}: {log.told()}")
    configure(config)
    if timings is not None:
        cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise WorkError(f"{timings} is no timing cache of this GPU and TensorRT; remove it, or name another one")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise WorkError(f"{trt.__name__} {trt.__version__} cannot build {graph.name}: {log.told()}")
    plan.write_bytes(memoryview(engine))
    if timings is not None:
        write_atomic(timings, bytes(memoryview(config.get_timing_cache().serialize())))
    return {"seconds": round(time.perf_counter() - begin, 1), "bytes": plan.stat().st_size}


def make_log(trt: Any) -> Any:
    """A TensorRT logger that keeps errors, for messages."""

    class Log(trt.ILogger):  # type: ignore[misc]  # of a package that is imported late
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def told(self) -> str:
            return "; ".join(self.errors[-3:]) or "no reason was given"

    return Log()


# What an engine is for, and what is here


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Name, compute capability such as "9.0", driver, and torch's CUDA."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = None
    return {
        "name": torch.cuda.get_device_name(device),
        "compute_capability": capability(device),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def capability(device: torch.device) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def number(capability: str) -> tuple[int, int]:
    """Of a compute capability, for comparing.

    >>> number("8.9") < number("12.0")
    True
    """
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


LEAST_CAPABILITY = {"bf16": "8.0", "fp8": "8.9"}


def check_capability(precision: str, capability: str) -> None:
    """Raise UserError where GPUs of a compute capability lack a precision."""
    least = LEAST_CAPABILITY.get(precision)
    if least and number(capability) < number(least):
        raise UserError(
            f"{precision} needs a GPU of compute capability {least} or later, not {capability}; use --precision fp16"
        )


def check_device(path: Path, device: torch.device) -> torch.device:
    """``device`` with its number. Raises UserError where an engine's file is missing or no GPU is there to run it."""
    if not path.is_file():
        raise UserError(f"{path} has not been built yet: run {path.parent / 'build.sh'} on the GPU that is to run it")
    if device.type != "cuda":
        raise UserError(f"{path} is an engine for a GPU; it does not run on {device}: use --device cuda")
    if not torch.cuda.is_available():
        raise UserError(f"{path} is an engine for a GPU, and torch sees no CUDA GPU here; run it where there is one")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def check_version(path: Path, name: str, built: str, here: str) -> None:
    """Raise UserError where an engine belongs to another version of its runtime."""
    if built != here:
        raise UserError(
            f"{path} was built by {name} {built}, and {here} is installed; install {built}, or export again"
        )


# Running


def current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device)


class EngineStage(Stage):
    """An engine on torch's tensors: nothing is copied, waited for or, once a batch size has been seen, allocated.

    Work is queued on torch's current stream, or on ``stream``, so that a call can be captured in a CUDA graph, once one
    with that batch has been made outside of it. In place of torch's default stream, on which TensorRT would wait for
    the device, one beside it is used, in order with it. Outputs are buffers of the stage, overwritten by the next call;
    calls on two streams must not overlap.

    Args:
        trt: the package.
        path: of the engine.
        batch: sizes it takes.
        device: its GPU.
        make_context: an execution context of an engine, whose memory the stage provides.
        stream: to use in place of torch's current one.
    """

    def __init__(
        self,
        trt: Any,
        path: Path,
        batch: Batch,
        device: torch.device,
        make_context: Callable[[Any], Any],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.device, self.stream, self.range = device, stream, batch
        self.runtime = f"{trt.__name__} {trt.__version__}"
        self.log = make_log(trt)
        with torch.cuda.device(device):
            self.loader = trt.Runtime(self.log)
            self.engine = self.loader.deserialize_cuda_engine(path.read_bytes())
            if self.engine is None:
                raise WorkError(f"{self.runtime} cannot load {path}: {self.log.told()}")
            self.context = make_context(self.engine)
        if self.context is None:
            raise WorkError(f"{self.runtime} cannot run {path}: {self.log.told()}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        kinds = {trt.DataType.INT64: torch.int64, trt.DataType.FLOAT: torch.float32}
        self.kinds = {name: kinds[self.engine.get_tensor_dtype(name)] for name in names}
        self.shapes = {name: tuple(self.engine.get_tensor_shape(name)) for name in names}
        self.inputs = inputs
        self.scratch = torch.empty(max(1, self.engine.device_memory_size_v2), dtype=torch.uint8, device=device)
        self.context.set_device_memory(self.scratch.data_ptr(), self.scratch.numel())
        self.buffers = {
            name: torch.empty((batch.most, *self.shapes[name][1:]), dtype=self.kinds[name], device=device)
            for name in names
            if name not in inputs
        }
        for name, buffer in self.buffers.items():
            self.context.set_tensor_address(name, buffer.data_ptr())
        self.outputs: Tensors = {}
        self.batch = 0
        self.beside: Any = None  # the stream that stands for torch's default one

    def __call__(self, feeds: Tensors) -> Tensors:
        batch = len(feeds[next(name for name in self.inputs if name != "seed")])
        if batch != self.batch:
            self.resize(batch)
        kept = []  # alive until the work is queued; the caching allocator orders what comes after
        for name in self.inputs:
            value = self.checked(name, feeds[name])
            kept.append(value)
            self.context.set_tensor_address(name, value.data_ptr())
        with torch.cuda.device(self.device):
            self.launch()
        return dict(self.outputs)

    def checked(self, name: str, value: Tensor) -> Tensor:
        """An input as the engine reads it. Raises UserError where it is another one."""
        shape = tuple(value.shape)
        want = (1 if name == "seed" else self.batch, *self.shapes[name][1:])
        if value.device != self.device or value.dtype != self.kinds[name] or shape != want:
            raise UserError(
                f"{name} must be {self.kinds[name]} {list(want)} on {self.device}, not {value.dtype} {list(shape)} on "
                f"{value.device}"
            )
        return value.contiguous()

    def resize(self, batch: int) -> None:
        """Raises UserError for a batch that the engine does not take."""
        if not self.range.least <= batch <= self.range.most:
            raise UserError(
                f"this engine takes {self.range.least} to {self.range.most} images at once, not {batch}; export again "
                "with other --batches"
            )
        for name in self.inputs:
            shape = self.shapes[name]
            if shape[0] == -1 and not self.context.set_input_shape(name, (batch, *shape[1:])):
                raise WorkError(f"{self.runtime} refuses {name} for {batch} images: {self.log.told()}")
        self.batch = batch
        self.outputs = {name: buffer[:batch] for name, buffer in self.buffers.items()}

    def launch(self) -> None:
        stream = current_stream(self.device) if self.stream is None else self.stream
        if stream.cuda_stream:
            return self.queue(stream.cuda_stream)
        self.beside = self.beside or torch.cuda.Stream(self.device)
        self.beside.wait_stream(stream)
        self.queue(self.beside.cuda_stream)
        stream.wait_stream(self.beside)

    def queue(self, stream: int) -> None:
        if not self.context.execute_async_v3(stream):
            raise WorkError(f"{self.runtime} failed: {self.log.told()}")


# In place of an engine that cannot run here


def graph_engine(job: Job, manifest: Manifest, graphs: Mapping[str, Path]) -> Engine:
    """The graphs that an engine is built from, by onnxruntime on the CPU; bfloat16, which it has not, by torch."""
    from .onnx import OnnxStage, TracedStage

    def opened(stage: str, path: Path) -> Stage:
        precision = manifest.precision[stage]
        if precision == "bf16":
            return TracedStage(job, stage, precision)
        return OnnxStage(path, precision, torch.device("cpu"))

    stages = {stage: opened(stage, path) for stage, path in graphs.items()}
    for stage in stages.values():
        stage.runtime += ", in place of the engine built from the same graph"
    return Engine(manifest, stages)
