"""Sets of images: folders of pictures and the ADM evaluator's .npz, read, written and refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import pixels, save_npz, save_pictures
from PIL import Image
from torch import Tensor

from ddfast.errors import UserError, WorkError
from ddfast.evaluation.images import NpzImages, open_images, write_npz


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    images = pixels(12)
    save_pictures(tmp_path / "a", images)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    source = open_images(tmp_path / "a")
    assert len(source) == 12 and source.size == 16 and source.labels is None
    parts = list(source.batches(5))
    assert [len(p) for p in parts] == [5, 5, 2] and torch.equal(torch.cat(parts), images)
    assert torch.equal(torch.cat(list(source.batches(100))), images)
    assert json.loads(json.dumps(source.facts())) == {"path": str(tmp_path / "a"), "images": 12, "size": 16}


def test_gray_pictures_are_repeated(tmp_path: Path) -> None:
    gray = pixels(1)[0, 0]
    Image.fromarray(gray.numpy()).save(tmp_path / "a.webp", lossless=True)
    Image.fromarray(gray.numpy()).save(tmp_path / "b.PNG")
    images = next(open_images(tmp_path).batches(2))
    assert torch.equal(images, gray.expand(2, 3, 16, 16))


def test_folders_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            open_images(tmp_path)

    (tmp_path / "inside").mkdir()
    refused("holds no picture")
    save_pictures(tmp_path, pixels(3))
    for name, picture, message in (
        ("3.png", Image.new("RGB", (20, 20)), r"3.png is 20x20, the pictures before it 16x16; resize"),
        ("3.png", Image.new("RGB", (16, 20)), r"3.png is 16x20; crop"),
        ("3.png", Image.new("RGBA", (16, 16)), r"3.png is a picture of mode RGBA; save it as RGB"),
        ("3.jpg", Image.new("CMYK", (16, 16)), r"3.jpg is a picture of mode CMYK"),
    ):
        picture.save(tmp_path / name)
        refused(message)
        (tmp_path / name).unlink()
    (tmp_path / "3.png").write_bytes(b"no picture")
    refused("3.png cannot be read as a picture; is it complete")


def test_a_picture_cut_short_is_named(tmp_path: Path) -> None:
    save_pictures(tmp_path, pixels(3, 64))
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"1.png cannot be read as a picture; is it complete"):
        list(open_images(tmp_path).batches(2))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_the_adm_evaluator_is_read(tmp_path: Path, save: Any) -> None:
    images, labels = pixels(10), torch.arange(10) % 4
    save(tmp_path / "a.npz", images.permute(0, 2, 3, 1).numpy(), labels.numpy().astype(np.int32))
    source = open_images(tmp_path / "a.npz")
    assert len(source) == 10 and source.size == 16
    assert source.labels is not None and torch.equal(source.labels, labels)
    for _ in range(2):
        parts = list(source.batches(4))
        assert [len(p) for p in parts] == [4, 4, 2] and torch.equal(torch.cat(parts), images)


@pytest.mark.parametrize("labels", [None, torch.arange(10) % 4])
def test_an_npz_is_written_as_numpy_reads_it(tmp_path: Path, labels: Tensor | None) -> None:
    images = pixels(10)
    path = save_npz(tmp_path / "new" / "a.npz", images, labels)
    with np.load(path) as data:
        assert data["arr_0"].dtype == np.uint8 and (data["arr_0"] == images.permute(0, 2, 3, 1).numpy()).all()
        assert ("arr_1" in data) == (labels is not None)
        if labels is not None:
            assert data["arr_1"].dtype == np.int64 and (data["arr_1"] == labels.numpy()).all()
    assert save_npz(tmp_path / "b.npz", images, labels).read_bytes() == path.read_bytes()


def test_an_npz_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for batches, message in (
        ([pixels(4)], "4 images came instead of 9"),
        ([pixels(4), pixels(6)], "10 images came"),
        ([pixels(9, 8)], "not 16-pixel images"),
        ([pixels(9).float()], "a batch is torch.float32"),
    ):
        with pytest.raises(WorkError, match=message):
            write_npz(path, 9, 16, batches)
        assert list(tmp_path.iterdir()) == []


def test_an_npz_is_never_whole_in_memory(tmp_path: Path) -> None:
    """A member that claims 3 TB, and one that is cut: noticed without memory for either."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as out:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1024, 1024, 3)}
        np.lib.format.write_array_header_1_0(out, header)
        out.write(bytes(2 * 1024 * 1024 * 3))
    with pytest.raises(UserError, match=r"has 6291456 bytes, and its header says \[1000000, 1024, 1024, 3\]"):
        open_images(tmp_path / "a.npz")
    source = NpzImages(tmp_path / "a.npz", 10**6, 1024, None)
    batches = source.batches(2)
    assert next(batches).shape == (2, 3, 1024, 1024)
    with pytest.raises(UserError, match="ends in image 2 of 1000000"):
        next(batches)


