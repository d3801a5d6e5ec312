"""Shards on disk: written whole or not at all, byte for byte reproducible, and checked when read.

A shard is ``shard-NNNNN.safetensors`` with ``labels`` int32 [N], ``tokens`` uint16 [N, L] and, on request, ``noise``
float32 [N, L, C]. Its metadata entry ``ddfast`` is a JSON object: the manifest's checksum, the shard's number, how it
was computed (``run``: batch, dtype, device, precision) and a SHA-256 over all of that and the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from ..errors import UserError, reason
from ..files import write_atomic
from ..records import restore
from ..tensors import read_note, read_safetensors
from .manifest import Manifest

NAME = re.compile(r"shard-(\d{5,})\.safetensors")


@dataclass(frozen=True)
class Run:
    """What decides only the rounding of a shard.

    Attributes:
        batch: pairs decoded together.
        dtype: of the teacher's arithmetic.
        device: ``cpu`` or the GPU's name.
        precision: of its matrix products, see ``Teacher.prepare``; shards from before it was recorded are "native".
    """

    batch: int
    dtype: str
    device: str
    precision: str = "native"


@dataclass(frozen=True)
class Note:
    """What a shard says of itself; ``manifest`` is that one's checksum."""

    manifest: str
    shard: int
    run: Run
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A shard read back: ``tensors`` are memory-mapped."""

    run: Run
    tensors: dict[str, Tensor]


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def shards_there(folder: Path) -> dict[int, int]:
    """Bytes of the shard files in a folder, by number; nothing is read. Other names are no shards."""
    found = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            match = NAME.fullmatch(entry.name)
            if match and match[1] == f"{int(match[1]):05d}":
                found[int(match[1])] = entry.stat().st_size
    return found


def write_shard(
    folder: Path, manifest: Manifest, shard: int, run: Run, arrays: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """Write one shard. ``arrays`` have the names, dtypes and shapes of :func:`layout`."""
    assert {k: (a.dtype.name, a.shape) for k, a in arrays.items()} == layout(manifest, shard)
    note = {"manifest": manifest.checksum, "shard": shard, "run": asdict(run)}
    note["sha256"] = digest(note, arrays)
    write_atomic(shard_path(folder, shard), packed(note, arrays))


def packed(note: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """The bytes of a shard file: one metadata entry, so that their order is fixed."""
    return save(dict(arrays), {"ddfast": json.dumps(note, sort_keys=True)})


def layout(manifest: Manifest, shard: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to (dtype, shape) of a shard's tensors."""
    n, length = len(manifest.shard_range(shard)), manifest.num_tokens
    out: dict[str, tuple[str, tuple[int, ...]]] = {"labels": ("int32", (n,)), "tokens": ("uint16", (n, length))}
    if manifest.store_noise:
        out["noise"] = ("float32", (n, length, manifest.channels))
    return out


def digest(note: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 over a shard's note (without the digest itself) and its tensors in order of name."""
    sha = hashlib.sha256(json.dumps({k: v for k, v in note.items() if k != "sha256"}, sort_keys=True).encode())
    for name in sorted(arrays):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(arrays[name]).data)
    return sha.hexdigest()


def read_shard(folder: Path, manifest: Manifest, shard: int, full: bool = True) -> Shard:
    """Open a shard and check it: header, size, manifest and, with ``full``, checksum, labels and token range.

    Raises:
        UserError: the shard is missing, cut, altered, or belongs to other pairs.
        OSError: it cannot be read, though it may be sound.
    """
    path = shard_path(folder, shard)
    fix = "delete it and rerun `ddfast pairs` to make it again"
    if not path.exists():
        raise UserError(f"{path} is missing; rerun `ddfast pairs` with the same settings to finish the folder")
    try:
        metadata, tensors = read_safetensors(path)
        note = read_note(path, metadata, "shard")
        of: Note = restore(Note, note, "its note")
    except UserError as error:
        raise UserError(f"{path} is damaged or cut short ({reason(error.__cause__ or error)}); {fix}") from error
    found = {k: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in tensors.items()}
    if of.manifest != manifest.checksum or of.shard != shard:
        raise UserError(f"{path} belongs to other pairs than {folder}/manifest.json describes; {fix}")
    if found != layout(manifest, shard):
        raise UserError(f"{path} holds {found} instead of {layout(manifest, shard)}; {fix}")
    if full:
        _check_content(path, manifest, shard, note, of.sha256, tensors, fix)
    return Shard(of.run, tensors)


def _check_content(
    path: Path, manifest: Manifest, shard: int, note: Any, sha256: str, tensors: dict[str, Tensor], fix: str
) -> None:
    arrays = {k: t.numpy() for k, t in tensors.items()}
    if digest(note, arrays) != sha256 or path.read_bytes() != save(
        arrays, {"ddfast": json.dumps(note, sort_keys=True)}
    ):
        raise UserError(f"{path} is damaged: its checksum does not match; {fix}")
    if int(arrays["tokens"].max()) >= manifest.vocab_size:
        raise UserError(
            f"{path} holds token {int(arrays['tokens'].max())} of a codebook of {manifest.vocab_size}; {fix}"
        )
    pairs = torch.arange(manifest.shard_range(shard).start, manifest.shard_range(shard).stop)
    if not torch.equal(tensors["labels"].long(), manifest.pair_labels(pairs)):
        raise UserError(f"{path} holds labels that its manifest does not give; {fix}")
