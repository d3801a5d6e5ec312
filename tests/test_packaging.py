"""What a user gets by installing: version, data files, light imports, life without the extension, make's advice."""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import ddfast
from ddfast import _native
from ddfast.heap import keep_freed_memory
from ddfast.noise import normal_noise

ROOT = Path(__file__).parent.parent


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, away from the source folder."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sys.prefix)


def test_installed_version_is_the_one_in_the_source() -> None:
    try:
        installed = importlib.metadata.version("ddfast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ddfast is used from its source folder, not installed")
    assert installed == ddfast.__version__


def test_package_holds_types_and_weights() -> None:
    package = files("ddfast")
    assert (package / "py.typed").is_file()
    weights = [Path(str(f)) for f in (package / "weights").iterdir() if f.name.endswith(".safetensors")]
    assert weights
    assert sum(f.stat().st_size for f in weights) < 4.5e6
    for file in weights:
        with safe_open(file, "pt") as f:
            assert len(f.keys()) > 0


@pytest.mark.parametrize("module", ["ddfast", "ddfast.cli"])
def test_import_is_light_and_quiet(module: str) -> None:
    run = python(
        "import sys, torch, numpy; before = set(sys.modules);"  # what torch brings along is not ours
        f"import {module};"
        "heavy = {'triton', 'tensorrt', 'sklearn', 'scipy', 'matplotlib', 'onnx', 'torchvision'};"
        "sys.exit(' '.join(heavy & (sys.modules.keys() - before)) or 0)"
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_everything_but_speed_is_there_without_the_extension() -> None:
    run = python(
        "import sys, torch; sys.modules['ddfast._C'] = None\n"
        "import ddfast\n"
        "from ddfast import _native\n"
        "from ddfast.noise import normal_noise\n"
        "assert not _native.available() and not _native.cuda_built() and _native.cpu_levels() == []\n"
        "print(normal_noise(3, torch.arange(2), 0, 2, 3).view(torch.int32).flatten().tolist())"
    )
    assert run.returncode == 0, run.stderr
    want = normal_noise(3, torch.arange(2), 0, 2, 3).view(torch.int32).flatten().tolist()
    assert run.stdout.strip() == str(want)


def test_a_broken_extension_is_an_error_not_a_slow_run() -> None:
    run = python(
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'ddfast._C': raise ImportError('undefined symbol: oops')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from ddfast import _native"
    )
    assert run.returncode != 0 and "undefined symbol: oops" in run.stderr


TOOLS = {
    "python": ({}, "nopython is missing: on Debian or Ubuntu, apt install python3 python3-venv"),
    "version": ({"nopython": "case $2 in *version_info*) exit 1;; esac"}, "apt install python3.11 python3.11-venv"),
    "venv": ({"nopython": "case $2 in *ensurepip*) exit 1;; esac"}, "apt install python3-venv"),
    "compiler": ({"nopython": "exit 0"}, "a C++ compiler is missing: on Debian or Ubuntu, apt install g++"),
}


@pytest.mark.skipif(shutil.which("make") is None or not (ROOT / "Makefile").exists(), reason="needs make and its file")
@pytest.mark.parametrize("missing", TOOLS)
def test_make_says_in_one_line_what_is_missing(missing: str, tmp_path: Path) -> None:
    stubs, advice = TOOLS[missing]
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "sh", "find", "sed"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name, body in stubs.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "csrc").mkdir()
    (tmp_path / "ddfast").mkdir()
    (tmp_path / "ddfast" / "__init__.py").touch()
    command = [tools / "make", "PYTHON=nopython", "test"]
    run = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("make")]
    assert run.returncode != 0 and run.stdout == ""
    assert len(lines) == 1 and advice in lines[0]
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(not _native.cuda_built() or torch.cuda.is_available(), reason="CUDA kernels, and no GPU")
def test_cuda_kernels_without_a_driver_say_so() -> None:
    """The extension has been imported; only a call needs the driver, and is refused by name."""
    with pytest.raises(RuntimeError, match="CUDA: .*(driver|device)"):
        _native._C.swiglu_cuda(0, 1, 8, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="tells of glibc")
def test_glibc_is_told_to_keep_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to map large blocks apart nor to trim the heap. What that saves depends on the heap: see bench_train."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *option: told.append(option)))
    keep_freed_memory()
    assert told == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
