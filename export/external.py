"""Which files beside an ONNX graph hold its weights, read from the graph without loading it.

An ONNX file is protobuf: fields with a number and a wire type, of which messages are length-delimited bytes. Only those
on the way to tensors are entered, so that a graph of gigabytes costs what its nodes do.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ddfast.errors import UserError
from ddfast.files import require_file

WAYS = {  # message, and of its fields those that lead to tensors, by number
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {1: "key", 2: "value"},
}
DEEPEST = 64


def external_files(path: Path) -> set[str]:
    """Locations, as the graph writes them, of tensors that are kept outside of it.

    Raises UserError for a file that is no ONNX graph.
    """
    require_file(path)
    if not path.stat().st_size:
        raise UserError(f"{path} is empty; export the student again")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data, 0, len(data), "model", 0))
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no ONNX graph ({error}); export the student again") from error


def _locations(data: mmap.mmap, start: int, stop: int, message: str, depth: int) -> Iterator[str]:
    if depth > DEEPEST:
        raise ValueError("graphs within graphs")
    for field, first, last in _fields(data, start, stop):
        inside = WAYS[message].get(field)
        if inside == "entry":
            entry = {WAYS["entry"].get(f): data[a:b].decode() for f, a, b in _fields(data, first, last)}
            if entry.get("key") == "location":
                yield entry.get("value", "")
        elif inside is not None:
            yield from _locations(data, first, last, inside, depth + 1)


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of the length-delimited fields of a message; the others are passed over."""
    while start < stop:
        tag, start = _varint(data, start, stop)
        kind = tag & 7
        if kind == 0:
            _, start = _varint(data, start, stop)
        elif kind == 2:
            size, start = _varint(data, start, stop)
            if size > stop - start:
                raise ValueError("a field is longer than its message")
            yield tag >> 3, start, start + size
            start += size
        elif kind in (1, 5):
            start += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
    if start > stop:
        raise ValueError("a message ends within a field")


def _varint(data: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if start >= stop:
            raise ValueError("it is cut short")
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise ValueError("a number is too long")
