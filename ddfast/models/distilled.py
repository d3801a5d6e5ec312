"""A student with its tokenizer: what samples images, loaded from a name, a file or a run.

Axes: B images, L tokens of an image, V codebook size, C codebook channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import is_file
from ..records import check_name, restore
from .base import Tokenizer, decode_embeddings
from .checkpoints import KINDS, Part, load_bundle, read_extra, require_copy, save_bundle
from .llamagen_vq import LlamaGenTokenizer
from .student import Student
from .var_teacher import MultiScaleTokenizer
from .zoo import STUDENTS, TEACHERS, bundled_copy, load_tokenizer, located, nearest, read_part

RUN_FILE = "student.safetensors"  # what a training run leaves in its folder


@dataclass(frozen=True)
class Sampled:
    """What a student's file says besides its weights: its teacher, how it is sampled, and where it comes from.

    Attributes:
        teacher, timesteps, split, teacher_sha256: see :class:`Distilled`.
        step: of training, at which it was written.
        run: the checksum of what decides the run that wrote it.
    """

    teacher: str
    timesteps: tuple[int, ...]
    split: int
    teacher_sha256: str | None = None
    step: int | None = None
    run: str | None = None


@dataclass(frozen=True)
class Distilled:
    """A student with its tokenizer.

    Attributes:
        name: of the student.
        tokenizer: a :class:`ddfast.models.base.Tokenizer`, in float32.
        teacher: name of what it was distilled from.
        timesteps: those it was trained on, rising from 0.
        split: groups before it are best taken from the logits, the others from the embeddings.
        sha256: content hash of the student's weights.
        tokenizer_sha256: of the tokenizer's.
        teacher_sha256: of the teacher's transformer; None where the file does not say, as released ones do not.
    """

    name: str
    student: Student
    tokenizer: nn.Module
    teacher: str
    timesteps: tuple[int, ...]
    split: int
    sha256: str
    tokenizer_sha256: str
    teacher_sha256: str | None = None

    @property
    def codebook(self) -> Tensor:
        """[V, C] float32"""
        return cast(Tokenizer, self.tokenizer).codebook.float()

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @torch.inference_mode()
    def images(self, x_BLC: Tensor) -> Tensor:
        """What :func:`ddfast.sampling.few_step` made, to images float32 [B, 3, H, W] in [0, 1]."""
        return decode_embeddings(self.tokenizer, x_BLC)


def load_student(
    name: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    *,
    copy: str = "ema",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Distilled:
    """A student ready to sample.

    Args:
        name: a released student (``ddfast info`` lists them), the path of a bundle that holds one, or the folder of a
            training run.
        weights: file of a released student; looked for in :func:`ddfast.models.zoo.weight_folders` when None.
        tokenizer: file of a released student's tokenizer, likewise.
        copy: which copy of the weights: "ema", their moving average, or "raw".
        dtype: type of the student's weights and arithmetic; the tokenizer stays float32.
        device: where it runs.

    Raises:
        UserError: unknown name, missing or damaged file, weights or a tokenizer that do not fit.
    """
    name = os.fspath(name)
    if name in STUDENTS:
        entry = STUDENTS[name]
        path = located(entry, weights, "--weights")
        student = read_part(path, "student", entry.kind, entry.config, copy, entry.name)
        vq, sampled = load_tokenizer(entry.teacher, tokenizer), Sampled(entry.teacher, entry.timesteps, entry.split)
    else:
        path = _file(name)
        if weights is not None:
            raise UserError(f"{name} holds its own weights; drop --weights")
        name, student, vq, sampled = _read(path, tokenizer, copy)
    _check(name, student, vq, sampled.timesteps, sampled.split)
    model = cast(Student, student.build(dtype, device))
    how = sampled.teacher, sampled.timesteps, sampled.split, student.sha256, vq.sha256, sampled.teacher_sha256
    return Distilled(name, model, vq.build(torch.float32, device), *how)


def save_student(
    path: str | os.PathLike[str],
    name: str,
    student: Part,
    tokenizer: Part,
    timesteps: Sequence[int],
    split: int,
    teacher: str,
    teacher_sha256: str | None = None,
    step: int | None = None,
    run: str | None = None,
) -> None:
    """Write a bundle that :func:`load_student` reads.

    ``teacher`` is the name of what it was distilled from; for the others see :class:`Sampled`.

    Raises UserError where the tokenizer or the timesteps do not fit the student.
    """
    _check(name, student, tokenizer, timesteps, split)
    extra: dict[str, Any] = {"timesteps": list(timesteps), "split": split, "teacher": check_name(teacher, name)}
    known = {"teacher_sha256": teacher_sha256, "step": step, "run": run}
    extra |= {name: value for name, value in known.items() if value is not None}
    save_bundle(path, name, {"student": student, "tokenizer": tokenizer}, extra)


def _file(name: str) -> Path:
    """The bundle that the path ``name`` stands for."""
    path = Path(name)
    if path.is_dir():
        path = path / RUN_FILE
        if not is_file(path):
            raise UserError(f"{name} holds no {RUN_FILE}; `ddfast train --out {name}` makes one")
    elif path.suffix != ".safetensors":
        if name in TEACHERS:
            raise UserError(f"{name} is a teacher, not a student; `ddfast train --teacher {name}` makes one of it")
        if is_file(path):
            raise UserError(f"{name} is no ddfast file; give the student's name, and this file with --weights")
        raise UserError(f"no student is called {name!r} and no such file exists; {nearest(name, STUDENTS)}")
    return path


def _read(path: Path, tokenizer: str | os.PathLike[str] | None, copy: str) -> tuple[str, Part, Part, Sampled]:
    """Name, student, tokenizer and sampling of a bundle; a converted one holds but a name and the student."""
    name, parts = load_bundle(path)
    if "student" not in parts:
        raise UserError(f"{path} ({name}) holds no student, only {', '.join(parts)}")
    require_copy([bundled_copy(path)], copy, path)
    if "tokenizer" in parts:
        if tokenizer is not None:
            raise UserError(f"{path} holds its own tokenizer; drop --tokenizer")
        return name, parts["student"], parts["tokenizer"], read_sampled(path)
    if name not in STUDENTS:
        raise UserError(f"{path} holds no tokenizer, and {name} is no released student whose tokenizer is known")
    entry = STUDENTS[name]
    sampled = Sampled(entry.teacher, entry.timesteps, entry.split)
    return name, parts["student"], load_tokenizer(entry.teacher, tokenizer), sampled


def read_sampled(path: Path) -> Sampled:
    """What a student's bundle says besides its weights; UserError where that is not whole."""
    extra = {name: value for name, value in read_extra(path).items() if name != "copy"}
    try:
        sampled: Sampled = restore(Sampled, extra, "extra")
    except UserError as error:
        raise UserError(f"{path} does not say its teacher, timesteps and split: {error}") from None
    check_name(sampled.teacher, f"the header of {path}: the teacher")
    return sampled


