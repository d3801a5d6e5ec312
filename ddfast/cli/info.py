"""``ddfast info``: the zoo, and which weights are found where."""

from __future__ import annotations

import argparse
from typing import cast

import torch
from rich import box
from rich.table import Table

from .. import __version__
from ..hardware import kernels, missing_kernels
from ..models.checkpoints import KINDS
from ..models.student import Student
from ..models.zoo import (
    STUDENTS,
    TEACHERS,
    ZooEntry,
    ZooStudent,
    ZooTeacher,
    blueprint,
    everything,
    find_weights,
    weight_folders,
)
from .progress import console
from .shared import choose_device


def run(args: argparse.Namespace) -> int:
    shown = console(stderr=False)
    teachers = table("Teachers", "name", "family", "size", "tokens", "codebook", "image")
    for entry in TEACHERS.values():
        teachers.add_row(entry.name, entry.family, *facts(entry))
    students = table("Students", "name", "teacher", "size", "tokens", "timesteps", "split")
    for student in STUDENTS.values():
        students.add_row(student.name, student.teacher, *student_facts(student))
    weights = table("Weights", "of", "file", "found in")
    for item in everything():
        weights.add_row(item.name, item.file, where(item))
    shown.print(teachers, students, weights)
    shown.print("Presets: paper and release; the digits teachers have release alone")
    shown.print("Looked for in " + ", ".join(str(f) for f in weight_folders()), soft_wrap=True)
    origins = sorted({item.origin for item in everything() if find_weights(item) is None})
    if origins:
        shown.print("What is missing comes from " + ", ".join(origins), soft_wrap=True)
    device = choose_device("auto")
    shown.print(
        f"ddfast {__version__}, torch {torch.__version__}, {device}; kernels: {kernels(device)}", soft_wrap=True
    )
    if lack := missing_kernels(device):
        shown.print(f"note: {lack}", soft_wrap=True)
    return 0


def table(title: str, *columns: str) -> Table:
    """A plain table whose last column alone may wrap."""
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in columns[:-1]:
        out.add_column(name, no_wrap=True)
    out.add_column(columns[-1], overflow="fold")
    return out


def facts(entry: ZooTeacher) -> tuple[str, str, str, str]:
    """Parameters of the transformer, groups, codebook and image side."""
    teacher = blueprint(entry.name)
    count = sum(p.numel() for name, p in teacher.named_parameters() if name.startswith("transformer."))
    sizes = "{}x{}".format(*teacher.codebook.shape)
    return readable(count), groups(teacher.groups), sizes, f"{teacher.image_size} px"


def student_facts(entry: ZooStudent) -> tuple[str, str, str, str]:
    """Parameters, groups, and the published timesteps and split."""
    with torch.device("meta"):
        student = cast(Student, KINDS[entry.kind][1](entry.config))
    count = sum(p.numel() for p in student.parameters())
    return readable(count), groups(student.groups), ",".join(map(str, entry.timesteps)), str(entry.split)


def readable(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def groups(sizes: tuple[int, ...]) -> str:
    """``680 in 10``: that many tokens, drawn in so many groups."""
    return f"{sum(sizes)} in {len(sizes)}"


def where(entry: ZooEntry) -> str:
    path = find_weights(entry)
    if path is None:
        return "-"
    return "ddfast" if isinstance(entry, ZooTeacher) and entry.bundled else str(path.parent)
