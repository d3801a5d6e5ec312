"""Checkpoints of a run: one file each, whole or absent, from which training goes on bit for bit.

``checkpoints/step-NNNNNNNN.safetensors`` holds ``model.*``, ``ema.*``, ``exp_avg.*`` and ``exp_avg_sq.*`` in float32.
Its metadata entry ``ddfast`` is a JSON object: format, step, what decides the run (``identity``), and the sums of
figures not logged yet (``window``). The learning rate, the order of the pairs and their timesteps are functions of the
step, so there is no more state than that.
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
from ..models.checkpoints import read_safetensors
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
    window: Sequence[float],
    state: Mapping[str, Mapping[str, Tensor]],
    keep: int,
) -> None:
    """Write one and then delete all but the newest ``keep``.

    ``state`` maps ``PARTS`` to tensors by parameter name; ``window`` are the sums of the figures not logged yet.
    """
    assert tuple(state) == PARTS
    path = checkpoint_path(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = json.dumps({"format": FORMAT, "step": step, "identity": identity, "window": list(window)}, sort_keys=True)
    tensors = {f"{part}.{name}": t for part, named in state.items() for name, t in named.items()}
    with writing(path, os.replace) as file:
        write_tensors(file, tensors, note)
    tidy(folder, keep)
    fsync_folder(path.parent)


def tidy(folder: Path, keep: int) -> None:
    """Delete a run's temporary files whose writer is gone, and all but the newest ``keep`` checkpoints."""
    for place in (folder, folder / FOLDER, folder / "samples"):
        remove_abandoned(place)
    for old in steps_saved(folder)[:-keep]:
        checkpoint_path(folder, old).unlink()


def load_checkpoint(
    folder: Path, step: int, identity: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """Read one: what :func:`save_checkpoint` was given as ``state``, memory-mapped, and as ``window``.

    Raises:
        UserError: it is damaged, or of a run with another ``identity``: the error names every field that differs.
    """
    path = checkpoint_path(folder, step)
    try:
        metadata, tensors = read_safetensors(path)
        note = json.loads(metadata["ddfast"])
        if (note["format"], note["step"]) != (FORMAT, step):
            raise KeyError(f"format {note['format']}, step {note['step']}")
        there, window = note["identity"], note["window"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or of another version of ddfast; delete it to go on from the one before ({error})"
        ) from error
    require_same(folder, there, json.loads(json.dumps(identity)))
    state: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        state[part][name] = tensor
    return state, window


def require_same(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """UserError naming every field in which a run's checkpoint differs from the wanted run."""
    lines = []
    for key in sorted({**there, **wanted}):
        old, new = there.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [
                f"{key}.{k} is {old.get(k)}, not {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)
            ]
        elif old != new:
            lines.append(f"{key} is {old}, not {new}")
    if lines:
        raise UserError(
            f"{folder} holds a run of another configuration: "
            + "; ".join(lines)
            + ". Choose another --out, or the same "
            "settings"
        )
