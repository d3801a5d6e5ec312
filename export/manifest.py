"""What an exported folder says of itself: ``manifest.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddfast.errors import UserError
from ddfast.files import file_sha256, write_atomic

from .graph import Shapes

FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Batch:
    """How many images a graph takes at once: any number from ``least`` to ``most``; engines are fastest at ``best``."""

    least: int = 1
    best: int = 8
    most: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise UserError(
                f"batches {self.least},{self.best},{self.most} must rise and begin at 1 or more, e.g. 1,8,64"
            )

    @property
    def fixed(self) -> bool:
        return self.least == self.most


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    target: onnx, tensorrt, …: one of ``targets.TARGETS``.
    precision: of each stage, e.g. {"whole": "fp16"}.
    stages: file of each stage, "whole", or "trunk" and "decoder"; their order is that of running them.
    student: its name, hashes, teacher, and split.
    timesteps: those unrolled (Alg. 3).
    seeded: whether the graph makes its noise: inputs ``seed``, ``sample`` in place of ``noise``.
    files: bytes and SHA-256 of every file.
    built: what it was built with and, for engines, on which GPU.
    parity: how far it is from the torch student, see ``parity.measure``.
    """

    target: str
    precision: Mapping[str, str]
    stages: Mapping[str, str]
    student: Mapping[str, Any]
    timesteps: tuple[int, ...]
    batch: Batch
    shapes: Shapes
    seeded: bool = False
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    built: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        record = {"kind": "ddfast export", "format": FORMAT} | asdict(self)
        write_atomic(folder / FILE, (json.dumps(record, indent=1) + "\n").encode())

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the first stage's inputs."""
        return ("label", "seed", "sample") if self.seeded else ("label", "noise")


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below ``folder`` but the manifest, by its path there."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / FILE)
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder, once every file is as it says.

    Raises:
        UserError: no exported folder, a damaged or newer manifest, files that are missing or differ.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} is no exported folder: it has no {FILE}; `ddfast export --out {folder}` makes one")
    try:
        record = dict(json.loads(path.read_bytes()))
        if record.pop("kind", None) != "ddfast export":
            raise UserError(f"{path} belongs to something else; `ddfast export` makes folders to run")
        if (version := record.pop("format", None)) != FORMAT:
            raise UserError(f"{path} has format {version}, this is for format {FORMAT}; export the student again")
        record["batch"], record["shapes"] = Batch(**record["batch"]), Shapes(**record["shapes"])
        record["timesteps"] = tuple(record["timesteps"])
        manifest = Manifest(**record)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}); export the student again") from error
    for name, facts in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder} lacks {name}, which its manifest lists; export the student again")
        if file.stat().st_size != facts["bytes"] or file_sha256(file) != facts["sha256"]:
            raise UserError(f"{file} is not the file that its manifest lists; export the student again")
    return manifest
