"""What figures were measured on, without naming a machine."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch

from . import _library, _native


def cpu_name() -> str:
    """Such as "AMD EPYC (Zen 5)": the maker's name, with the generation where the name alone does not give it."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    fourth = "avx512f" in fields.get("flags", "").split()
    generations = {"23": "Zen 1-2", "25": "Zen 4" if fourth else "Zen 3", "26": "Zen 5"}
    generation = generations.get(fields.get("cpu family", ""))
    return f"{name} ({generation})" if generation and "AMD" in name else name


def kernels(device: torch.device) -> str:
    """Which compiled code the fused operations take on a device, for people."""
    if device.type == "cpu":
        return f"C++ for {_native.cpu_levels()[0]}" if _native.available() else "none, plain torch"
    found = (["CUDA"] if _native.cuda_built() else []) + (["Triton"] if _library.has_triton() else [])
    return " and ".join(found) or "none, plain torch"


def missing_kernels(device: torch.device) -> str | None:
    """What keeps a device from its fast path, and the remedy; None where nothing does."""
    if device.type == "cpu":
        if _native.available():
            return None
        return (
            "ddfast was installed without its C++ code, so plain torch does its work several times more slowly: "
            "install a C++ compiler and Python's headers (apt install g++ python3-dev), then ddfast again"
        )
    lack = [] if _native.cuda_built() else ["its CUDA kernels: install the CUDA toolkit (nvcc), then ddfast again"]
    lack += [] if _library.has_triton() else ["Triton: pip install 'ddfast[triton]'"]
    return f"on this GPU plain torch does, more slowly, the work of {'; and of '.join(lack)}" if lack else None


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on a device, and the remedy; None where it can compile."""
    kind, variable, *compilers = ("C++", "CXX", "g++", "clang++") if device.type == "cpu" else ("C", "CC", "gcc", "cc")
    named = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([named] if named else compilers)):
        return f"torch.compile needs a {kind} compiler and finds none: apt install {compilers[0]}, or set {variable}"
    if device.type == "cuda" and not _library.has_triton():
        return "torch.compile needs Triton on a GPU: pip install 'ddfast[triton]'"
    return None