def test_npz_files_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    path, images = tmp_path / "a.npz", pixels(4).permute(0, 2, 3, 1).numpy()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            open_images(path)

    refused("does not exist")
    for arrays, message in (
        ({"mu": images}, "has no arr_0, only mu"),
        ({"arr_0": images.astype(np.float32)}, r"arr_0 of .* is float32 \[4, 16, 16, 3\]; images are uint8"),
        ({"arr_0": images[:, :8]}, r"uint8 \[4, 8, 16, 3\]"),
        ({"arr_0": images.transpose(0, 3, 1, 2)}, r"uint8 \[4, 3, 16, 16\]"),
        ({"arr_0": images[:0]}, r"uint8 \[0, 16, 16, 3\]"),
        ({"arr_0": np.asfortranarray(images)}, "Fortran order"),
        ({"arr_0": images, "arr_1": np.arange(5)}, r"arr_1 of .* is int64 \[5\]; labels are 4 integers"),
        ({"arr_0": images, "arr_1": np.zeros(4)}, r"arr_1 of .* is float64"),
        ({"arr_0": images, "arr_1": np.array([None] * 4)}, "cannot be read as an .npz"),
    ):
        np.savez(path, **arrays)
        refused(message)
    path.write_bytes(b"no zip")
    refused("cannot be read as an .npz; is it complete")
    (tmp_path / "a.tar").touch()
    with pytest.raises(UserError, match="neither a folder of pictures nor an .npz"):
        open_images(tmp_path / "a.tar")


def test_damaged_bytes_of_an_npz_are_noticed(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", pixels(4, 64))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    source = open_images(path)
    with pytest.raises(UserError, match="a.npz cannot be read as an .npz; is it complete.*CRC"):
        list(source.batches(4))


def test_a_folder_of_ddfast_sample_says_how_it_was_drawn(tmp_path: Path) -> None:
    save_pictures(tmp_path, pixels(3))
    record = {"way": "1 step", "num": 3, "classes": [7, 2], "num_classes": 10}
    for classes, labels in (([7, 2], [7, 2, 7]), ("all", [0, 1, 2])):
        (tmp_path / "sampling.json").write_text(json.dumps(record | {"classes": classes}))
        images = open_images(tmp_path)
        assert images.facts()["sampling"] == record | {"classes": classes}
        assert images.labels is not None and images.labels.tolist() == labels
    (tmp_path / "sampling.json").write_text(json.dumps({"num": 3}))
    with pytest.raises(UserError, match="sampling.json lacks classes, num_classes; draw the images again"):
        open_images(tmp_path)
    (tmp_path / "sampling.json").write_text(json.dumps(record | {"num": 5}))
    with pytest.raises(UserError, match="holds 3 pictures of 5; run its `ddfast sample` once more"):
        open_images(tmp_path)
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(UserError, match="sampling.json is damaged"):
        open_images(tmp_path)
