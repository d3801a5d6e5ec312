"""Teachers, tokenizers, students, their configs, the zoo and checkpoint files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import front

if TYPE_CHECKING:
    from .base import DecodeState as DecodeState
    from .base import Sampling as Sampling
    from .base import Teacher as Teacher
    from .distilled import Distilled as Distilled
    from .distilled import load_student as load_student
    from .distilled import save_student as save_student
    from .zoo import STUDENTS as STUDENTS
    from .zoo import TEACHERS as TEACHERS
    from .zoo import TOKENIZERS as TOKENIZERS
    from .zoo import load_teacher as load_teacher

__getattr__, __all__ = front(
    __name__,
    {
        "DecodeState": "base",
        "Sampling": "base",
        "Teacher": "base",
        "Distilled": "distilled",
        "load_student": "distilled",
        "save_student": "distilled",
        "STUDENTS": "zoo",
        "TEACHERS": "zoo",
        "TOKENIZERS": "zoo",
        "load_teacher": "zoo",
    },
)
