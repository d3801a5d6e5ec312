"""``ddfast info``: the zoo, and which weights are found where."""

from __future__ import annotations

from .parser import Parser

DESCRIPTION = """\
List every teacher, student and tokenizer that ddfast knows, their sizes and groups, and whether their weights are at
hand.

Weights are looked for under their released names (or NAME.safetensors) in the folders of $DDFAST_WEIGHTS,
in ./weights and in ~/.cache/ddfast."""


def make_parser() -> Parser:
    return Parser("info", DESCRIPTION, work="info:run")
