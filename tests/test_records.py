"""Records: JSON read strictly, restored to their types, and signed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddfast.errors import UserError
from ddfast.records import (
    check_name,
    check_signature,
    checksum,
    parse_json,
    read_json,
    read_object,
    restore,
    signed,
)


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...]
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.share > 1:
            raise UserError(f"share is {self.share}; it must be at most 1")


@dataclass(frozen=True)
class Outer:
    count: int
    kind: Literal["a", "b"]
    inner: Inner
    size: tuple[int, int] | None = None
    notes: Mapping[str, Any] | None = None


GOOD: dict[str, Any] = {"count": 3, "kind": "a", "inner": {"names": ["x", "y"]}}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1,]", "nul", "[" * 5000 + "]" * 5000, "1" * 5000, "NaN", "[Infinity]", "1e999", "-1e999", "{'a': 1}"],
)
def test_what_is_no_json_is_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match="^x.json is damaged, or is not JSON"):
        parse_json(text, "x.json")
    with pytest.raises(UserError, match="^x.json"):
        parse_json(b"\xff" + text.encode(), "x.json")


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_a_sentence(data: bytes) -> None:
    try:
        parse_json(data, "x")
    except UserError:
        pass


def test_files_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="a.json does not exist"):
        read_json(path)
    assert read_object(path) is None
    for text, want in (("[1]", None), ("{", None), ('{"a": 1}', {"a": 1})):
        path.write_text(text)
        assert read_object(path) == want


def test_a_record_is_restored_to_its_types() -> None:
    assert restore(Outer, GOOD, "r") == Outer(3, "a", Inner(("x", "y")))
    whole = GOOD | {"size": [1, 2], "notes": {"n": None}, "inner": {"names": [], "share": 1}}
    got = restore(Outer, json.loads(json.dumps(whole)), "r")
    assert got == Outer(3, "a", Inner((), 1.0), (1, 2), {"n": None}) and isinstance(got.inner.share, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "3"}, r"r.count is '3'; it must be int"),
        ({"count": 3.0}, r"r.count is 3.0; it must be int"),
        ({"count": True}, r"r.count is True; it must be int"),
        ({"count": 2**64}, r"r.count is 18446744073709551616; it must be int"),
        ({"kind": "c"}, r"r.kind is 'c'; it must be 'a' or 'b'"),
        ({"inner": {"names": ["x", 1]}}, r"r.inner.names\[1\] is 1; it must be str"),
        ({"inner": {"names": "xy"}}, r"r.inner.names is 'xy'; it must be tuple"),
        ({"inner": {"names": [], "share": "1"}}, r"r.inner.share is '1'; it must be float"),
        ({"inner": {"names": [], "share": 10**30}}, r"share is 1000.*; it must be float"),
        ({"inner": {"names": [], "share": 2}}, r"r.inner: share is 2.0; it must be at most 1"),
        ({"inner": []}, r"r.inner is \[\]; it must be dict"),
        ({"size": [1, 2, 3]}, r"r.size is \[1, 2, 3\]; it must be tuple or null"),
        ({"notes": 5}, r"r.notes is 5; it must be Mapping or null"),
        ({"more": 1}, r"r has the unknown key 'more'"),
        ({"count": ...}, r"r lacks key 'count'"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    record = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    with pytest.raises(UserError, match=message):
        restore(Outer, record, "r")


def test_every_change_breaks_a_signature() -> None:
    record = signed(GOOD)
    check_signature(record, "r", "fix")
    assert checksum(record) == checksum(GOOD) == record["checksum"]
    for changed in (record | {"count": 4}, record | {"new": 1}, {k: v for k, v in record.items() if k != "kind"}):
        with pytest.raises(UserError, match="r was changed: its checksum does not match; fix"):
            check_signature(changed, "r", "fix")
    with pytest.raises(UserError, match="was changed"):
        check_signature(GOOD, "r", "fix")


@pytest.mark.parametrize("name", ["", "x\ny", "x\x1b[31m", "\u2028", "x" * 201, None, 3, "tab\t"])
def test_names_that_would_be_read_as_something_else_are_refused(name: object) -> None:
    with pytest.raises(UserError, match="here has the name .* names are up to 200 printable characters"):
        check_name(name, "here")


def test_names_of_people_are_names() -> None:
    for name in ("var-d16", "été", "my [red] student", "a b"):
        assert check_name(name, "here") == name
