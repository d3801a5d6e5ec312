"""Pictures and arrays that are not what they seem: noticed, named, and drawn again where they are ddfast's own."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import Flat, digit_images, pixels, save_npz, save_pictures
from PIL import Image
from said import Said, done, refused

from ddfast import files
from ddfast.errors import UserError
from ddfast.evaluation.images import is_sound, open_images, read_sampling
from ddfast.evaluation.reference import load_reference
from ddfast.records import signed

__all__ = ["done", "refused"]  # fixtures


def in_idat(data: bytes) -> int:
    """A place within the pixels of a PNG."""
    return data.index(b"IDAT") + 12


def test_every_flipped_byte_of_a_png_is_noticed(tmp_path: Path) -> None:
    """Decoders compare no checksum of the pixels: a byte that decodes to other ones must be seen before."""
    save_pictures(tmp_path, pixels(1, 8))
    path = tmp_path / "0.png"
    data, want = path.read_bytes(), next(open_images(tmp_path).batches(1))
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            images = torch.cat(list(open_images(tmp_path).batches(1)))
        except UserError:
            continue
        assert torch.equal(images, want), position


def test_a_splice_in_a_png_is_noticed(tmp_path: Path) -> None:
    save_pictures(tmp_path, pixels(1, 64))
    path = tmp_path / "0.png"
    data = path.read_bytes()
    at = in_idat(data)
    for broken in (data[:at] + bytes(512) + data[at + 512 :], data[:at] + b"x" + data[at:], data[:-12], data[: at + 9]):
        path.write_bytes(broken)
        assert is_sound(path, 64) is False
        with pytest.raises(UserError, match="0.png cannot be read as a picture"):
            open_images(tmp_path)


def test_a_picture_of_absurd_size_is_a_sentence(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    for side in (20_000, 2**31 - 1):
        header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        (tmp_path / "0.png").write_bytes(data)
        with pytest.raises(UserError, match="0.png cannot be read as a picture"):
            list(open_images(tmp_path).batches(1))


def test_only_known_formats_are_opened(tmp_path: Path) -> None:
    """Whatever a name says: Pillow would run Ghostscript for an EPS."""
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(UserError, match="0.png cannot be read as a picture"):
        open_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png", format="GIF")
    with pytest.raises(UserError, match="0.png cannot be read as a picture"):
        open_images(tmp_path)


def test_pictures_of_other_endings_are_read_or_refused(tmp_path: Path) -> None:
    images = pixels(6)
    save_pictures(tmp_path, images[:2], "{}.png")
    for i, ending in enumerate((".bmp", ".ppm", ".TIF", ".png"), 2):
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}{ending}")
    assert torch.equal(torch.cat(list(open_images(tmp_path).batches(4))), images)
    for ending in (".gif", ".heic", ".jp2"):
        (tmp_path / f"7{ending}").write_bytes(b"x")
        with pytest.raises(UserError, match=f"1 pictures that are not read, such as 7{ending}, beside 6 that are"):
            open_images(tmp_path)
        (tmp_path / f"7{ending}").unlink()
    Image.new("RGB", (16, 16)).save(
        tmp_path / "7.tiff", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]
    )
    with pytest.raises(UserError, match="7.tiff holds 2 pictures; save one a file"):
        open_images(tmp_path)


def test_folders_inside_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files.say_once.cache_clear()
    save_pictures(tmp_path, pixels(2))
    save_pictures(tmp_path / "n01440764", pixels(2))
    assert len(open_images(tmp_path)) == 2
    assert "holds folders with pictures of their own, such as n01440764; these are not searched" in caplog.text


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, refused: Said) -> None:
    save_pictures(tmp_path / "a", pixels(2))
    os.mkfifo(tmp_path / "a" / "2.png")
    assert "2.png is not a regular file" in refused("eval", tmp_path / "a", "--digits")
    os.mkfifo(tmp_path / "x.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    save_npz(tmp_path / "s.npz", pixels(4))
    for name in ("x.npz", "zero.npz"):
        assert f"{name} is not a regular file" in refused("eval", tmp_path / name, "--digits")
        said = refused("eval", tmp_path / "s.npz", "--reference", tmp_path / name, "--digits")
        assert f"{name} is not a regular file" in said


# --- arrays


def with_header(path: Path, shape: tuple[int, ...]) -> Path:
    """The same bytes under a header that says another shape, checksums made to fit."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = io.BytesIO(members["arr_0.npy"])
    np.lib.format.read_magic(data)
    np.lib.format.read_array_header_1_0(data)
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    members["arr_0.npy"] = out.getvalue() + data.read()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_header_that_says_fewer_images_is_noticed(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", pixels(24))
    for shape in ((20, 16, 16, 3), (25, 16, 16, 3), (-1, 16, 16, 3), (24, 8, 8, 3)):
        with pytest.raises(UserError, match=r"a\.npz (has|is uint8|cannot be read)"):
            open_images(with_header(path, shape))
    assert len(open_images(with_header(path, (24, 16, 16, 3)))) == 24


def test_a_flipped_bit_of_a_header_is_noticed(tmp_path: Path) -> None:
    """The checksum is compared at the end, whatever the header says."""
    path = save_npz(tmp_path / "a.npz", pixels(24))
    data = path.read_bytes()
    begin = data.index(b"\x93NUMPY")
    for position in range(begin, begin + 128):
        for bit in (1, 4):
            path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            with pytest.raises(UserError):
                list(open_images(path).batches(10))


@pytest.mark.parametrize(
    "labels", [np.arange(4) - 1, np.full(4, 2**62), np.array([0, 1, 2, 2**63], np.uint64), np.full(4, 2**31)]
)
def test_labels_that_mean_nothing_are_refused(tmp_path: Path, labels: np.ndarray) -> None:  # type: ignore[type-arg]
    np.savez(tmp_path / "a.npz", arr_0=pixels(4).permute(0, 2, 3, 1).numpy(), arr_1=labels)
    with pytest.raises(UserError, match="arr_1 of .* holds labels from .* labels are classes, from 0 on"):
        open_images(tmp_path / "a.npz")


def test_labels_of_other_classes_leave_the_accuracy_out(tmp_path: Path, done: Said) -> None:
    images, labels = digit_images()
    save_npz(tmp_path / "a.npz", images[:40], labels[:40] + 3)
    assert "accuracy is left out: label 12 is no class of the digits classifier, which has 0 to 9" in done(
        "eval", tmp_path / "a.npz", "--digits"
    )


def test_images_that_are_all_alike_are_told(tmp_path: Path, done: Said) -> None:
    save_npz(tmp_path / "a.npz", pixels(1).expand(40, -1, -1, -1))
    assert "all samples have the same features: they are alike" in done("eval", tmp_path / "a.npz", "--digits")


def test_statistics_out_of_all_range_are_no_figure(tmp_path: Path, refused: Said) -> None:
    save_npz(tmp_path / "s.npz", pixels(10))
    np.savez(tmp_path / "r.npz", mu=np.full(64, 1e160), sigma=np.eye(64))
    said = refused("eval", tmp_path / "s.npz", "--reference", tmp_path / "r.npz", "--digits")
    assert "frechet_distance comes out as inf" in said


# --- a folder of ddfast's own


def test_damaged_pictures_of_a_folder_are_drawn_again(tmp_path: Path, done: Said, refused: Said) -> None:
    folder = tmp_path / "samples"
    words = ["sample", "--teacher", "digits-var", "--num", "12", "--out", folder]
    done(*words)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    paths = [folder / f"{i:06d}.png" for i in range(12)]
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    paths[2].write_bytes(b"")
    paths[3].write_bytes(bytes(len(paths[3].read_bytes())))
    data = bytearray(paths[4].read_bytes())
    data[in_idat(bytes(data))] ^= 1
    paths[4].write_bytes(data)
    Image.new("RGB", (8, 8)).save(paths[5])
    paths[6].unlink()
    files.say_once.cache_clear()
    assert "5 pictures in" in (said := done(*words)) and "were damaged or of another size, and were drawn again" in said
    assert "6 images" in said and {p.name: p.read_bytes() for p in folder.iterdir()} == before
    paths[7].unlink()
    paths[7].mkdir()
    assert "000007.png is a folder, not a file" in refused(*words)
    paths[7].rmdir()
    os.mkfifo(paths[7])
    assert "000007.png is not a regular file" in refused(*words)


def test_what_a_folder_says_of_itself_is_signed(tmp_path: Path) -> None:
    save_pictures(tmp_path, pixels(3))
    record = {"way": "1 step", "num": 3, "classes": [7, 2], "num_classes": 10}
    path = tmp_path / "sampling.json"
    path.write_text(json.dumps(signed(record | {"format": 2})))
    there = read_sampling(tmp_path)
    assert there is not None and there.record == record and there.labels(3).tolist() == [7, 2, 7]
    for changes, message in (
        ({"classes": [7, 3]}, "was changed: its checksum does not match"),
        ({"num_classes": 1000}, "was changed"),
        ({"checksum": None}, "was changed"),
    ):
        path.write_text(json.dumps(signed(record | {"format": 2}) | changes))
        with pytest.raises(UserError, match=message):
            read_sampling(tmp_path)
    for changes, message in (
        ({"classes": [7, 10]}, "says class 10 of 10"),
        ({"classes": []}, "says 3 images of 10 classes"),
        ({"classes": "some"}, "classes is 'some'; it must be tuple"),
        ({"num": "3"}, "num is '3'; it must be int"),
        ({"num": 0}, "says 0 images"),
        ({"num_classes": 0}, "of 0 classes"),
        ({"num_classes": 2**40}, "classes"),
    ):
        path.write_text(json.dumps(record | changes))
        with pytest.raises(UserError, match=message):
            read_sampling(tmp_path)


def test_statistics_that_are_none_are_refused(tmp_path: Path) -> None:
    path, mu, sigma = tmp_path / "a.npz", np.zeros(3), np.eye(3)
    for arrays, message in (
        ({"sigma": -sigma}, "sigma of .* has the negative eigenvalue -1, so it is no covariance"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "sigma of .* is not symmetric"),
        ({"sigma": 0 * sigma}, "sigma of .* is all zeros"),
        ({"sigma": sigma, "count": np.array([20, 20])}, r"count of .* is int64 \[20, 20\]"),
        ({"sigma": sigma, "count": np.array(np.nan)}, "count of .* is float64 nan"),
        ({"sigma": sigma, "count": np.array(1)}, "count of .* is int64 1; .* at least 2"),
    ):
        np.savez(path, mu=mu, **arrays)
        with pytest.raises(UserError, match=message):
            load_reference(path, Flat())
    np.savez(path, mu=mu.astype(int), sigma=np.eye(3, dtype=np.float32))
    assert load_reference(path, Flat()).pool.mean.tolist() == [0, 0, 0]
