"""From a student to an exported folder: build, compare with torch, publish."""

from __future__ import annotations

import contextlib
import importlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ddfast import __version__
from ddfast.errors import UserError, WorkError
from ddfast.files import LOCK, check_folder, fsync_folder, is_text, locked, remove_abandoned_folders, unlock
from ddfast.models import Distilled
from ddfast.records import check_name

from .engine import Engine, require
from .graph import Decoder, SeededTrunk, Shapes, Trunk, Whole
from .manifest import FILE, Batch, Manifest, is_exported, list_files, read_manifest
from .parity import measure
from .targets import LAYOUTS, MIN_AGREEMENT, TARGETS
from .trust import check_trusted, remember

PARITY_TOKENS = 2048
BUILDING = "export"


@dataclass
class Job:
    """One export.

    Attributes:
        model: the student in float32, with its tokenizer.
        precision: one of the target's ``PRECISIONS``.
        timesteps: to unroll.
        layout: "whole", or "pair": trunk and decoder in files of their own.
        seeded: make the noise in the graph.
        folder: where files go.
        options: the target's own.
        progress: told what begins.
        single_file: bytes of weights up to which an ONNX graph holds them itself; protobuf ends at 2 GB.
    """

    model: Distilled
    target: str
    precision: str
    timesteps: tuple[int, ...]
    batch: Batch = Batch()
    layout: str = "whole"
    seeded: bool = False
    folder: Path = Path()
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[str], None] = print
    single_file: int = 1 << 30

    def stages(self, pattern: str) -> dict[str, str]:
        """File of every stage, e.g. for "{}.onnx"."""
        names = {"whole": "model"} if self.layout == "whole" else {"trunk": "trunk", "decoder": "decoder"}
        return {stage: pattern.format(name) for stage, name in names.items()}

    @property
    def shapes(self) -> Shapes:
        return Shapes.of(self.model)

    def module(self, stage: str, dtype: torch.dtype) -> nn.Module:
        """What a stage computes, its weights in ``dtype``, its inputs and outputs in float32 and int64."""
        decoder = Decoder(self.model, dtype) if stage != "trunk" else nn.Identity()
        if stage == "decoder":
            return decoder
        trunk: nn.Module = Trunk(self.model, self.timesteps, dtype)
        if self.seeded:
            trunk = SeededTrunk(trunk, self.shapes)  # type: ignore[arg-type]
        return trunk if stage == "trunk" else Whole(trunk, decoder, self.shapes.num_classes)  # type: ignore[arg-type]

    def traced(self, stage: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
        """A stage's module, ready to be traced, examples of its inputs by name, and names of its outputs."""
        shapes, batch = self.shapes, self.batch.most if self.batch.fixed else max(2, self.batch.least)
        noise = torch.zeros(batch, shapes.tokens, shapes.channels)
        feeds = {"label": torch.zeros(batch, dtype=torch.int64)}
        if stage == "decoder":
            feeds = {"embeddings": noise}
        elif self.seeded:
            feeds |= {"seed": torch.zeros(1, dtype=torch.int64), "sample": torch.arange(batch)}
        else:
            feeds["noise"] = noise
        outputs = {"trunk": ["embeddings"], "decoder": ["image"], "whole": ["image", "embeddings"]}[stage]
        return self.module(stage, dtype).cpu().eval().requires_grad_(False), feeds, outputs

    def dynamic_shapes(self, stage: str, feeds: Mapping[str, Tensor]) -> Any:
        """For torch.export: the batch of all ``feeds`` but the seed is one symbol; None where it is fixed."""
        if self.batch.fixed:
            return None
        symbol = torch.export.Dim("batch", min=self.batch.least, max=self.batch.most)
        moving = tuple({} if name == "seed" else {0: symbol} for name in feeds)
        return (moving,) if stage == "whole" else moving

    def manifest(self) -> Manifest:
        m = self.model
        student = {"name": m.name, "teacher": m.teacher, "sha256": m.sha256, "tokenizer": m.tokenizer_sha256}
        target = target_module(self.target)
        files = getattr(target, "FILES", "{}.onnx")
        stages = self.stages(files(self) if callable(files) else files)
        precisions = getattr(target, "precision_of", lambda precision, stage: precision)
        return Manifest(
            self.target,
            {stage: precisions(self.precision, stage) for stage in stages},
            stages,
            student | {"split": m.split},
            self.timesteps,
            self.batch,
            self.shapes,
            self.seeded,
        )


def target_module(name: str) -> ModuleType:
    return importlib.import_module(f".{TARGETS[name]}", __package__)


def layouts_of(target: str) -> tuple[str, ...]:
    """What ``--layout`` may be, the default first."""
    return getattr(target_module(target), "LAYOUTS", LAYOUTS)


def check_packages(target: str) -> None:
    """Raise UserError for packages that exporting to ``target`` needs and that are not installed."""
    module = target_module(target)
    require(module.EXTRA, *module.PACKAGES)


def check(job: Job) -> None:
    """Raise UserError for what cannot be exported, before work starts."""
    if job.target not in TARGETS:
        raise UserError(f"no target is called {job.target!r}; use {', '.join(TARGETS)}")
    check_packages(job.target)
    module = target_module(job.target)
    if job.precision not in module.PRECISIONS:
        raise UserError(f"{job.target} has no precision {job.precision}; use {', '.join(module.PRECISIONS)}")
    if job.layout not in layouts_of(job.target):
        raise UserError(f"{job.target} has no layout {job.layout!r}; use {' or '.join(layouts_of(job.target))}")
    check_name(job.model.name, "the student")  # it goes into scripts and configurations
    job.model.student.check_timesteps(job.timesteps)
    if hasattr(module, "check"):
        module.check(job)


def export_student(
    job: Job, out: Path, min_agreement: float | None = None, num: int | None = None, seed: int = 1
) -> Manifest:
    """Build ``job``, measure it against torch, and publish it as the folder ``out``: whole or not at all.

    Args:
        job: its ``folder`` is set here.
        out: absent or empty; a link to a folder is that folder.
        min_agreement: least share of equal tokens; by default what the precision usually holds (``MIN_AGREEMENT``).
        num, seed: images compared, by default as many as have ``PARITY_TOKENS``, 2 to 64.

    Raises:
        UserError: see :func:`check`; something is at ``out``.
        WorkError: too few tokens agree, or the outcome is broken; nothing is left at ``out``.
    """
    check(job)
    check_out(out)
    if num is None:
        num = min(max(PARITY_TOKENS // job.shapes.tokens, 2), 64)
    if num < 1:
        raise UserError(f"{num} images cannot be compared; use at least 1")
    least = MIN_AGREEMENT[job.precision] if min_agreement is None else min_agreement
    module = target_module(job.target)
    with building(out) as job.folder:
        built = {"ddfast": __version__} | module.build(job)
        manifest = replace(job.manifest(), built=built)
        job.progress("parity with torch")
        stand_in = module.stand_in(job, manifest) if hasattr(module, "stand_in") else None
        engine = stand_in or open_stages(job.folder, manifest, usual_device(manifest))
        found = measure(engine, job.model, num, seed) | {"runtime": engine.runtime, "min_agreement": least}
        manifest = replace(manifest, parity=found)
        if found["token_agreement"] < least:
            raise WorkError(
                f"only {found['token_agreement']:.2%} of the exported tokens are torch's, below --min-agreement "
                f"{least:g}; use a wider --precision, or lower it"
            )
        if hasattr(module, "seal"):
            module.seal(job.folder, manifest)
        manifest = replace(manifest, files=list_files(job.folder))
        manifest.write(job.folder)
    remember(manifest)
    return manifest


def check_out(out: Path) -> None:
    """Raise UserError where a folder cannot be exported to."""
    check_text(out)
    if out.is_dir() and is_exported(out):
        raise UserError(f"{out} is there already; remove it, or choose another --out")
    check_folder(out, "export that could be gone on with")


def check_text(folder: Path) -> None:
    """Raise UserError for a path that runtimes cannot open."""
    if not is_text(folder):
        raise UserError(
            f"{folder} is not UTF-8, or this locale is not, and runtimes open their files by such names only; choose "
            "another folder, or set PYTHONUTF8=1"
        )


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A hidden folder in ``out`` to build in. What is in it is moved to ``out`` on success, the manifest last, so that
    no reader takes a part for the whole; else nothing stays, nor ``out`` if it was not there.

    It is in ``out`` and not beside it, since ``out`` may be a volume of its own. What a killed export left there goes.
    """
    absent = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    held = locked(out)
    try:
        remove_abandoned_folders(out, BUILDING)
        inside = out / f".{BUILDING}.{secrets.token_hex(4)}.tmp"
        inside.mkdir()
        alive = locked(inside)
        try:
            yield inside
            alive.close()
            (inside / LOCK).unlink()
            for path in sorted(inside.iterdir(), key=lambda path: path.name == FILE):
                path.rename(out / path.name)
            fsync_folder(out)
        finally:
            alive.close()
            shutil.rmtree(inside, ignore_errors=True)
    finally:
        unlock(held, out)
        if absent and not any(out.iterdir()):
            out.rmdir()


def usual_device(manifest: Manifest) -> torch.device:
    """Where a folder runs unless told otherwise."""
    module = target_module(manifest.target)
    return torch.device(module.usual_device(manifest) if hasattr(module, "usual_device") else "cpu")


def open_stages(folder: Path, manifest: Manifest, device: torch.device) -> Engine:
    module = target_module(manifest.target)
    opened = {name: module.open_stage(folder / file, name, manifest, device) for name, file in manifest.stages.items()}
    for name, stage in opened.items():
        wanted = {"embeddings"} if name == "decoder" else set(manifest.inputs)
        if not set(stage.inputs) <= wanted:
            other = ", ".join(sorted(set(stage.inputs) - wanted))
            raise UserError(f"{manifest.stages[name]} takes {other}, of which its manifest says nothing; export again")
    return Engine(manifest, opened)


def check_sources(folder: Path, manifest: Manifest) -> None:
    """Raise UserError where a stage reads files that the manifest does not list, and so were not compared."""
    module = target_module(manifest.target)
    for name in manifest.stages.values() if hasattr(module, "sources") else ():
        for source in sorted(module.sources(folder / name)):
            if str(PurePosixPath(name).parent / source) not in manifest.files:
                raise UserError(f"{folder / name} reads {source!r}, which its manifest does not list; export again")


def open_engine(folder: Path | str, device: torch.device | str = "auto", trust: bool = False) -> Engine:
    """An exported folder, ready to run; "auto" is the device that it was built for.

    ``trust``: run native code, an engine or a compiled library, that was not made by this user on this machine.

    Raises:
        UserError: see :func:`read_manifest`; a program that is not trusted; a package that is missing; a GPU that is
            not the engine's.
    """
    folder = Path(folder)
    check_text(folder)
    manifest = read_manifest(folder)
    if manifest.target not in TARGETS:
        raise UserError(f"{folder} is for {manifest.target}, which this version does not know")
    check_trusted(folder, manifest, trust)
    check_sources(folder, manifest)
    try:
        chosen = usual_device(manifest) if device == "auto" else torch.device(device)
        return open_stages(folder, manifest, chosen)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / FILE} lacks what a folder for {manifest.target} says ({error!r}); export the student again"
        ) from error
