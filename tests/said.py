"""Commands run in this process, what they say, and the tiny models that they are run with."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ddfast.cli import main

Said = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: str | Path, code: int = 2) -> str:
        """What a command says that must end with ``code``."""
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        said = capsys.readouterr()
        assert (
            not said.out
            and "Traceback" not in said.err
            and len(re.findall(r"^ddfast( \(rank \d+\))?: ", said.err, re.M)) == 1
        ), said
        return said.err

    return run


@pytest.fixture
def done(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: str | Path) -> str:
        """All that a command says that must succeed."""
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        said = capsys.readouterr()
        return said.out + said.err

    return run


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["var"]


@pytest.fixture(scope="module")
def student(pyramid_student_file: Path) -> Path:
    return pyramid_student_file


class Free:
    """Of shutil.disk_usage."""

    def __init__(self, free: int) -> None:
        self.free = free
