"""Checkpoints of a run: one file each, whole or absent, from which training goes on bit for bit.

``checkpoints/step-NNNNNNNN.safetensors`` holds ``model.*``, ``ema.*``, ``exp_avg.*`` and ``exp_avg_sq.*`` in float32.
Its metadata entry ``ddfast`` is a JSON object: format, step, what decides the run (``identity``), what decides rounding
alone (``how``), the sums of figures not logged yet (``window``), and a SHA-256 of the tensors. The learning rate, the
order of the pairs and their timesteps are functions of the step, so there is no more state than that.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..files import fsync_folder, remove_abandoned, writing
from ..models.checkpoints import content_hash, read_safetensors
from ..records import differences
from ..tensors import write_tensors

FORMAT = 1
FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{8})\.safetensors")
PARTS = ("model", "ema", "exp_avg", "exp_avg_sq")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"step-{step:08d}.safetensors"


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, rising."""
    found = (NAME.fullmatch(p.name) for p in (folder / FOLDER).glob("step-*"))
    return sorted(int(m[1]) for m in found if m)


def save_checkpoint(
    folder: Path,
    step: int,
    identity: Mapping[str, Any],
    how: Mapping[str, Any],
    window: Sequence[float],
    state: Mapping[str, Mapping[str, Tensor]],
    keep: int,
) -> None:
    """Write one and then delete all but the newest ``keep``.

    ``state`` maps ``PARTS`` to tensors by parameter name, ``how`` says what decides rounding alone, ``window`` are the
    sums of the figures not logged yet.
    """
    assert tuple(state) == PARTS
    path = checkpoint_path(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}.{name}": t for part, named in state.items() for name, t in named.items()}
    note = {"format": FORMAT, "step": step, "identity": identity, "how": how, "window": list(window)}
    note["sha256"] = content_hash(tensors)
    with writing(path, os.replace) as file:
        write_tensors(file, tensors, json.dumps(note, sort_keys=True))
    tidy(folder, keep)
    fsync_folder(path.parent)


def tidy(folder: Path, keep: int) -> None:
    """Delete a run's temporary files whose writer is gone, and all but the newest ``keep`` checkpoints."""
    for place in (folder, folder / FOLDER, folder / "samples"):
        remove_abandoned(place)
    for old in steps_saved(folder)[:-keep]:
        checkpoint_path(folder, old).unlink()


def load_checkpoint(
    folder: Path, step: int, identity: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, Tensor]], list[float], dict[str, Any]]:
    """Read one: what :func:`save_checkpoint` was given as ``state``, memory-mapped, as ``window`` and as ``how``.

    ``shapes`` are the parameters', by name.

    Raises:
        UserError: it is damaged, or of a run with another ``identity``: the error names every field that differs.
    """
    path = checkpoint_path(folder, step)
    try:
        metadata, tensors = read_safetensors(path)
        note = json.loads(metadata["ddfast"])
        if (note["format"], note["step"]) != (FORMAT, step):
            raise KeyError(f"format {note['format']}, step {note['step']}")
        there, window, how, sha256 = (note[key] for key in ("identity", "window", "how", "sha256"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or of another version of ddfast; delete it to go on from the one before ({error})"
        ) from error
    lines = differences(there, json.loads(json.dumps(identity)))
    if lines:
        raise UserError(
            f"{folder} holds a run of another configuration: {'; '.join(lines)}. "
            "Choose another --out, or the same settings"
        )
    found = {key: tuple(t.shape) for key, t in tensors.items()}
    if found != {f"{part}.{name}": shape for part in PARTS for name, shape in shapes.items()}:
        raise UserError(f"{path} holds other weights than this student's; delete it to go on from the one before")
    if content_hash(tensors) != sha256:
        raise UserError(f"{path} is damaged: its checksum differs; delete it to go on from the one before")
    state = {part: {name: tensors[f"{part}.{name}"] for name in shapes} for part in PARTS}
    return state, window, how
