"""TensorRT for RTX: engines for GeForce and RTX GPUs, built ahead of time on any machine.

The runtime compiles them for the GPU it meets, when they are first run there.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddfast.errors import UserError

from . import trt_common as common
from .engine import Engine, Stage, require
from .manifest import Manifest
from .tensorrt import check_options, set_workspace
from .tensorrt import precision_of as precision_of

if TYPE_CHECKING:
    from .build import Job

PRECISIONS = ("fp16", "bf16", "fp32", "fp8")
EXTRA = "tensorrt-rtx"
PACKAGES = ("tensorrt_rtx",)
FILES = "{}.rtx"
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""GPUs that it knows: Turing, Ampere, Ada and Blackwell; not Hopper."""
USUAL = ("8.0", "8.6", "8.9", "12.0")
LATEST = "12.0"
"""An engine for it runs on what comes after, too."""


def capabilities(job: Job) -> tuple[str, ...]:
    """The option ``compute_capabilities``, rising; by default those of ``USUAL`` that have the precision."""
    chosen: Sequence[str] | None = job.options.get("compute_capabilities")
    if chosen:
        return tuple(sorted(set(chosen), key=common.number))
    least = common.LEAST_CAPABILITY.get(job.precision, USUAL[0])
    return tuple(c for c in USUAL if common.number(c) >= common.number(least))


def check(job: Job) -> None:
    """Raise UserError for GPUs that no engine can be built for. Options: ``compute_capabilities``, such as
    ("8.9", "12.0"), and ``workspace``, ``fp8_bar``, ``fp8_images``, see :mod:`ddfast.export.tensorrt`."""
    require(EXTRA, "onnx", "onnxscript", "onnxruntime")
    check_options(job.options)
    for capability in capabilities(job):
        if capability not in CAPABILITIES:
            raise UserError(
                f"TensorRT-RTX has no compute capability {capability!r}; use {', '.join(CAPABILITIES)}, or --to "
                "tensorrt"
            )
        common.check_capability(job.precision, capability)


def package() -> Any:
    require(EXTRA, *PACKAGES)
    return importlib.import_module("tensorrt_rtx")


def build(job: Job) -> dict[str, Any]:
    """An engine for each stage; no GPU is needed. Their graphs stay until :func:`seal`."""
    trt, chosen = package(), capabilities(job)
    graphs, facts = common.write_graphs(job)

    def configure(config: Any) -> None:
        set_workspace(trt, job.options, config)
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else a call may allocate, and cannot be captured
        config.num_compute_capabilities = len(chosen)
        for place, capability in enumerate(chosen):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), place)

    built = {}
    for stage, name in job.stages(FILES).items():
        job.progress(f"{stage} to TensorRT-RTX {trt.__version__} for compute capabilities {', '.join(chosen)}")
        shapes = common.profile(job, stage)
        built[stage] = common.build_engine(trt, graphs[stage], job.folder / name, shapes, configure)
    return facts | {
        "tensorrt_rtx": trt.__version__,
        "compute_capabilities": list(chosen),
        "profile": common.profiles(job),
        "engines": built,
    }


def stand_in(job: Job, manifest: Manifest) -> Engine | None:
    """What is compared with torch in place of the engine, where there is no GPU for it: its graphs."""
    if torch.cuda.is_available() and runs_on(common.capability(torch.device("cuda")), capabilities(job)):
        return None
    graphs = {stage: job.folder / common.GRAPHS / name for stage, name in job.stages("{}.onnx").items()}
    return common.graph_engine(job, manifest, graphs)


def seal(folder: Path, manifest: Manifest) -> None:
    shutil.rmtree(folder / common.GRAPHS)


# Running


def usual_device(manifest: Manifest) -> str:
    return "cuda"


def runs_on(capability: str, built: Sequence[str]) -> bool:
    """Whether a GPU runs engines for the compute capabilities ``built``."""
    return capability in built or (LATEST in built and common.number(capability) > common.number(LATEST))


def open_stage(path: Path, stage: str, manifest: Manifest, device: torch.device) -> Stage:
    """An engine's file, ready to run on ``device``.

    Raises UserError for a GPU that it is not for, or another version than built it, before it is read.
    """
    device = common.check_device(path, device)
    compute, built = common.capability(device), manifest.built["compute_capabilities"]
    if not runs_on(compute, built):
        raise UserError(
            f"{path} is for compute capabilities {', '.join(built)}, and {torch.cuda.get_device_name(device)} has "
            f"{compute}; export again with --compute-capabilities, or --to tensorrt"
        )
    trt = package()
    common.check_version(path, "TensorRT-RTX", manifest.built["tensorrt_rtx"], trt.__version__)
    return common.EngineStage(trt, path, manifest.batch, device, lambda engine: make_context(trt, engine))


def make_context(trt: Any, engine: Any) -> Any:
    """Kernels of a batch size are compiled when it is first met, none later: a captured graph holds the final ones."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)
