"""A model repository that NVIDIA's Triton Inference Server loads as it is: ``tritonserver --model-repository=OUT``.

The model is called ddfast. It takes ``label`` int64 [B, 1] and ``noise`` float32 [B, L, C] and gives ``image`` float32
[B, 3, H, W] in [0, 1]; the server gathers requests into batches. A graph that makes its noise (``label`` and ``sample``
int64 [B], ``seed`` int64 [1]), or whose batch is fixed, is given whole batches: seeds are not gathered.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddfast.errors import UserError

from . import onnx
from .engine import Engine, Stage
from .manifest import Manifest

if TYPE_CHECKING:
    from .build import Job

PRECISIONS = onnx.PRECISIONS
EXTRA = onnx.EXTRA
PACKAGES = onnx.PACKAGES
LAYOUTS = ("whole",)
MODEL = "ddfast"
BACKENDS = {"onnxruntime": "onnx", "tensorrt": "plan"}
"""Triton's name of what runs the model, and how its file ends."""
INSTANCES = ("auto", "cpu", "gpu")

CLIENT = """\
import numpy as np
import tritonclient.http as triton  # pip install tritonclient[http]

client = triton.InferenceServerClient("localhost:8000")
shape = client.get_model_config("ddfast")["input"][1]["dims"]  # L and C, as config.pbtxt has them
labels = np.array([[3], [7]])
noise = np.random.default_rng(0).standard_normal((len(labels), *map(int, shape)), dtype=np.float32)
inputs = [triton.InferInput("label", labels.shape, "INT64"), triton.InferInput("noise", noise.shape, "FP32")]
for value, array in zip(inputs, (labels, noise)):
    value.set_data_from_numpy(array)
images = client.infer("ddfast", inputs).as_numpy("image")  # float32 [2, 3, H, W] in [0, 1]
"""
"""A client of a graph that takes noise."""


def FILES(job: Job) -> str:  # noqa: N802 - what other targets have as a constant
    return f"{MODEL}/1/{{}}.{BACKENDS[backend_of(job)]}"


def backend_of(job: Job) -> str:
    return job.options.get("backend") or "onnxruntime"


def check(job: Job) -> None:
    """Raise UserError for what the server cannot run.

    Options: ``backend``, "onnxruntime" (by default) or "tensorrt", whose engine is built here for this GPU, with that
    target's options; ``instance``, "cpu", "gpu" or "auto" (by default): a GPU where the server has one.
    """
    backend, instance = backend_of(job), instance_of(job)
    if backend not in BACKENDS:
        raise UserError(f"triton-server has no backend {backend!r}; use {' or '.join(BACKENDS)}")
    if instance not in INSTANCES:
        raise UserError(f"an instance of the server's model is on {', '.join(INSTANCES)}, not on {instance!r}")
    if instance == "cpu" and (backend == "tensorrt" or job.precision == "bf16"):
        what = "TensorRT runs" if backend == "tensorrt" else "onnxruntime has bfloat16"
        raise UserError(f"{what} on GPUs only; use --instance gpu")
    if job.batch.least > 1 and not job.batch.fixed:
        raise UserError(
            f"the server sends batches of 1 and more, not of {job.batch.least}; use --batches "
            f"1,{job.batch.best},{job.batch.most}, or one number"
        )
    if backend == "tensorrt":
        from . import tensorrt

        if job.precision not in tensorrt.PRECISIONS:
            raise UserError(f"TensorRT has no {job.precision} here; use {', '.join(tensorrt.PRECISIONS)}")
        if job.options.get("script"):
            raise UserError("--script is for --to tensorrt; its engine goes to ddfast/1/model.plan of a repository")
        tensorrt.check(job)


def instance_of(job: Job) -> str:
    """Where the server runs the model; on a GPU in any case where a CPU could not."""
    only_gpu = backend_of(job) == "tensorrt" or job.precision == "bf16"
    return str(job.options.get("instance") or ("gpu" if only_gpu else "auto"))


def build(job: Job) -> dict[str, Any]:
    """The graph or engine, and the server's config.pbtxt; returns what they were built with."""
    backend = backend_of(job)
    path = job.folder / job.stages(FILES(job))["whole"]
    path.parent.mkdir(parents=True)
    if backend == "tensorrt":
        from . import tensorrt

        facts = tensorrt.build(job)
        (job.folder / job.stages(tensorrt.FILES)["whole"]).rename(path)
    else:
        job.progress("whole to ONNX")
        onnx.export_stage(job, "whole", path, job.precision)
        facts = {"opset": onnx.OPSETS[job.precision]} | onnx.versions()
    (job.folder / MODEL / "config.pbtxt").write_text(config(job))
    return facts | {"backend": backend, "instance": instance_of(job)}


def config(job: Job) -> str:
    """The text of config.pbtxt."""
    shapes, batch, side = job.shapes, job.batch, job.shapes.image_size
    gathered = not (job.seeded or batch.fixed)
    first = [] if gathered else [batch.most if batch.fixed else -1]  # without gathering, dims count the batch too
    scalar = "dims: [ 1 ] reshape { shape: [ ] }" if gathered else f"dims: {first}"
    inputs = [f'name: "label" data_type: TYPE_INT64 {scalar}']
    if job.seeded:
        inputs += ['name: "seed" data_type: TYPE_INT64 dims: [ 1 ]', f'name: "sample" data_type: TYPE_INT64 {scalar}']
    else:
        inputs += [f'name: "noise" data_type: TYPE_FP32 dims: {[*first, shapes.tokens, shapes.channels]}']
    outputs = [f'name: "image" data_type: TYPE_FP32 dims: {[*first, 3, side, side]}']
    if backend_of(job) == "tensorrt":  # an engine keeps its second output
        outputs += [f'name: "embeddings" data_type: TYPE_FP32 dims: {[*first, shapes.tokens, shapes.channels]}']
    lines = [
        f"# {job.model.name}, {job.precision}, timesteps {', '.join(map(str, job.timesteps))}",
        f"# {onnx.labels_allowed(shapes.num_classes)}",
        f'name: "{MODEL}"',
        f'backend: "{backend_of(job)}"',
        f"max_batch_size: {batch.most if gathered else 0}",
        *(f"input {{ {value} }}" for value in inputs),
        *(f"output {{ {value} }}" for value in outputs),
        f"instance_group {{ kind: KIND_{instance_of(job).upper()} count: 1 }}",
        "version_policy { latest { num_versions: 1 } }",
    ]
    if gathered:
        preferred = sorted({batch.best, batch.most})
        lines.append(f"dynamic_batching {{ preferred_batch_size: {preferred} }}")
    return "\n".join(lines) + "\n"


def seal(folder: Path, manifest: Manifest) -> None:
    if manifest.built["backend"] == "onnxruntime":
        onnx.seal(folder, manifest)


# Running it here, without the server


def stand_in(job: Job, manifest: Manifest) -> Engine | None:
    return onnx.stand_in(job, manifest) if backend_of(job) == "onnxruntime" else None


def sources(path: Path) -> set[str]:
    return onnx.sources(path) if path.suffix == ".onnx" else set()


def usual_device(manifest: Manifest) -> str:
    return "cuda" if manifest.built["backend"] == "tensorrt" else onnx.usual_device(manifest)


def open_stage(path: Path, stage: str, manifest: Manifest, device: torch.device) -> Stage:
    """The server's model in onnxruntime or TensorRT of this process; see their ``open_stage``."""
    if manifest.built["backend"] == "tensorrt":
        from . import tensorrt

        return tensorrt.open_stage(path, stage, manifest, device)
    return onnx.open_stage(path, stage, manifest, device)
