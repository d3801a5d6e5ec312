"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

TEMPORARY_SUFFIX = ".tmp"
LOCK = ".lock"


def open_temporary(path: Path) -> BinaryIO:
    """A new locked file beside ``path``. The lock tells :func:`remove_abandoned` that its writer lives."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        file = open(temporary, "xb")  # noqa: SIM115 - closed by the caller
        fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return file
        file.close()  # swept away between creation and lock: take another


@contextlib.contextmanager
def writing(path: Path, publish: Callable[[str, Path], None]) -> Iterator[BinaryIO]:
    """Yield a temporary file; on success fsync it and ``publish(temporary, path)``, otherwise remove it."""
    with open_temporary(path) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            publish(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing it, so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, os.replace) as file:
        file.write(data)


def create_once(path: Path, data: bytes) -> bool:
    """Like :func:`write_atomic`, but never over an existing file; False if there was one. Safe between processes."""

    def link(temporary: str, target: Path) -> None:
        os.link(temporary, target)
        os.unlink(temporary)

    try:
        with writing(path, link) as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def locked(folder: Path) -> BinaryIO:
    """A file in ``folder`` that this process alone has locked, until it is closed or the process ends.

    Raises UserError where another process has it.
    """
    file = open(folder / LOCK, "wb")  # noqa: SIM115 - closed by the caller
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another process is writing to {folder}; wait for it, or choose another --out") from None
    return file


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files in ``folder`` whose writer is gone (nobody holds their lock)."""
    for temporary in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(temporary, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raise UserError unless ``folder`` is, or could be made, a folder to write to; it is not made."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{there} is not a folder; choose another place than {folder}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} may not be written to; choose another place than {folder}")


def file_sha256(path: Path) -> str:
    """Hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()
