"""What an exported folder says of itself: ``manifest.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ddfast.errors import UserError
from ddfast.files import LOCK, file_sha256, require_file, write_atomic
from ddfast.records import check_name, check_signature, checksum, read_json, restore, signed

from .graph import Shapes

FILE = "manifest.json"
KIND = "ddfast export"
FORMAT = 2
UNSIGNED = 1  # the format before the manifest had a checksum
STAGES = (("whole",), ("trunk", "decoder"))


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
    shapes: of one image; labels are those below its number of classes, and for any other an image is NaN.
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

    def __post_init__(self) -> None:
        if tuple(self.stages) not in STAGES:
            raise UserError(
                f"its stages are {', '.join(self.stages) or 'none'}; use {' or '.join(map(', '.join, STAGES))}"
            )
        if set(self.precision) != set(self.stages):
            raise UserError(f"it says the precision of {', '.join(self.precision) or 'no stage'}, not of its stages")

    @property
    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {"kind": KIND, "format": FORMAT} | asdict(self)

    @property
    def checksum(self) -> str:
        """SHA-256 of the canonical JSON of all of it, and by the hashes of files of what it describes."""
        return checksum(self.record)

    def write(self, folder: Path) -> None:
        write_atomic(folder / FILE, (json.dumps(signed(self.record), indent=1) + "\n").encode())

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the first stage's inputs."""
        return ("label", "seed", "sample") if self.seeded else ("label", "noise")


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below ``folder`` but the manifest, by its path there."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / FILE and p.name != LOCK)
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths}


def is_exported(folder: Path) -> bool:
    """Whether ``folder`` is one of ``ddfast export``, whole or not: pictures may have a manifest.json of others."""
    path = folder / FILE
    if not os.path.lexists(path):
        return False
    try:
        record = read_json(path)
    except UserError:
        return not any(folder.glob("*.png"))  # one that is damaged is told of where no pictures could be meant
    return isinstance(record, dict) and record.get("kind") == KIND


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder, once every file is as it says.

    Raises:
        UserError: no exported folder, a changed or newer manifest, files that are missing, differ, or lie elsewhere.
    """
    path, fix = folder / FILE, "export the student again"
    if not path.exists():
        raise UserError(f"{folder} is no exported folder: it has no {FILE}; `ddfast export --out {folder}` makes one")
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise UserError(f"{path} belongs to something else; `ddfast export` makes folders to run")
    if record.get("format") not in (UNSIGNED, FORMAT):
        raise UserError(f"{path} has format {record.get('format')}, this is for format {FORMAT}; {fix}")
    if record["format"] != UNSIGNED or "checksum" in record:
        check_signature(record, path, fix)
    known = {name: value for name, value in record.items() if name not in ("kind", "format", "checksum")}
    manifest: Manifest = restore(Manifest, known, str(path))
    check_name(manifest.student.get("name"), path)
    for name, facts in manifest.files.items():
        file = inside(folder, name)
        if not file.exists():
            raise UserError(f"{folder} lacks {name}, which its manifest lists; {fix}")
        require_file(file)
        if file.stat().st_size != facts.get("bytes") or file_sha256(file) != facts.get("sha256"):
            raise UserError(f"{file} is not the file that its manifest lists; {fix}")
    for name in manifest.stages.values():
        inside(folder, name)
        if name not in manifest.files and "script" not in manifest.built:  # of one that has yet to be built
            raise UserError(f"{path} does not list {name}, which it would run; {fix}")
    return manifest


def inside(folder: Path, name: str) -> Path:
    """The file of that name in ``folder``; UserError where a manifest's path, or a link in it, leads out of it."""
    parts = PurePosixPath(name).parts
    file = folder.joinpath(*parts)
    if not parts or name.startswith("/") or ".." in parts or not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / FILE} names {name!r}, which lies outside of {folder}; copy the files into it")
    return file
