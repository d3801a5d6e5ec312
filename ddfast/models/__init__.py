"""Teachers, tokenizers, students, their configs, the zoo and checkpoint files."""

from __future__ import annotations

from .base import DecodeState, Sampling, Teacher
from .distilled import Distilled, load_student, save_student
from .zoo import STUDENTS, TEACHERS, TOKENIZERS, load_teacher

__all__ = [
    "STUDENTS",
    "TEACHERS",
    "TOKENIZERS",
    "DecodeState",
    "Distilled",
    "Sampling",
    "Teacher",
    "load_student",
    "load_teacher",
    "save_student",
]
