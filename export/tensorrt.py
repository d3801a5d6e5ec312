"""TensorRT 11: engines for the NVIDIA GPU that builds them, and scripts that build them elsewhere.

tensorrt is imported once a GPU has been seen: without one its builder ends the process. Its networks are strongly
typed: precision is that of the ONNX graph.

    python -m ddfast.export.tensorrt FOLDER    # behind build.sh: records the GPU and TensorRT that made the engine
"""

from __future__ import annotations

import importlib
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddfast.errors import UserError
from ddfast.files import check_file, home, is_file

from . import trt_common as common
from .engine import Engine, Stage, require
from .manifest import Manifest, list_files, read_manifest
from .trust import remember

if TYPE_CHECKING:
    from .build import Job

PRECISIONS = ("fp16", "bf16", "fp32", "fp8")
EXTRA = "tensorrt"
PACKAGES = ()  # tensorrt is looked for behind the GPU, and not for a script
FILES = "{}.plan"
SCRIPT = "build.sh"
LEAST_VERSION = 10


def precision_of(precision: str, stage: str) -> str:
    return "fp16" if precision == "fp8" and stage == "decoder" else precision


def check(job: Job) -> None:
    """Raise UserError where no engine can be built.

    Options: ``script``, ``workspace`` in MiB, ``timing_cache``, a file; ``fp8_bar`` and ``fp8_images``, see
    :func:`ddfast.export.fp8.calibrate`.
    """
    require(EXTRA, "onnx", "onnxscript")
    check_options(job.options)
    if job.options.get("script"):
        require("export", "onnxruntime")
        return
    if not torch.cuda.is_available():
        raise UserError(
            "a TensorRT engine is built on the GPU that runs it, and torch sees no CUDA GPU here; --script writes the "
            "graph and the commands to run there"
        )
    require(EXTRA, "tensorrt")
    common.check_capability(job.precision, common.capability(here()))


def check_options(options: Mapping[str, Any]) -> None:
    workspace, bar, images = (options.get(name) for name in ("workspace", "fp8_bar", "fp8_images"))
    if workspace is not None and workspace < 1:
        raise UserError(f"--workspace is {workspace} MiB; use at least 1")
    if bar is not None and not 0 < bar < 1:
        raise UserError(f"--fp8-bar is {bar}; it is a relative error, between 0 and 1")
    if images is not None and images < 1:
        raise UserError(f"--fp8-images is {images}; use at least 1")
    if options.get("timing_cache") and not options.get("script"):
        check_file(Path(options["timing_cache"]), "a timing cache")


def here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def package() -> Any:
    """tensorrt, once a GPU has been seen."""
    if not torch.cuda.is_available():
        raise UserError("tensorrt needs a CUDA GPU, and torch sees none here")
    require(EXTRA, "tensorrt")
    trt = importlib.import_module("tensorrt")
    if int(trt.__version__.split(".")[0]) < LEAST_VERSION:
        raise UserError(f"tensorrt {trt.__version__} is too old; pip install 'ddfast[{EXTRA}]'")
    return trt


def build(job: Job) -> dict[str, Any]:
    """An engine for each stage; with the option ``script``, graphs and a script that builds them."""
    if job.options.get("script"):
        return write_script(job)
    trt, gpu = package(), common.gpu_facts(here())
    graphs, facts = common.write_graphs(job)
    timings = Path(job.options.get("timing_cache") or default_cache(trt.__version__, gpu))
    built = {}
    for stage, name in job.stages(FILES).items():
        job.progress(f"{stage} to TensorRT {trt.__version__} for {gpu['name']}")
        shapes = common.profile(job, stage)
        built[stage] = common.build_engine(
            trt, graphs[stage], job.folder / name, shapes, partial(set_workspace, trt, job.options), timings
        )
    shutil.rmtree(job.folder / common.GRAPHS)
    return facts | {
        "tensorrt": trt.__version__,
        "gpu": gpu,
        "profile": common.profiles(job),
        "engines": built,
    }


def set_workspace(trt: Any, options: Mapping[str, Any], config: Any) -> None:
    if options.get("workspace"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options["workspace"]) << 20)


def default_cache(version: str, gpu: Mapping[str, Any]) -> Path:
    """Timings hold for one GPU and one version."""
    name = "-".join([version, *str(gpu["name"]).lower().split()])
    return (home(".cache", "ddfast") or Path(tempfile.gettempdir())) / f"tensorrt-{name}.timing"


# Elsewhere


def write_script(job: Job) -> dict[str, Any]:
    """The graphs, and ``build.sh``, which makes engines of them on the GPU that is to run them."""
    _, facts = common.write_graphs(job)
    path = job.folder / SCRIPT
    path.write_text(script(job))
    path.chmod(0o755)
    return facts | {"script": SCRIPT, "profile": common.profiles(job)}


