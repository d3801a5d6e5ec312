"""Names of classes: ImageNet's thousand with their WordNet ids, and the ten digits."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..errors import UserError
from .zoo import nearest

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@cache
def _imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(WordNet ids, names) in the order of labels."""
    lines = (Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    ids, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
    return ids, names


def class_names(num_classes: int) -> tuple[str, ...]:
    """One name a class where these are known: of 1000 classes ImageNet's, of 10 the digits'; else none."""
    return _imagenet()[1] if num_classes == 1000 else DIGITS if num_classes == 10 else ()


def name_of(label: int, num_classes: int) -> str:
    """What a picture of class ``label`` is called: its name, or the number where there is none."""
    names = class_names(num_classes)
    return names[label] if names and num_classes != 10 else str(label)


def parse_classes(text: str, num_classes: int, option: str = "--classes") -> tuple[int, ...]:
    """``207,3-5,golden retriever,n02099601`` to classes in that order.

    Names may be written in any case, and with underscores, unless only the case tells two apart: "Cardigan" is a dog,
    "cardigan" a garment.

    Raises:
        UserError: a part that is no number, range, name or WordNet id, or a class that does not exist.
    """
    labels: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        if named := _named(part, num_classes, option):
            labels.append(named[0])
        elif _number(first) and (not dash or _number(last)) and int(first) <= int(last or first) < num_classes:
            labels += range(int(first), int(last or first) + 1)
        else:
            raise UserError(
                f"{option} {text[:200]!r}: {part[:60]!r} is no class; use numbers or ranges from 0 to {num_classes - 1}"
                + _hint(part, num_classes)
            )
    return tuple(labels)


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def _named(part: str, num_classes: int, option: str) -> list[int]:
    """The class of a name, in a list; none where it names none. UserError where it names two."""
    names, wanted = class_names(num_classes), " ".join(part.replace("_", " ").split())
    if wanted in names:
        return [names.index(wanted)]
    if num_classes == 1000 and part in _imagenet()[0]:
        return [_imagenet()[0].index(part)]
    found = [label for label, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if len(found) > 1:
        both = " and ".join(f"{names[label]} ({label})" for label in found)
        raise UserError(f"{option}: {part!r} may be {both}; write one of these")
    return found


def _hint(part: str, num_classes: int) -> str:
    """What to say besides the numbers: that there are names, and which ones are like this one."""
    names = class_names(num_classes)
    if not names:
        return ""
    also = ", names or WordNet ids" if num_classes == 1000 else ", or names"
    if not part or part.replace("-", "").isdecimal():
        return also
    return f"{also}; {nearest(part.replace('_', ' ').casefold(), names)}"
