"""ONNX by torch's exporter, and onnxruntime to run it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddfast.errors import UserError, WorkError, reason

from .engine import Engine, Stage, Tensors, installed, require
from .external import external_files
from .manifest import Manifest

if TYPE_CHECKING:
    from .build import Job

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
EXTRA = "export"
PACKAGES = ("onnx", "onnxscript")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}  # bfloat16 convolutions come with 22


def check(job: Job) -> None:
    """Raise UserError where nothing could run the graph to compare it."""
    if not installed("openvino"):
        require(EXTRA, "onnxruntime")


def build(job: Job) -> dict[str, Any]:
    """Write a graph for each stage of ``job``; returns what it was built with."""
    for stage, name in job.stages("{}.onnx").items():
        job.progress(f"{stage} to ONNX")
        export_stage(job, stage, job.folder / name, job.precision)
    return {"opset": OPSETS[job.precision]} | versions()


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "onnx", "onnxscript")}


def export_stage(job: Job, stage: str, path: Path, precision: str, change: Callable[[Any], None] | None = None) -> None:
    """One stage as a checked ONNX file, its weights beside it as ``NAME.onnx.data`` where they are large.

    A whole graph says its embeddings too, until :func:`seal`. ``change`` is given the ``onnx_ir.Model`` before it is
    saved.

    Raises:
        WorkError: the exporter fixed the batch although it may vary.
    """
    import onnx

    module, feeds, outputs = job.traced(stage, DTYPES[precision])
    with quiet():
        program = torch.onnx.export(
            module,
            tuple(feeds.values()),
            dynamo=True,
            input_names=list(feeds),
            output_names=outputs,
            opset_version=OPSETS[precision],
            dynamic_shapes=job.dynamic_shapes(stage, feeds),
            verbose=False,
        )
    assert program is not None
    model: Any = program.model
    forget_tracing(model)
    model.metadata_props["ddfast"] = f"{stage} of {job.model.name}, {precision}"
    if stage != "decoder":
        model.metadata_props["ddfast.labels"] = labels = labels_allowed(job.shapes.num_classes)
        model.graph.inputs[0].doc_string = labels
    if not job.batch.fixed and any(isinstance(value.shape[0], int) for value in model.graph.outputs):
        raise WorkError(f"the exporter made the batch of the {stage} a constant")
    if precision == "int8":
        from .int8 import quantize_weights

        quantize_weights(model)
    if change is not None:
        change(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    program.save(str(path), external_data=size > job.single_file)
    onnx.checker.check_model(str(path), full_check=True)


def labels_allowed(num_classes: int) -> str:
    """What a graph says of its labels."""
    return f"label: a class, 0 to {num_classes - 1}; for any other number the image is NaN"


def forget_tracing(model: Any) -> None:
    """Drop what the exporter notes of every node: stack traces, with the paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)):
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """What onnxruntime raises, as a UserError with its first line."""
    try:
        yield
    except Exception as error:  # its exceptions share no class of their own
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise UserError(f"onnxruntime refuses {path}: {reason(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def seal(folder: Path, manifest: Manifest) -> None:
    """Leave a whole graph its one output, the image."""
    import onnx

    if "whole" not in manifest.stages:
        return
    path = folder / manifest.stages["whole"]
    model = onnx.load(str(path), load_external_data=False)
    extra = next(value for value in model.graph.output if value.name == "embeddings")
    model.graph.output.remove(extra)
    path.write_bytes(model.SerializeToString())


def stand_in(job: Job, manifest: Manifest) -> Engine | None:
    """What was traced, in torch, to compare where the graph itself cannot run: bfloat16 on a CPU without OpenVINO."""
    if job.precision != "bf16" or usual_device(manifest) != "cpu" or installed("openvino"):
        return None
    stages = {stage: TracedStage(job, stage, job.precision) for stage in manifest.stages}
    for stage in stages.values():
        stage.runtime += ", in place of onnxruntime, which has no bf16 there"
    return Engine(manifest, stages)


class TracedStage(Stage):
    """The module that a graph was traced from, in torch."""

    def __init__(self, job: Job, stage: str, precision: str) -> None:
        self.module, feeds, self.outputs = job.traced(stage, DTYPES[precision])
        self.inputs, self.runtime = list(feeds), f"torch {torch.__version__}, CPU, {precision}"

    @torch.inference_mode()
    def __call__(self, feeds: Tensors) -> Tensors:
        values = self.module(*(feeds[name] for name in self.inputs))
        return dict(zip(self.outputs, values if isinstance(values, tuple) else (values,), strict=True))


def usual_device(manifest: Manifest) -> str:
    if not installed("onnxruntime"):
        return "cpu"
    import onnxruntime as ort

    return "cuda" if torch.cuda.is_available() and "CUDAExecutionProvider" in ort.get_available_providers() else "cpu"


def open_stage(path: Path, stage: str, manifest: Manifest, device: torch.device) -> Stage:
    """A graph in onnxruntime; on a CPU in OpenVINO where that alone is installed, or the graph is in bfloat16."""
    precision = manifest.precision[stage]
    alone = not installed("onnxruntime") and precision in ("fp32", "fp16")
    if device.type == "cpu" and installed("openvino") and (precision == "bf16" or alone):
        from .openvino import OpenVINOStage

        return OpenVINOStage(path, manifest.batch.most, "bf16" if precision == "bf16" else "fp32")
    require(EXTRA, "onnxruntime")
    return OnnxStage(path, precision, device)


def sources(path: Path) -> set[str]:
    """What a graph reads beside itself, by names relative to its folder."""
    return external_files(path)


class OnnxStage(Stage):
    """A graph in onnxruntime; on a GPU its inputs and outputs stay there."""

    def __init__(self, path: Path, precision: str, device: torch.device) -> None:
        import onnxruntime as ort

        cuda = device.type == "cuda"
        if cuda and "CUDAExecutionProvider" not in ort.get_available_providers():
            raise UserError(
                "this onnxruntime has no CUDA: pip install onnxruntime-gpu in its place, or use --device cpu"
            )
        if precision == "bf16" and not cuda:
            raise UserError("onnxruntime has no bfloat16 on a CPU: pip install 'ddfast[openvino]', or export fp32")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if precision == "fp8":  # its fusions of Q/DQ make products of integers, which fp8 is not
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.intra_op_num_threads = torch.get_num_threads()
        provider = ("CUDAExecutionProvider", {"device_id": str(device.index or 0)}) if cuda else "CPUExecutionProvider"
        with refused(path):
            self.session = ort.InferenceSession(str(path), options, providers=[provider])
        if cuda and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise UserError("onnxruntime could not start CUDA on this GPU; see its message above, or use --device cpu")
        self.runtime = f"onnxruntime {ort.__version__}, {'CUDA' if cuda else 'CPU'}"
        self.device, self.path = device, path
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, feeds: Tensors) -> Tensors:
        if self.device.type == "cpu":
            with refused(self.path):
                values = self.session.run(self.outputs, {name: feeds[name].numpy() for name in self.inputs})
            return {name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)}
        return self.on_gpu(feeds)

    def on_gpu(self, feeds: Tensors) -> Tensors:
        binding = self.session.io_binding()
        index = self.device.index or 0
        feeds = {name: feeds[name].contiguous() for name in self.inputs}
        for name, value in feeds.items():
            kind = np.int64 if value.dtype == torch.int64 else np.float32
            binding.bind_input(name, "cuda", index, kind, list(value.shape), value.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, "cuda", index)
        torch.cuda.current_stream(self.device).synchronize()
        with refused(self.path):
            self.session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return {
            name: torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
            for name, value in zip(self.outputs, values, strict=True)
        }
