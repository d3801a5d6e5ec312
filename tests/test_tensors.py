"""Files of weights as people have them: packed anew, cut, of another sort, or not readable at all."""

from __future__ import annotations

import argparse
import builtins
import errno
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from torch import Tensor, nn

from ddfast import tensors
from ddfast.errors import UserError
from ddfast.models.checkpoints import read_copies, read_tensors
from ddfast.tensors import check_finite, read_checkpoint, read_note, read_safetensors

WEIGHTS = {f"features.{i}.weight": torch.randn(4, 3, 3, 3) for i in range(6)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def repacked(source: Path, target: Path, method: int) -> Path:
    """What a zip program makes of a checkpoint."""
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(target, "w", method) as b:
        for entry in a.namelist():
            b.writestr(entry, a.read(entry))
    return target


@pytest.mark.parametrize("weights", [WEIGHTS, {"smooth": torch.arange(4096.0)}, {"a": torch.arange(7)}], ids=len)
def test_a_compressed_checkpoint_is_read_as_what_it_holds(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / "plain.pth")
    for name, method in (("stored", zipfile.ZIP_STORED), ("packed", zipfile.ZIP_DEFLATED)):
        path = repacked(tmp_path / "plain.pth", tmp_path / f"{name}.pth", method)
        assert same(read_checkpoint(path), weights)


def test_a_method_that_torch_does_not_know_is_a_sentence(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "plain.pth")
    path = repacked(tmp_path / "plain.pth", tmp_path / "packed.pth", zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match="packed.pth cannot be read as a PyTorch checkpoint"):
        read_checkpoint(path)


TEXTS = {
    "error code: 1015": "holds text in place of weights, 16 bytes that begin with 'error code: 1015'; download",
    "Rate limit exceeded": "holds text",
    "Entry not found\n": "begin with 'Entry not found'",
    "<!doctype html>\n<html>404</html>": "holds a web page in place of weights",
    "é" * 200: "holds text",
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "is a Git LFS pointer, .* run `git lfs pull`",
    "": "is empty",
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_in_place_of_weights_is_shown(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"var_d16{suffix}"
    path.write_text(text)
    with pytest.raises(UserError, match=TEXTS[text]) as error:
        read_copies(path)
    assert "weights_only" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cut_anywhere_is_a_sentence(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "cut.pth"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for size in sorted({*range(0, 40), *range(0, len(data), len(data) // 40), len(data) - 1}):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.pth (cannot be read|is damaged|is empty|holds)"):
            read_copies(path)


def test_damaged_pickles_are_sentences(tmp_path: Path) -> None:
    path, rng = tmp_path / "odd.pth", np.random.default_rng(0)
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for _ in range(60):
        broken = bytearray(data)
        broken[rng.integers(300)] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            read_copies(path)  # an old file has no checksum: a bit of a name can pass
        except UserError as error:
            assert "weights_only" not in str(error)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (builtins.exec, ("raise SystemExit('code from the file has run')",))


@pytest.mark.parametrize(
    ("what", "named"),
    [({"a": Bomb()}, "exec"), (nn.Linear(3, 3), "torch.nn.modules.linear.Linear"), ({"f": os.getcwd}, "getcwd")],
)
def test_a_program_is_not_run_and_not_advised(tmp_path: Path, what: object, named: str) -> None:
    path = tmp_path / "module.pth"
    torch.save(what, path)
    with pytest.raises(UserError, match=f"module.pth holds more than weights: objects of .*{named}") as error:
        read_copies(path)
    assert "weights_only" not in str(error.value) and "state_dict()" in str(error.value)
    path.write_bytes(pickle.dumps(what if isinstance(what, dict) else {"a": Bomb()}))
    with pytest.raises(UserError, match="module.pth"):
        read_copies(path)


def test_numbers_of_numpy_and_arguments_may_ride_along(tmp_path: Path) -> None:
    path = tmp_path / "number.pth"
    beside = {"best_fid": np.float64(3.2), "epoch": np.int64(3), "done": np.bool_(True)}
    beside["args"] = argparse.Namespace(lr=1)
    torch.save({"model": WEIGHTS, **beside}, path)
    assert same(read_copies(path)["raw"], WEIGHTS)
    torch.save({"model": WEIGHTS, "list": np.array([None, 1], dtype=object)}, path)
    with pytest.raises(UserError, match="holds more than weights"):
        read_copies(path)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "sparse, quantised or empty"),
    ],
    ids=["sparse", "meta", "quantised", "conjugate"],
)
def test_tensors_that_are_no_plain_ones_are_named(tmp_path: Path, make: Callable[[], Tensor], what: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": WEIGHTS | {"odd.weight": make()}}, path)
    with pytest.raises(UserError, match=f"w.pth is no state dict that can be read: odd.weight is .*{what}"):
        read_copies(path)


def test_keys_that_are_no_names_are_no_state_dict(tmp_path: Path) -> None:
    torch.save({3: torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read_copies(tmp_path / "w.pth")


def test_a_hash_in_an_old_files_name_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "vgg16-397923af.pth"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert same(read_tensors(path), WEIGHTS)
    assert "vgg16-397923af.pth is not the published file, or it is damaged" in caplog.text
    caplog.clear()
    right = path.with_name(f"vgg16-{tensors.file_sha256(path)[:8]}.pth")
    path.rename(right)
    assert same(read_tensors(right), WEIGHTS) and not caplog.records


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_that_are_not_finite_are_named(bad: float, dtype: torch.dtype) -> None:
    fine = {"a": torch.zeros(0), "b": torch.arange(3), "c": torch.full((4,), torch.finfo(dtype).max, dtype=dtype)}
    check_finite(fine, "x.pth")
    broken = torch.ones(5, 2, dtype=dtype)
    broken[3, 1] = bad
    with pytest.raises(UserError, match="x.pth holds weights that are not finite: 1 of the 10 in d"):
        check_finite(fine | {"d": broken}, "x.pth")


def test_safetensors_are_read_without_mapping_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems that cannot map files, and under names that are not UTF-8."""
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(WEIGHTS, path, {"ddfast": "{}"})
    want = read_safetensors(path)

    def unmapped(*_: object) -> None:
        raise OSError("No such device (os error 19)")

    monkeypatch.setattr(tensors, "safe_open", unmapped)
    got = read_safetensors(path)
    assert got[0] == want[0] == {"ddfast": "{}"} and same(got[1], want[1])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="w.safetensors is damaged or cut short"):
        read_safetensors(path)


def test_a_path_that_is_not_utf8_is_a_path(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd6\xd0"))
    folder.mkdir()
    safetensors.torch.save_file(WEIGHTS, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(folder / "w.safetensors")
    torch.save(WEIGHTS, folder / "w.pth")
    assert same(read_safetensors(folder / "w.safetensors")[1], WEIGHTS)
    assert same(read_checkpoint(folder / "w.pth"), WEIGHTS)


@pytest.mark.parametrize("read", [read_safetensors, read_checkpoint])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_file_that_cannot_be_opened_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object], number: int
) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"sound")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError) as error:
        read(path)
    assert error.value.errno == number


def test_a_note_is_an_object(tmp_path: Path) -> None:
    assert read_note(tmp_path, {"ddfast": '{"a": 1}'}, "bundle") == {"a": 1}
    for metadata, message in (({}, "is no bundle"), ({"ddfast": "[]"}, "is no object"), ({"ddfast": "{"}, "not JSON")):
        with pytest.raises(UserError, match=message):
            read_note(tmp_path, metadata, "bundle")


def test_no_note_of_torchs_reaches_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"a": Bomb()}, tmp_path / "w.pth")
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError):
        read_checkpoint(tmp_path / "w.pth")
    assert "weights_only" not in caplog.text
