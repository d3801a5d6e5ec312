"""What is made once a test run, however many workers it has: traced graphs and compiled kernels, by their content."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # torch brings it along


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One for all workers of a run, and of no other run."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, key: str, make: Callable[[Path], object]) -> Path:
    """A file that ``make`` writes if no worker has yet; others wait for it."""
    path = folder / key
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            part = path.with_suffix(".part")
            make(part)
            part.replace(path)
    return path


class _ByContent(pickle.Pickler):
    """Pickles equal things equally in every process: tensors by their values, sets in order, each string by itself.

    Equal tensors may lie in different storages, and equal strings be one object here and two there.
    """

    def persistent_id(self, value: Any) -> str | None:
        if isinstance(value, str):
            return f"str {value}"
        if isinstance(value, set | frozenset):
            return f"set {sorted(map(repr, value))}"
        if not isinstance(value, torch.Tensor):
            return None
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        facts = (type(value).__name__, value.dtype, tuple(value.shape), value.requires_grad)
        return repr((*facts, hashlib.sha256(data).hexdigest()))


def digest(*parts: object) -> str:
    """Of a module, say: its class, attributes and weights, and those of all it holds."""
    data = io.BytesIO()
    _ByContent(data, protocol=4).dump(parts)
    return hashlib.sha256(data.getbuffer()).hexdigest()


def traced_once(folder: Path) -> Callable[..., Any]:
    """``torch.onnx.export`` that traces a module with the same inputs and options only once a run.

    What a module calls is no part of it: a test that patches such a function must trace a module of its own.
    """
    trace = torch.onnx.export

    def export(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> Any:
        import onnx_ir

        key = digest(module, inputs, repr(sorted(options.items()))) + ".onnx"
        made: list[Any] = []

        def write(path: Path) -> None:
            made.append(trace(module, inputs, **options))
            made[0].save(str(path))

        path = once(folder, key, write)
        return made[0] if made else torch.onnx.ONNXProgram(onnx_ir.load(path, format="protobuf"), None)

    return export
