"""Records as JSON: read strictly, restored to their types, signed, and laid side by side."""

from __future__ import annotations

import hashlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UserError
from .files import require_file

SHOWN = 24  # characters of a value: hashes are longer
CHECKSUM = "checksum"
LEAST_INT, MOST_INT = -(2**63), 2**64 - 1
LONGEST = 200  # characters of a name


# --- reading


def parse_json(data: bytes | str, where: object) -> Any:
    """What JSON text says; UserError naming ``where`` for anything else, NaN and infinities included."""
    try:
        return json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = "brackets within brackets" if isinstance(error, RecursionError) else error
        raise UserError(f"{where} is damaged, or is not JSON ({reason})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        _refuse(text)
    return value


def read_json(path: Path) -> Any:
    """What a JSON file says; UserError where it is missing, no regular file, or says something else."""
    require_file(path)
    return parse_json(path.read_bytes(), path)


def read_object(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None where there is no such file, or it holds something else."""
    try:
        record = read_json(path)
    except (UserError, OSError):
        return None
    return record if isinstance(record, dict) else None


def restore(kind: Any, value: Any, where: str) -> Any:
    """``value``, read from JSON, as the annotated type ``kind``.

    Lists become tuples where these are meant; a dataclass's fields with defaults may be missing. Integers lie within
    64 bits.

    Raises:
        UserError: naming the place where it does not fit.
    """
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        return _restore_fields(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for choice in args:
            try:
                return restore(choice, value, where)
            except UserError:
                continue
    elif origin in (list, Sequence) and isinstance(value, list):
        return [restore(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    elif origin is tuple and isinstance(value, list) and (args[-1] is ... or len(args) == len(value)):
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        return tuple(restore(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {key: restore(args[1], v, f"{where}[{key!r}]") for key, v in value.items()}
    elif kind is float and (type(value) is float or type(value) is int and abs(value) <= MOST_INT):
        return float(value)
    elif kind is int and type(value) is int:
        if LEAST_INT <= value <= MOST_INT:
            return value
    elif (kind is types.NoneType and value is None) or type(value) is kind or (origin is Literal and value in args):
        return value
    raise UserError(f"{where} is {_briefly(value)}; it must be {_name(kind)}")


def _restore_fields(kind: Any, value: Any, where: str) -> Any:
    entries = restore(dict[str, Any], value, where)
    known = {field.name: field for field in fields(kind)}
    needed = {n for n, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    for problem, keys in (("lacks", needed - entries.keys()), ("has the unknown", entries.keys() - known.keys())):
        if keys:
            raise UserError(f"{where} {problem} key {', '.join(map(repr, sorted(keys)))}")
    hints = get_type_hints(kind)
    values = {name: restore(hints[name], entries[name], f"{where}.{name}") for name in entries}
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _name(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_name, args))
    if kind is types.NoneType:
        return "null"
    return str((origin or kind).__name__)


def _briefly(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def check_name(name: object, where: object) -> str:
    """``name`` as it may go into scripts, server configurations and terminals: one printable line.

    Raises UserError for anything else, so that no file's name is read as a command elsewhere.
    """
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST:
        raise UserError(f"{where} has the name {_briefly(name)}; names are up to {LONGEST} printable characters")
    return name


# --- signatures


def checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a record without its ``checksum``, hexadecimal."""
    unsigned = {name: value for name, value in record.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its checksum."""
    return {**record, CHECKSUM: checksum(record)}


def check_if_signed(record: dict[str, Any], where: object, fix: str) -> dict[str, Any]:
    """A record of today's or yesterday's, without what signs it. Those from before signatures have no ``format``.

    Raises UserError for one that has either mark of a signature, and not the right one.
    """
    if CHECKSUM in record or "format" in record:
        check_signature(record, where, fix)
    return {name: value for name, value in record.items() if name not in (CHECKSUM, "format")}


def check_signature(record: Mapping[str, Any], where: object, fix: str) -> None:
    """Raise UserError for a record whose checksum is another, or missing."""
    if record.get(CHECKSUM) != checksum(record):
        raise UserError(f"{where} was changed: its checksum does not match; {fix}")


# --- side by side


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """``name is OLD, not NEW`` for every entry that differs; entries of nested records as ``record.name``."""
    lines = []
    for name in sorted(there.keys() | wanted.keys()):
        old, new = there.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{name}.{line}" for line in differences(old, new)]
        elif old != new:
            lines.append(f"{name} is {shortened(old)}, not {shortened(new)}")
    return lines


def shortened(value: object) -> str:
    text = str(value)
    hexadecimal = len(text) > SHOWN and set(text) <= set("0123456789abcdef")
    return text[:16] + "…" if hexadecimal else text
