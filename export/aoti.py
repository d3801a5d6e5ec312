"""AOTInductor: a student as a compiled library in a .pt2 file, for C++ programs and for Python.

A file is for the kind of device that it was compiled for: any CPU with the same instructions, or one kind of GPU.
``examples/aoti`` holds a C++ program that runs it.
"""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddfast.errors import UserError, WorkError, reason

from .engine import Stage, Tensors
from .manifest import Manifest

if TYPE_CHECKING:
    from .build import Job

PRECISIONS = ("fp32", "bf16", "fp16")
EXTRA = "export"
PACKAGES = ()  # torch brings all of it, but for the C++ compiler
FILES = "{}.pt2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
OUTPUTS = {"whole": ("image", "embeddings"), "trunk": ("embeddings",), "decoder": ("image",)}
OPTIONS = {
    "cpp.dynamic_threads": True,  # as many as torch has when it runs, not when it was compiled
    "aot_inductor.precompile_headers": False,  # longer than what they save in one compilation
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",  # it only calls kernels: no slower, compiled in a third of the time
}


def check(job: Job) -> None:
    """Raise UserError where nothing can be compiled. Option: ``device``, "cpu" or "cuda", the model's by default."""
    device = device_of(job)
    if device not in DEVICES:
        raise UserError(f"aoti has no device {device!r}; use {' or '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("aoti compiles for the GPU that is there, and torch sees no CUDA GPU here; use --device cpu")
    if device == "cpu" and job.precision == "fp16":
        raise UserError("fp16 on a CPU is slower than fp32; use --precision bf16 or fp32, or --device cuda")
    check_compiler()


def device_of(job: Job) -> str:
    return job.options.get("device") or job.model.device.type


def check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "aoti needs a C++ compiler and finds none: install g++ (apt install g++), or name one in CXX"
        ) from None


def build(job: Job) -> dict[str, Any]:
    """A compiled file for each stage; returns what it was built with and which device it is for."""
    device = torch.device(device_of(job))
    for stage, name in job.stages(FILES).items():
        job.progress(f"{stage} to AOTInductor for {'this GPU' if device.type == 'cuda' else 'CPUs like this one'}")
        compile_stage(job, stage, job.folder / name, device)
    return {"torch": torch.__version__, "device": device.type, device.type: facts_of(device)}


def compile_stage(job: Job, stage: str, path: Path, device: torch.device) -> None:
    """One stage as a file, its inputs and outputs in the order of ``job.traced``, in float32 and int64.

    C++ programs find their names and the shapes of ``job`` in its metadata, e.g. "ddfast.inputs" and "ddfast.tokens".

    Raises:
        WorkError: the compiler refuses the code.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError
    from torch._inductor.utils import fresh_cache

    module, feeds, _ = job.traced(stage, DTYPES[job.precision])
    module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts = {"inputs": ",".join(feeds), "outputs": ",".join(OUTPUTS[stage]), "least_batch": job.batch.least}
    facts |= asdict(job.shapes)
    chosen = options() | {"aot_inductor.metadata": {f"ddfast.{name}": str(value) for name, value in facts.items()}}
    vector_flags()  # its trial compilations are kept for the next time, out of the cache that is thrown away
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module,
            tuple(value.to(device) for value in feeds.values()),
            dynamic_shapes=job.dynamic_shapes(stage, feeds),
        )
        try:
            with fresh_cache(dir=str(job.folder.resolve())):
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=chosen)
        except CppCompileError as error:
            raise WorkError(f"the C++ compiler refused what AOTInductor wrote: {str(error)[-1000:]}") from error


def options() -> dict[str, Any]:
    return OPTIONS | ({"cpp.march": ""} if names_its_flags() else {})


def names_its_flags() -> bool:
    """Whether code can be compiled for the instructions it was vectorised with, not for all that this CPU has."""
    from torch._inductor import list_options

    return platform.machine() == "x86_64" and "cpp.march" in list_options()


def facts_of(device: torch.device) -> dict[str, Any]:
    """A GPU's name and compute capability, or a CPU's architecture and those of its instructions that are used."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"name": torch.cuda.get_device_name(device), "compute_capability": f"{major}.{minor}"}
    flags = vector_flags() if names_its_flags() else cpu_flags()
    return {"machine": platform.machine(), "flags": sorted(flags)}


def vector_flags() -> set[str]:
    """Instructions that inductor vectorises for, as :func:`cpu_flags` spells them."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {flag.replace("-", "") for flag in re.findall(r"-m([\w-]+)", pick_vec_isa().build_arch_flags())}


def cpu_flags() -> set[str]:
    """Instructions of this CPU, e.g. "avx2" and "avx512vnni"; none where the system is not Linux."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return set(found[1].replace("_", "").split()) if found else set()


# Running


def usual_device(manifest: Manifest) -> str:
    return str(manifest.built["device"])


def check_device(path: Path, built: Mapping[str, Any], device: torch.device) -> None:
    """Raise UserError unless ``device`` runs what was compiled for ``built``."""
    kind = built["device"]
    if device.type != kind:
        raise UserError(f"{path} was compiled for {kind}, not for {device.type}; use --device {kind}, or export again")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{path} was compiled for a GPU ({built['cuda']['name']}), and torch sees none here")
    want = built[kind]
    if kind == "cuda":
        have = facts_of(device)
        if have != want:
            there, here = (f"{gpu['name']} (compute capability {gpu['compute_capability']})" for gpu in (want, have))
            raise UserError(f"{path} was compiled for {there}, and this is {here}; export again here")
        return
    if want["machine"] != platform.machine():
        raise UserError(
            f"{path} was compiled for {want['machine']}, and this is {platform.machine()}; export again here"
        )
    lacking = sorted(set(want["flags"]) - cpu_flags())
    if lacking:
        raise UserError(
            f"{path} was compiled for a CPU with {', '.join(lacking)}, which this one lacks; export again here"
        )


def open_stage(path: Path, stage: str, manifest: Manifest, device: torch.device) -> Stage:
    """A compiled file, ready to run on ``device``.

    Raises UserError for a device that it was not compiled for, and a torch that cannot load it.
    """
    check_device(path, manifest.built, device)
    return AotiStage(path, stage, manifest, device)


class AotiStage(Stage):
    """A compiled library in this process; it uses torch's threads, or the current CUDA stream."""

    def __init__(self, path: Path, stage: str, manifest: Manifest, device: torch.device) -> None:
        from torch._inductor import aoti_load_package

        try:
            self.model: Any = aoti_load_package(str(path), device_index=-1 if device.index is None else device.index)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"torch {torch.__version__} cannot load {path}, which torch {manifest.built['torch']} compiled "
                f"({reason(error)}); export again here"
            ) from error
        self.runtime, self.device = f"AOTInductor, torch {torch.__version__}, {device.type.upper()}", device
        self.inputs = ("embeddings",) if stage == "decoder" else manifest.inputs
        self.outputs = OUTPUTS[stage]

    def __call__(self, feeds: Tensors) -> Tensors:
        values = self.model(*(feeds[name].contiguous() for name in self.inputs))  # it takes their strides for granted
        return dict(zip(self.outputs, [values] if torch.is_tensor(values) else values, strict=True))
