"""Checkpoints of a run: one file each, whole or absent, from which training goes on bit for bit.

``checkpoints/step-NNNNNNNN.safetensors`` holds ``model.*``, ``ema.*``, ``exp_avg.*`` and ``exp_avg_sq.*`` in float32.
Its metadata entry ``ddfast`` is a JSON object: format, step, what decides the run (``identity``), what decides rounding
alone (``how``), the sums of figures not logged yet (``window``), a SHA-256 of the tensors, and since format 2 a
``checksum`` of all that. The learning rate, the order of the pairs and their timesteps are functions of the step, so
there is no more state than that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError, reason
from ..files import fsync_folder, remove_abandoned, writing
from ..records import check_signature, differences, restore, signed
from ..tensors import content_hash, read_note, read_safetensors, write_tensors

FORMAT = 2
UNSIGNED = 1  # the format before the note had a checksum
FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{8})\.safetensors")
PARTS = ("model", "ema", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Note:
    """What a checkpoint says of itself; see the head of this file."""

    format: int
    step: int
    identity: dict[str, Any]
    how: dict[str, Any]
    window: list[float]
    sha256: str


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
    with writing(path) as file:
        write_tensors(file, tensors, json.dumps(signed(note), sort_keys=True))
    tidy(folder, keep)
    fsync_folder(path.parent)


def tidy(folder: Path, keep: int) -> None:
    """Delete a run's temporary files whose writer is gone, and all but the newest ``keep`` checkpoints."""
    remove_abandoned(folder, "student.safetensors", "config.json", "metrics.jsonl")
    remove_abandoned(folder / FOLDER, "step-*.safetensors")
    remove_abandoned(folder / "samples", "step-*.png")
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
    note, tensors = read_checked(folder, step)
    path, fix = checkpoint_path(folder, step), "delete it to go on from the one before"
    lines = differences(note.identity, json.loads(json.dumps(identity)))
    if lines:
        raise UserError(
            f"{folder} holds a run of another configuration: {'; '.join(lines)}. "
            "Choose another --out, or the same settings"
        )
    found = {key: tuple(t.shape) for key, t in tensors.items()}
    if found != {f"{part}.{name}": shape for part in PARTS for name, shape in shapes.items()}:
        raise UserError(f"{path} holds other weights than this student's; {fix}")
    state = {part: {name: tensors[f"{part}.{name}"] for name in shapes} for part in PARTS}
    return state, note.window, note.how


def read_checked(folder: Path, step: int) -> tuple[Note, dict[str, Tensor]]:
    """A checkpoint's note and tensors, memory-mapped.

    Raises:
        UserError: it is damaged, or of another version.
        OSError: it cannot be read, though it may be sound.
    """
    path, fix = checkpoint_path(folder, step), "delete it to go on from the one before"
    try:
        metadata, tensors = read_safetensors(path)
        values = read_note(path, metadata, "checkpoint")
        if values.get("format") != UNSIGNED or "checksum" in values:
            check_signature(values, "its note", fix)
        note: Note = restore(Note, {k: v for k, v in values.items() if k != "checksum"}, "its note")
        if note.format not in (UNSIGNED, FORMAT) or note.step != step:
            raise UserError(f"format {note.format}, step {note.step}")
    except UserError as error:
        raise UserError(
            f"{path} is damaged or of another version of ddfast; {fix} ({reason(error.__cause__ or error)})"
        ) from error
    if content_hash(tensors) != note.sha256:
        raise UserError(f"{path} is damaged: its checksum differs; {fix}")
    return note, tensors
