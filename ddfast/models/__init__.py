"""Teachers, tokenizers, their configs, the zoo and checkpoint files."""

from __future__ import annotations

from .base import DecodeState, Sampling, Teacher
from .zoo import TEACHERS, TOKENIZERS, load_teacher

__all__ = ["TEACHERS", "TOKENIZERS", "DecodeState", "Sampling", "Teacher", "load_teacher"]
