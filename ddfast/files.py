"""Files that appear whole or not at all, locks, and the one rule for what an output may already hold.

The rule: an output folder is absent, empty, or of the same kind (:func:`check_folder`); an output file is absent or a
regular file of the same kind (:func:`check_file`). Nothing else is written to, no link is followed, and what is swept
away are temporary files under ddfast's own names whose writer is gone.

Where a file system has no hard links, locks or synchronised folders, work goes on with a weaker promise, said once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
"""Names of what is being written, here as a hidden neighbour of ``name``."""
LOCK = ".lock"
UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.ENOTTY}
"""What file systems answer to what they do not have."""
NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EMLINK, errno.EXDEV}
SYSTEM = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EMFILE", "ENFILE", "EIO", "ENOMEM", "ESTALE", "ETIMEDOUT", "ENODEV", "EREMOTEIO")
    if hasattr(errno, name)
}
"""Errors that say nothing of a file's content: it may be sound, and must not be called damaged."""
TIDY = ("lost+found",)  # of a file system's own


@functools.cache
def say_once(text: str) -> None:
    """Tell the user something that holds for the whole process."""
    logging.getLogger("ddfast").warning(text)


# --- reading


def require_file(path: Path) -> None:
    """Raise UserError unless ``path`` is a regular file, or a link to one: a FIFO or a device would be read for ever.

    Raises OSError where that cannot be seen.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")


def require_readable(path: Path) -> None:
    """:func:`require_file`, opened once, so that what keeps a sound file from being read is told from damage.

    Raises OSError: no permission, too many open files, an I/O error.
    """
    require_file(path)
    with open(path, "rb") as file:
        file.read(1)


def of_the_system(error: BaseException) -> bool:
    """Whether an error is of the system that reads a file, rather than of what is in it."""
    return isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno in SYSTEM


def is_file(path: Path) -> bool:
    """Whether a regular file is there, as far as this user can see."""
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISREG(os.stat(path).st_mode)
    return False


def is_text(path: Path) -> bool:
    """Whether a path is UTF-8, as what opens files by name outside of Python wants it."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def file_sha256(path: Path) -> str:
    """Hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def home(*parts: str, variable: str | None = None) -> Path | None:
    """A folder below the user's home, or below the one that the environment ``variable`` names; None without either,
    as in a container that runs under a number without a name.

    ``variable`` replaces the first of ``parts``.
    """
    named = os.environ.get(variable, "") if variable else ""
    if named:
        return Path(named, *parts[1:])
    with contextlib.suppress(RuntimeError, KeyError):
        return Path.home().joinpath(*parts)
    return None


# --- writing


def open_temporary(path: Path) -> BinaryIO:
    """A new locked file beside ``path``. The lock tells :func:`remove_abandoned` that its writer lives."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115 - closed by the caller
        _lock(file.fileno(), path.parent)
        if temporary.exists():
            return file
        file.close()  # swept away between creation and lock: take another


