"""Names of classes: ImageNet's thousand, and the ten digits."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..errors import UserError
from .zoo import nearest

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@cache
def class_names(num_classes: int) -> tuple[str, ...]:
    """One name a class where these are known: of 1000 classes ImageNet's, of 10 the digits'; else none."""
    if num_classes == 1000:
        return tuple((Path(__file__).parent / "imagenet_classes.txt").read_text().splitlines())
    return DIGITS if num_classes == 10 else ()


def name_of(label: int, num_classes: int) -> str:
    """What a picture of class ``label`` is called: its name, or the number where there is none."""
    names = class_names(num_classes)
    return names[label] if names and num_classes != 10 else str(label)


def parse_classes(text: str, num_classes: int, option: str = "--classes") -> tuple[int, ...]:
    """``207,3-5,golden retriever`` to classes in that order. Names may be written in any case.

    Raises:
        UserError: a part that is no number, range or name, or a class that does not exist.
    """
    known = {name.casefold(): label for label, name in enumerate(class_names(num_classes))}
    labels: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        if part.casefold() in known:
            labels.append(known[part.casefold()])
        elif first.isdecimal() and (not dash or last.isdecimal()) and int(first) <= int(last or first) < num_classes:
            labels += range(int(first), int(last or first) + 1)
        else:
            hint = "" if part.replace("-", "").isdecimal() or not known else f"; {nearest(part.casefold(), known)}"
            raise UserError(
                f"{option} {text!r}: {part!r} is no class; use numbers or ranges from 0 to {num_classes - 1}"
                + (", or names" if known else "")
                + hint
            )
    return tuple(labels)
