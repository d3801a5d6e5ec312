"""Files that appear whole or not at all, on file systems of every sort, and what an output may already hold."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddfast import files
from ddfast.errors import UserError
from ddfast.files import (
    check_file,
    check_folder,
    create_once,
    fsync_folder,
    home,
    is_file,
    locked,
    open_temporary,
    remove_abandoned,
    remove_abandoned_folders,
    replacing,
    require_file,
    require_readable,
    starts_with,
    unlock,
    write_atomic,
    writing,
)


@pytest.fixture(autouse=True)
def _say_again() -> None:
    files.say_once.cache_clear()


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# --- file systems that lack something


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links_a_file_is_still_created_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "manifest.json"
    assert create_once(path, b"first") and not create_once(path, b"second")
    assert path.read_bytes() == b"first" and names(tmp_path) == {"manifest.json"}
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "has no hard links" in caplog.text


def test_an_error_that_is_no_lack_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left on device: .*manifest.json"):
        create_once(tmp_path / "manifest.json", b"x")
    assert not names(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_without_synchronised_folders_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a", b"1")
    fsync_folder(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"1" and caplog.text.count("does not synchronise") == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_work_goes_on_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    left = tmp_path / ".a.01234567.tmp"
    left.write_bytes(b"half")
    with locked(tmp_path):
        write_atomic(tmp_path / "a", b"1")
    remove_abandoned(tmp_path, "a")
    assert (tmp_path / "a").read_bytes() == b"1" and left.exists(), "its writer may be alive"
    assert caplog.text.count("has no locks") == 1


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device: .*x.npz") as error, writing(tmp_path / "x.npz") as file:
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() has it, without a name
    assert error.value.filename == str(tmp_path / "x.npz") and not names(tmp_path)


def test_without_a_home_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    assert home("a", "b") == Path.home() / "a" / "b"
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert home(".cache", "ddfast") is None and home(".local/state", "x", variable="XDG_STATE_HOME") is None
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert home(".local/state", "x", variable="XDG_STATE_HOME") == Path("/state/x")


# --- locks and leftovers


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_bytes(b"mine")
    run.mkdir()
    (run / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.lock is not a lock file of ddfast"):
        locked(run)
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock is not a lock file of ddfast"):
        locked(tmp_path)


def test_a_lock_keeps_what_is_in_it_and_is_one_processs(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"somebody's")
    with locked(tmp_path):
        with pytest.raises(UserError, match="another process is writing to"):
            locked(tmp_path)
    assert (tmp_path / ".lock").read_bytes() == b"somebody's"
    unlock(locked(tmp_path), tmp_path)
    assert not names(tmp_path)


def test_a_lock_removed_by_its_holder_is_taken_anew(tmp_path: Path) -> None:
    """Who opened the file that is gone by now must not believe that it has the folder."""
    first, got = locked(tmp_path), []
    plain = fcntl.flock

    def flock(descriptor: int, flags: int) -> None:
        if not got:
            got.append(True)
            unlock(first, tmp_path)  # between the other's opening and its locking
        plain(descriptor, flags)

    files.fcntl.flock, kept = flock, files.fcntl.flock  # type: ignore[assignment]
    try:
        with locked(tmp_path) as second:
            assert os.path.samestat(os.fstat(second.fileno()), os.stat(tmp_path / ".lock"))
    finally:
        files.fcntl.flock = kept


def test_only_own_names_are_swept(tmp_path: Path) -> None:
    mine = [".notes.tmp", ".notes.01234567.tmp", ".shard-00001.safetensors.0123.tmp", "x.tmp", ".x.0123456g.tmp"]
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    os.mkfifo(tmp_path / ".shard-00003.safetensors.01234567.tmp")  # opening it would wait for ever
    (tmp_path / ".shard-00004.safetensors.01234567.tmp").mkdir()
    (tmp_path / ".shard-00005.safetensors.01234567.tmp").symlink_to(tmp_path / ".notes.tmp")
    odd = {p.name for p in tmp_path.iterdir()}
    dead = tmp_path / ".shard-00002.safetensors.01234567.tmp"
    dead.write_bytes(b"half")
    with open_temporary(tmp_path / "shard-00006.safetensors") as living:
        remove_abandoned(tmp_path, "shard-*.safetensors")
        assert names(tmp_path) == odd | {Path(living.name).name}


def test_a_single_output_sweeps_what_a_killed_writer_left(tmp_path: Path) -> None:
    for name in (".x.npz.01234567.tmp", ".y.npz.01234567.tmp", ".x[1].npz.01234567.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with replacing(tmp_path / "x.npz") as file:
        file.write(b"whole")
    with replacing(tmp_path / "x[1].npz") as file:
        file.write(b"whole")
    assert names(tmp_path) == {"x.npz", "x[1].npz", ".y.npz.01234567.tmp"}


def test_abandoned_folders_are_those_with_a_free_lock(tmp_path: Path) -> None:
    dead, living, other = (tmp_path / f".export.0123456{i}.tmp" for i in range(3))
    for folder in (dead, living, other):
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"half")
    locked(dead).close()
    with locked(living):
        remove_abandoned_folders(tmp_path, "export")
        assert names(tmp_path) == {living.name, other.name}


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path, seen, over = tmp_path / "a", set[bytes](), threading.Event()
    write_atomic(path, b"0" * 1000)

    def read() -> None:
        while not over.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(50):
        write_atomic(path, str(i % 10).encode() * 1000)
    over.set()
    reader.join()
    assert all(len(data) == 1000 and len(set(data)) == 1 for data in seen)


# --- what an output may already hold


def test_an_output_folder_is_absent_empty_or_of_its_kind(tmp_path: Path) -> None:
    def marked(folder: Path) -> bool:
        return (folder / "mark").exists()

    check_folder(tmp_path / "new" / "deep", "pairs", marked)
    empty, ours, other = (tmp_path / name for name in ("empty", "ours", "other"))
    for folder in (empty, ours, other):
        folder.mkdir()
    (empty / ".DS_Store").touch()
    (empty / "lost+found").mkdir()
    check_folder(empty, "pairs", marked)
    for name in ("mark", "my notes.txt"):
        (ours / name).touch()
    check_folder(ours, "pairs", marked)
    (other / "holiday.jpg").touch()
    with pytest.raises(UserError, match="other holds 'holiday.jpg', but no pairs; choose another --out"):
        check_folder(other, "pairs", marked)
    check_folder(other, "pictures", names=("*.jpg",))
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "in", tmp_path / "broken"):
        with pytest.raises(UserError, match="is not a folder"):
            check_folder(path, "pairs")


def test_an_output_file_is_absent_or_of_its_kind(tmp_path: Path) -> None:
    path, check = tmp_path / "x.json", starts_with(b"{")
    check_file(path, "JSON", check)
    path.write_text("{}")
    check_file(path, "JSON", check)
    path.write_text("dear diary")
    with pytest.raises(UserError, match="x.json exists and is not JSON; choose another name, or remove it"):
        check_file(path, "JSON", check)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    with pytest.raises(UserError, match="is a link, and links are not written through"):
        check_file(link, "JSON", check)
    os.mkfifo(tmp_path / "fifo")
    for other, message in ((tmp_path, "is a folder"), (tmp_path / "fifo", "is not a regular file")):
        with pytest.raises(UserError, match=message):
            check_file(other, "JSON", check)
    with pytest.raises(UserError, match="is not a regular file"):
        check_file(Path("/dev/null"), "JSON", check)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "plain").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    for name, message in (("fifo", "is not a regular file"), ("zero", "not a regular"), ("gone", "does not exist")):
        with pytest.raises(UserError, match=message):
            require_file(tmp_path / name)
        assert not is_file(tmp_path / name)
    require_file(tmp_path / "link")
    assert is_file(tmp_path / "link") and not is_file(tmp_path) and not is_file(tmp_path / "plain" / "below")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_what_keeps_a_sound_file_from_being_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"sound")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError) as error:
        require_readable(path)
    assert error.value.errno == number and not isinstance(error.value, UserError)


def test_notes_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ddfast"):
        files.say_once("a")
        files.say_once("b")
        files.say_once("a")
    assert [r.message for r in caplog.records] == ["a", "b"]