def _check(name: str, student: Part, tokenizer: Part, timesteps: Sequence[int], split: int) -> None:
    """Raise UserError unless the two parts and the sampling fit each other. Costs no memory."""
    with torch.device("meta"):
        model, vq = KINDS[student.kind][1](student.config), KINDS[tokenizer.kind][1](tokenizer.config)
    if not isinstance(model, Student):
        raise UserError(f"{name}: a {student.kind} cannot be a student")
    if not hasattr(vq, "decode_embeddings"):
        raise UserError(f"{name}: a {tokenizer.kind} cannot be a tokenizer")
    entries, channels = cast(Tokenizer, vq).codebook.shape
    have = {"codebook entries": entries, "channels": channels, "token grids": _grids(vq)}
    need = {"codebook entries": model.vocab_size, "channels": model.channels, "token grids": _sides(model.groups)}
    wrong = [f"its {what} are {have[what]}, not {need[what]}" for what in need if have[what] != need[what]]
    if wrong:
        raise UserError(f"this tokenizer does not fit {name}: {'; '.join(wrong)}")
    model.check_timesteps(timesteps)
    if not 0 <= split <= len(model.groups):
        raise UserError(f"split {split} is no group of {name}; use 0 to {len(model.groups)}")


def _sides(groups: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of the token grids that a student's groups fill: one a group, or one of all its groups of a token."""
    return (math.isqrt(len(groups)),) if max(groups) == 1 else tuple(map(math.isqrt, groups))


def _grids(tokenizer: nn.Module) -> tuple[int, ...]:
    """Sides of a tokenizer's token grids, coarse to fine."""
    if isinstance(tokenizer, LlamaGenTokenizer):
        return (tokenizer.config.grid,)
    return cast(MultiScaleTokenizer, tokenizer).quantizer.patch_nums