@contextlib.contextmanager
def writing(path: Path, publish: Callable[[str, Path], None] | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary file; on success fsync it and ``publish(temporary, path)``, by default os.replace, otherwise
    remove it.

    An OSError without a name of its own, such as that of a full disk, gets ``path``'s.
    """
    try:
        with open_temporary(path) as file:
            try:
                yield file
                file.flush()
                _fsync(file.fileno(), path.parent)
                (publish or os.replace)(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """:func:`writing` for an output that stands alone: makes its folder, and sweeps away what a killed writer of the
    same name left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    with writing(path) as file:
        yield file


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing it, so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        file.write(data)


def create_once(path: Path, data: bytes) -> bool:
    """Like :func:`write_atomic`, but never over an existing file; False if there was one. Safe between processes where
    the file system has hard links."""

    def link(temporary: str, target: Path) -> None:
        try:
            os.link(temporary, target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            say_once(f"the file system of {path.parent} has no hard links: let no two commands begin there at once")
            os.replace(temporary, target)
        else:
            os.unlink(temporary)

    try:
        with writing(path, link) as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _fsync(descriptor, folder)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int, folder: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        say_once(f"the file system of {folder} does not synchronise: a power cut may lose the newest files")


# --- locks and leftovers


def _lock(descriptor: int, folder: Path, flags: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file; False where its file system has no locks. BlockingIOError where another process has it."""
    try:
        fcntl.flock(descriptor, flags)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        say_once(f"the file system of {folder} has no locks: let no two commands write there at once")
        return False
    return True


def locked(folder: Path) -> BinaryIO:
    """A file in ``folder`` that this process alone has locked, until it is closed or the process ends.

    Raises UserError where another process has it, or its name stands for something else than a file.
    """
    path, flags = folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError(f"{path} is not a lock file of ddfast; remove it, or choose another --out")
        file = os.fdopen(os.open(path, flags, 0o666), "r+b")
        try:
            _lock(file.fileno(), folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False)):
                    return file
        except BlockingIOError:
            file.close()
            raise UserError(f"another process is writing to {folder}; wait for it, or choose another --out") from None
        except BaseException:
            file.close()
            raise
        file.close()  # removed or replaced since it was opened: take the one that is there now


def unlock(file: BinaryIO, folder: Path) -> None:
    """Let go of :func:`locked`, and leave no file of it."""
    (folder / LOCK).unlink(missing_ok=True)
    file.close()


def remove_abandoned(folder: Path, *names: str) -> None:
    """Delete temporary files in ``folder`` whose writer is gone (nobody holds their lock).

    ``names``: patterns such as "shard-*.safetensors" of the files they were to become; others are left alone.
    """
    for name in _temporaries(folder, names):
        with contextlib.suppress(OSError):  # gone, somebody else's, or its writer lives
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
                if regular and _lock(descriptor, folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    os.unlink(folder / name)
            finally:
                os.close(descriptor)


def remove_abandoned_folders(folder: Path, *names: str) -> None:
    """The same of temporary folders, each of which holds a :func:`locked` file of its writer."""
    for name in _temporaries(folder, names):
        path = folder / name
        if path.is_symlink() or not (path / LOCK).is_file():
            continue
        with contextlib.suppress(UserError, OSError), locked(path):
            shutil.rmtree(path, ignore_errors=True)


def _temporaries(folder: Path, names: Collection[str]) -> list[str]:
    """Names of temporary entries that were to become files of these ``names``."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = TEMPORARY.fullmatch(entry.name)
            if match and any(match["name"] == name or fnmatch.fnmatchcase(match["name"], name) for name in names):
                found.append(entry.name)
    return found


# --- what an output may already hold


def check_writable(folder: Path) -> None:
    """Raise UserError unless ``folder`` is, or could be made, a folder to write to; it is not made."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise UserError(f"{there} is not a folder; choose another place than {folder}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} may not be written to; choose another place than {folder}")


def check_folder(
    folder: Path, what: str, is_ours: Callable[[Path], bool] = lambda folder: False, names: Collection[str] = ()
) -> None:
    """The rule for an output folder: absent, empty, or of the same kind.

    Args:
        folder: nothing is made or changed.
        what: the kind, for the message: "pairs".
        is_ours: whether a folder with something in it is of that kind, and goes on.
        names: patterns of entries that do not make a folder another one.

    Raises:
        UserError: it cannot be written to, or holds something else.
    """
    check_writable(folder)
    if not folder.is_dir() or is_ours(folder):
        return
    with os.scandir(folder) as entries:
        visible = sorted(entry.name for entry in entries if entry.name[0] != "." and entry.name not in TIDY)
    for name in visible:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
            raise UserError(f"{folder} holds {name!r}, but no {what}; choose another --out, or an empty folder")


def check_file(path: Path, what: str, is_ours: Callable[[Path], bool] = lambda path: True) -> None:
    """The rule for an output file: absent, or a regular file of the same kind, which is replaced.

    Args:
        path: nothing is made or changed.
        what: the kind, for the message: "a picture".
        is_ours: whether an existing file is of that kind.

    Raises:
        UserError: its folder cannot be written to, or something else is there, a link included.
    """
    check_writable(path.parent)
    if not os.path.lexists(path):
        return
    if path.is_symlink():
        raise UserError(f"{path} is a link, and links are not written through; name the file itself, or another")
    require_file(path)
    if not is_ours(path):
        raise UserError(f"{path} exists and is not {what}; choose another name, or remove it")


def check_room(path: Path, need: int, what: str, advice: str) -> None:
    """Raise UserError where the disk of ``path``, which need not exist, has less than ``need`` bytes for ``what``."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(
            f"{what} need about {readable(need)}, but {there} has {readable(free)} free; make room, {advice}"
        )


def readable(size: float) -> str:
    """Bytes for people.

    >>> readable(1000), readable(3 << 30)
    ('1000 bytes', '3.0 GiB')
    """
    if size < 1 << 10:
        return f"{size:.0f} bytes"
    power = min(4, (int(size).bit_length() - 1) // 10)
    return f"{size / (1 << 10 * power):,.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def starts_with(*magic: bytes) -> Callable[[Path], bool]:
    """For :func:`check_file`: whether a file begins with one of these, or is empty."""

    def check(path: Path) -> bool:
        with open(path, "rb") as file:
            head = file.read(max(map(len, magic)))
        return not head or head.startswith(magic)

    return check