def script(job: Job) -> str:
    """What ``build.sh`` holds: the commands of trtexec, and those of Polygraphy."""
    cache = str(job.options.get("timing_cache") or "timing.cache")
    trtexec, polygraphy = [], []
    for stage, plan in job.stages(FILES).items():
        graph, shapes = f"{common.GRAPHS}/{Path(plan).stem}.onnx", common.profile(job, stage)
        workspace = job.options.get("workspace")
        trtexec.append(trtexec_line(graph, plan, shapes, cache, workspace))
        polygraphy.append(polygraphy_line(graph, plan, shapes, cache, workspace))
    lines = [
        "#!/bin/sh",
        f"# Builds {job.model.name} ({job.precision}) on the NVIDIA GPU that is to run it, with TensorRT 11.",
        "#   ./build.sh               by trtexec, which comes with TensorRT",
        "#   ./build.sh polygraphy    by Polygraphy: pip install polygraphy tensorrt",
        "set -eu",
        'cd "$(dirname "$0")"',
        'if [ "${1:-trtexec}" = polygraphy ]; then',
        *(f"  {line}" for line in polygraphy),
        "else",
        *(f"  {line}" for line in trtexec),
        "fi",
        "# Lets `ddfast run`, `bench` and `eval` open this folder: records the GPU and the version.",
        "if python3 -c 'import ddfast' 2>/dev/null; then python3 -m ddfast.export.tensorrt .; fi",
    ]
    return "\n".join(lines) + "\n"


def trtexec_line(graph: str, plan: str, shapes: common.Profile, cache: str, workspace: int | None) -> str:
    words = ["trtexec", f"--onnx={graph}"]
    for place, kind in enumerate(("min", "opt", "max")):
        if shapes:
            each = (f"{name}:{'x'.join(map(str, of[place]))}" for name, of in shapes.items())
            words.append(f"--{kind}Shapes={','.join(each)}")
    words += ["--stronglyTyped", "--noTF32", f"--timingCacheFile={cache}", f"--saveEngine={plan}", "--skipInference"]
    words += [f"--memPoolSize=workspace:{workspace}"] if workspace else []
    return shlex.join(words)


def polygraphy_line(graph: str, plan: str, shapes: common.Profile, cache: str, workspace: int | None) -> str:
    words = ["polygraphy", "convert", graph, "--convert-to", "trt", "--strongly-typed"]
    for place, kind in enumerate(("min", "opt", "max")):
        if shapes:
            words += [f"--trt-{kind}-shapes", *(f"{name}:{compact(of[place])}" for name, of in shapes.items())]
    words += ["--load-timing-cache", cache, "--save-timing-cache", cache]
    words += ["--pool-limit", f"workspace:{workspace}M"] if workspace else []
    return shlex.join([*words, "-o", plan])


def compact(shape: Sequence[int]) -> str:
    return str(list(shape)).replace(" ", "")


def stand_in(job: Job, manifest: Manifest) -> Engine | None:
    """What is compared with torch in place of the engine: a script's graphs."""
    if not job.options.get("script"):
        return None
    graphs = {stage: job.folder / common.GRAPHS / name for stage, name in job.stages("{}.onnx").items()}
    return common.graph_engine(job, manifest, graphs)


def record(folder: Path) -> Manifest:
    """Complete the manifest of a script's folder whose engines have been built, on the GPU that built them.

    Raises UserError for a folder of another kind, or without engines.
    """
    manifest = read_manifest(folder)
    if manifest.target != "tensorrt" or "script" not in manifest.built:
        raise UserError(f"{folder} holds no script of `ddfast export --to tensorrt --script`")
    missing = [file for file in manifest.stages.values() if not is_file(folder / file)]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: run {folder / SCRIPT} first")
    built = {key: value for key, value in manifest.built.items() if key != "script"}
    built |= {"tensorrt": package().__version__, "gpu": common.gpu_facts(here())}
    manifest = replace(manifest, built=built, files=list_files(folder))
    manifest.write(folder)
    remember(manifest)
    return manifest


# Running


def usual_device(manifest: Manifest) -> str:
    return "cuda"


def check_gpu(path: Path, manifest: Manifest, device: torch.device) -> None:
    """Raise UserError where an engine was built for another GPU."""
    gpu = manifest.built.get("gpu")
    if gpu is None:
        raise UserError(
            f"{path} is not known to be of this GPU: run `python -m ddfast.export.tensorrt {path.parent}` where "
            f"{SCRIPT} built it"
        )
    name, compute = torch.cuda.get_device_name(device), common.capability(device)
    if (gpu["name"], gpu["compute_capability"]) != (name, compute):
        raise UserError(
            f"{path} was built on {gpu['name']} (compute capability {gpu['compute_capability']}), and this is {name} "
            f"({compute}); TensorRT engines run on the GPU they are built on: export again here"
        )


def open_stage(path: Path, stage: str, manifest: Manifest, device: torch.device) -> Stage:
    """An engine's file, ready to run on ``device``.

    Raises UserError for another GPU or TensorRT than those that built it, before it is read.
    """
    device = common.check_device(path, device)
    check_gpu(path, manifest, device)
    trt = package()
    common.check_version(path, "TensorRT", manifest.built["tensorrt"], trt.__version__)
    return common.EngineStage(trt, path, manifest.batch, device, lambda engine: make_context(trt, engine))


def make_context(trt: Any, engine: Any) -> Any:
    return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


if __name__ == "__main__":
    try:
        print(f"{sys.argv[1]}: built for {record(Path(sys.argv[1])).built['gpu']['name']}")
    except IndexError:
        sys.exit("usage: python -m ddfast.export.tensorrt FOLDER")
    except UserError as error:
        sys.exit(str(error))
