"""OpenVINO: the fastest on CPUs. The trunk in float32, whose tokens stay torch's, and the decoder in bfloat16."""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddfast.errors import UserError, reason

from . import onnx
from .engine import Stage, Tensors, require
from .manifest import Batch, Manifest
from .openvino_int8 import GROUP, calibration, input_ranges, quantize_convolutions, quantize_linears
from .rewrite import fold_upsampling, norm_by_channels

if TYPE_CHECKING:
    from .build import Job

PRECISIONS = ("mixed", "fp32", "bf16", "int8")
LAYOUTS = ("pair",)  # types of their own, and batches of their own
EXTRA = "openvino"
PACKAGES = ("onnx", "onnxscript", "openvino")
FILES = "{}.xml"
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # of int8, what is between its products
EXACT = 1 << 24  # integers below it are float32, as which OpenVINO takes int64
AT_ONCE = {"trunk": 8, "decoder": 1}
"""Images that a stage computes together: on a CPU more are no faster, and cost memory."""


def precision_of(precision: str, stage: str) -> str:
    if precision == "mixed":
        return "bf16" if stage == "decoder" else "fp32"
    return precision


def build(job: Job) -> dict[str, Any]:
    """Write ``STAGE.xml`` and ``STAGE.bin``; the ONNX on the way is removed. Weights of a bfloat16 stage are stored in
    float16: finer than bfloat16 from 6e-5 on, rounded to multiples of 6e-8 below."""
    import openvino as ov

    layers: dict[str, int] = {}
    for stage, name in job.stages(FILES).items():
        path = job.folder / f"{stage}.onnx"
        job.progress(f"{stage} to OpenVINO")
        onnx.export_stage(replace(job, batch=Batch()), stage, path, "fp32")  # its graphs take any batch
        model = ov.Core().read_model(path)
        if stage == "decoder":
            fold_upsampling(model)
            norm_by_channels(model)
        half = precision_of(job.precision, stage) != "fp32"
        if job.precision == "int8":
            layers[stage] = quantized(job, stage, model)
        ov.save_model(model, job.folder / name, compress_to_fp16=half)
        del model  # it maps the files
        for file in job.folder.glob(f"{path.name}*"):
            file.unlink()
    facts: dict[str, Any] = {name: version(name) for name in ("torch", "onnx", "openvino")}
    return facts | ({"int8_layers": layers} if layers else {})


def quantized(job: Job, stage: str, model: Any) -> int:
    """Put int8 into a stage's graph; returns in how many layers."""
    if stage == "trunk":
        return quantize_linears(model)
    job.progress("int8 calibration of the decoder")
    return quantize_convolutions(model, input_ranges(model, calibration(job.model, job.timesteps)))


def sources(path: Path) -> set[str]:
    """What a graph reads beside itself."""
    return {path.with_suffix(".bin").name}


def open_stage(path: Path, stage: str, manifest: Manifest, device: torch.device) -> Stage:
    if device.type != "cpu":
        raise UserError(f"this folder runs on CPUs, not on {device}; use --device cpu, or export with --to tensorrt")
    require(EXTRA, "openvino")
    return OpenVINOStage(path, AT_ONCE[stage], manifest.precision[stage])


class OpenVINOStage(Stage):
    """A graph in OpenVINO on the CPU, with as many threads as torch has.

    OpenVINO packs the weights when a batch size is first seen, and reads the file no more, but leaves it in memory:
    its pages are given back.
    """

    def __init__(self, path: Path, at_once: int, precision: str) -> None:
        import openvino as ov

        self.weights, self.at_once = path.with_suffix(".bin"), at_once
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],  # its own choice is bfloat16 wherever the CPU has it
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        if precision == "int8":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP
        with pages_returned(self.weights):
            try:
                self.model = ov.Core().compile_model(path, "CPU", settings)
            except RuntimeError as error:
                told = RuntimeError("\n".join(reversed(str(error).splitlines())))  # the last line says most
                raise UserError(f"OpenVINO refuses {path}: {reason(told)}") from error
        self.request = self.model.create_infer_request()
        self.seen: set[int] = set()
        used = str(self.model.get_property("INFERENCE_PRECISION_HINT").get_type_name())  # a CPU may lack bfloat16
        kinds = f"int8 and {used}" if precision == "int8" else used
        self.runtime = f"OpenVINO {version('openvino')}, CPU, {kinds}"
        self.inputs = [value.any_name for value in self.model.inputs]
        self.outputs = [value.any_name for value in self.model.outputs]

    def __call__(self, feeds: Tensors) -> Tensors:
        for name in {"seed", "sample"} & feeds.keys() & set(self.inputs):
            if int(feeds[name].max()) >= EXACT:
                raise UserError(
                    f"a {name} of {int(feeds[name].max())} is more than OpenVINO's float32 holds: noise made in the "
                    "graph needs numbers below 2^24; export without --noise-in-graph"
                )
        given = {name: feeds[name].contiguous() for name in self.inputs}
        rows = len(given["embeddings" if "embeddings" in given else "label"])
        parts = []
        for first in range(0, rows, self.at_once):
            last = min(rows, first + self.at_once)
            part = {name: t.numpy() if name == "seed" else t[first:last].numpy() for name, t in given.items()}
            parts.append(self.run(part, last - first))
        return {name: torch.cat([part[name] for part in parts]) for name in self.outputs}

    def run(self, feeds: dict[str, Any], rows: int) -> Tensors:
        if rows in self.seen:
            values = self.request.infer(feeds, share_inputs=True)
        else:
            with pages_returned(self.weights):
                values = self.request.infer(feeds, share_inputs=True)
            self.seen.add(rows)
        return {name: torch.from_numpy(values[name]) for name in self.outputs}


class pages_returned:  # noqa: N801 - a context manager
    """Gives a mapped file's pages back to the system, every so often while something reads it, and at the end.

    They are read again if they are needed. Only on Linux; elsewhere the file stays in memory.
    """

    EVERY = 0.1  # seconds

    def __init__(self, path: Path) -> None:
        self.path, self.done = str(path.resolve()), threading.Event()

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    def work(self) -> None:
        while not self.done.wait(self.EVERY):
            self.give_back()
        self.give_back()

    def give_back(self) -> None:
        if sys.platform != "linux":
            return
        with suppress(OSError):
            maps = Path("/proc/self/maps").read_text().splitlines()
            libc = ctypes.CDLL(None)
            for line in maps:
                fields = line.split(maxsplit=5)  # range, mode, offset, device, inode, path
                if len(fields) == 6 and fields[5] == self.path and "w" not in fields[1]:
                    begin, end = (int(word, 16) for word in fields[0].split("-"))
                    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4)  # MADV_DONTNEED
