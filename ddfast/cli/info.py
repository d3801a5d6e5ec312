"""``ddfast info``: the zoo, and which weights are found where."""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .. import __version__, _native
from ..models.checkpoints import KINDS
from ..models.student import Student
from ..models.zoo import (
    STUDENTS,
    TEACHERS,
    TOKENIZERS,
    WEIGHTS_VARIABLE,
    ZooEntry,
    ZooStudent,
    ZooTeacher,
    blueprint,
    find_weights,
    weight_folders,
)

DESCRIPTION = f"""\
List every teacher, student and tokenizer that ddfast knows, their sizes and groups, and whether their weights are at
hand.

Weights are looked for under their released names (or NAME.safetensors) in the folders of ${WEIGHTS_VARIABLE},
in ./weights and in ~/.cache/ddfast."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="list the known teachers and students and which weights are found",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    console = Console()
    teachers = table("Teachers", "name", "family", "size", "tokens", "codebook", "image")
    for entry in TEACHERS.values():
        teachers.add_row(entry.name, entry.family, *facts(entry))
    students = table("Students", "name", "teacher", "size", "tokens", "timesteps", "split")
    for student in STUDENTS.values():
        students.add_row(student.name, student.teacher, *student_facts(student))
    weights = table("Weights", "of", "file", "found in")
    everything: list[ZooEntry] = [*TEACHERS.values(), *STUDENTS.values(), *TOKENIZERS.values()]
    for item in everything:
        weights.add_row(item.name, item.file, where(item))
    console.print(teachers, students, weights)
    console.print("Presets: paper and release; the digits teachers have release alone", highlight=False)
    console.print("Looked for in " + ", ".join(str(f) for f in weight_folders()), soft_wrap=True)
    origins = sorted({item.origin for item in everything if find_weights(item) is None})
    if origins:
        console.print("What is missing comes from " + ", ".join(origins), soft_wrap=True)
    built = "C++ and CUDA" if _native.cuda_built() else "C++" if _native.available() else "none; torch code is used"
    console.print(f"ddfast {__version__}, compiled code: {built}", highlight=False)
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
