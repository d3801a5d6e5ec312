"""Sets of images: a folder of pictures, or an .npz as OpenAI's ADM evaluator reads it, never whole in memory.

That .npz holds ``arr_0`` uint8 [N, H, W, 3] and, where labels are known, ``arr_1`` integers [N].
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from ..errors import UserError, WorkError, reason
from ..files import check_file, of_the_system, replacing, require_file, say_once
from ..records import check_if_signed, read_json, restore

PNG_ENDING = ".png"
ENDINGS = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", PNG_ENDING, ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")  # Pillow tries no other, whatever a name says
UNREAD = (".avif", ".eps", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".pcx", ".psd", ".svg", ".tga")
IMAGES, LABELS = "arr_0", "arr_1"
MANIFEST = "sampling.json"  # what `ddfast sample` says of its folder
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every member, so that the bytes are a function of the input
MOST_CLASSES = 1 << 31
LOCAL_HEADER, DESCRIPTOR = 30, 24  # bytes of a zip member before its name, and at most behind its data


class ImageSource(Protocol):
    """Images that can be gone through again and again.

    Attributes:
        size: height and width of each.
        labels: int64 [N], or None where they are not known.
    """

    @property
    def size(self) -> int: ...

    @property
    def labels(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def facts(self) -> dict[str, Any]:
        """JSON-able: where the images come from, and how they were made where that is known."""

    def batches(self, n: int) -> Iterator[Tensor]:
        """All images in order, uint8 [b, 3, H, W] with b = ``n`` but for the last."""


def open_images(path: Path) -> ImageSource:
    """The images of a folder or an .npz.

    Raises UserError where nothing is there, no image is in it, or an image is of another size or sort than the rest.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; name a folder of pictures or an .npz")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path} is neither a folder of pictures nor an .npz")
    return _open_npz(path)


# --- a folder


@dataclass(frozen=True)
class Sampling:
    """What ``sampling.json`` says of a folder of ``ddfast sample``.

    Attributes:
        num: of images, in turn of ``classes``, out of ``num_classes``.
        record: all of it.
    """

    classes: tuple[int, ...] | None
    num_classes: int
    num: int
    record: dict[str, Any]

    def labels(self, count: int) -> Tensor:
        """int64 [count]"""
        in_turn = torch.arange(self.num_classes) if self.classes is None else torch.tensor(self.classes)
        return in_turn[torch.arange(count) % len(in_turn)]


@dataclass(frozen=True)
class FolderImages:
    """The pictures of a folder, in natural order of their names: 2.png before 10.png.

    Attributes:
        sampling: what ``ddfast sample`` says of its own.
    """

    path: Path
    files: tuple[Path, ...]
    size: int
    sampling: Sampling | None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Tensor | None:
        return None if self.sampling is None else self.sampling.labels(len(self))

    def facts(self) -> dict[str, Any]:
        facts = {"path": str(self.path), "images": len(self), "size": self.size}
        return facts if self.sampling is None else facts | {"sampling": self.sampling.record}

    def batches(self, n: int) -> Iterator[Tensor]:
        for first in range(0, len(self), n):
            yield torch.stack([_pixels(file) for file in self.files[first : first + n]])


def _open_folder(folder: Path) -> FolderImages:
    entries = sorted(folder.iterdir(), key=_natural)
    files = [p for p in entries if p.suffix.lower() in ENDINGS]
    if not files:
        raise UserError(f"{folder} holds no picture ({', '.join(ENDINGS)}) of its own; folders inside are not searched")
    unread = [p for p in entries if p.suffix.lower() in UNREAD]
    if unread:
        raise UserError(
            f"{folder} holds {len(unread)} pictures that are not read, such as {unread[0].name}, beside "
            f"{len(files)} that are: save them as PNG, or move them away"
        )
    if inside := [p.name for p in entries if p.is_dir() and any(q.suffix.lower() in ENDINGS for q in p.iterdir())]:
        say_once(f"{folder} holds folders with pictures of their own, such as {inside[0]}; these are not searched")
    side = 0
    for file in files:
        with opened(file, check=True) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(f"{file} is a picture of mode {image.mode}; save it as RGB or gray (L)")
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise UserError(f"{file} holds {frames} pictures; save one a file")
            width, height = image.size
            if width != height:
                raise UserError(f"{file} is {width}x{height}; crop and resize the pictures to squares of one size")
            side = side or width
            if width != side:
                raise UserError(f"{file} is {width}x{width}, the pictures before it {side}x{side}; resize them alike")
    sampling = read_sampling(folder)
    if sampling is None and os.path.lexists(folder / MANIFEST):
        say_once(f"{folder / MANIFEST} is not of `ddfast sample`, so the pictures have no labels")
    if sampling is not None and sampling.num != len(files):
        raise UserError(f"{folder} holds {len(files)} pictures of {sampling.num}; run its `ddfast sample` once more")
    return FolderImages(folder, tuple(files), side, sampling)


def read_sampling(folder: Path) -> Sampling | None:
    """What the ``sampling.json`` of a folder says; None where there is none, or it is of something else.

    Raises UserError where it is damaged.
    """
    path, fix = folder / MANIFEST, "draw the images again"
    if not os.path.lexists(path):
        return None
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    if not isinstance(record, dict) or not {"classes", "num_classes", "num", "way", "checksum"} & record.keys():
        return None
    if missing := {"classes", "num_classes", "num"} - record.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; {fix}")
    record = check_if_signed(record, path, fix)
    every = record["classes"] == "all"
    classes = None if every else restore(tuple[int, ...], record["classes"], f"{path}: classes")
    num, num_classes = (restore(int, record[name], f"{path}: {name}") for name in ("num", "num_classes"))
    if not 1 <= num_classes <= MOST_CLASSES or num < 1 or classes is not None and not classes:
        raise UserError(f"{path} says {num} images of {num_classes} classes; {fix}")
    if wrong := [label for label in classes or () if not 0 <= label < num_classes]:
        raise UserError(f"{path} says class {wrong[0]} of {num_classes}; {fix}")
    return Sampling(classes, num_classes, num, record)


def is_sound(file: Path, side: int) -> bool | None:
    """Whether a PNG is whole and of ``side`` pixels; None where there is none.

    Raises UserError for something else than a file.
    """
    if not os.path.lexists(file):
        return None
    require_file(file)
    try:
        with opened(file, check=True) as image:
            return image.format == "PNG" and image.size == (side, side)
    except UserError:
        return False


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A sort key by which digits count as numbers."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(0, int(part)) if i % 2 else (1, part) for i, part in enumerate(parts)]


@contextmanager
def opened(file: Path, check: bool = False) -> Iterator[Image.Image]:
    """A picture; any damage met before it is closed becomes a UserError.

    ``check``: compare the checksums of a PNG first, which decoding does not.

    Raises OSError where it cannot be read, though it may be sound.
    """
    require_file(file)
    with open(file, "rb") as stream, damage(file, "a picture"):
        if check:
            with Image.open(stream, formats=FORMATS) as image:
                image.verify()
            stream.seek(0)
        with Image.open(stream, formats=FORMATS) as image:
            yield image


def _pixels(file: Path) -> Tensor:
    """uint8 [3, H, W]"""
    with opened(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@contextmanager
def damage(file: Path, what: str) -> Iterator[None]:
    """Whatever a damaged file makes of the library that reads it becomes a UserError; what the system says passes."""
    try:
        yield
    except (UserError, WorkError):
        raise
    except Exception as error:
        if of_the_system(error):
            raise
        raise UserError(f"{file} cannot be read as {what}; is it complete? ({reason(error)})") from error


# --- an .npz


@dataclass(frozen=True)
class NpzImages:
    """``arr_0`` of an .npz, read as a stream."""

    path: Path
    count: int
    size: int
    labels: Tensor | None

    def __len__(self) -> int:
        return self.count

    def facts(self) -> dict[str, Any]:
        return {"path": str(self.path), "images": len(self), "size": self.size}

    def batches(self, n: int) -> Iterator[Tensor]:
        row = self.size * self.size * 3
        with reading_npz(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
            read_header(file)
            for first in range(0, self.count, n):
                b = min(n, self.count - first)
                data = bytearray(file.read(b * row))
                if len(data) < b * row:
                    raise EOFError(f"it ends in image {first + len(data) // row} of {self.count}")
                if first + b == self.count and file.read(1):  # at the end zipfile compares the checksum
                    raise EOFError(f"it goes on behind its {self.count} images")
                pixels = torch.frombuffer(data, dtype=torch.uint8).view(b, self.size, self.size, 3)
                yield pixels.permute(0, 3, 1, 2)


def _open_npz(path: Path) -> NpzImages:
    with reading_npz(path) as archive:
        if f"{IMAGES}.npy" not in archive.namelist():
            raise UserError(f"{path} holds no images: it has no {IMAGES}, only {', '.join(keys(archive))}")
        with archive.open(f"{IMAGES}.npy") as file:
            shape, dtype = read_header(file)
            begin = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or min(shape) < 1:
            raise UserError(f"{IMAGES} of {path} is {dtype} {list(shape)}; images are uint8 [N, side, side, 3], N >= 1")
        have = archive.getinfo(f"{IMAGES}.npy").file_size - begin
        if have != shape[0] * shape[1] * shape[2] * 3:
            raise UserError(
                f"{IMAGES} of {path} has {have} bytes, and its header says {list(shape)}: it is damaged; copy it again"
            )
        labels = _labels(archive, path, shape[0]) if f"{LABELS}.npy" in archive.namelist() else None
    return NpzImages(path, shape[0], shape[1], labels)


def _labels(archive: zipfile.ZipFile, path: Path, count: int) -> Tensor:
    labels = read_member(archive, LABELS)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{LABELS} of {path} is {labels.dtype} {list(labels.shape)}; labels are {count} integers")
    if not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        raise UserError(
            f"{LABELS} of {path} holds labels from {labels.min()} to {labels.max()}; labels are classes, from 0 on"
        )
    return torch.from_numpy(labels.astype(np.int64))


@contextmanager
def reading_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz; any damage met before it is closed becomes a UserError."""
    require_file(path)
    with open(path, "rb") as file, damage(path, "an .npz"), zipfile.ZipFile(file) as archive:
        check_directory(archive, file)
        yield archive


def check_directory(archive: zipfile.ZipFile, file: BinaryIO) -> None:
    """Raise BadZipFile where an archive's directory leaves members out, or calls them otherwise: a damaged entry would
    be a missing array, and labels are no must."""
    stop = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        archive.open(info).close()  # compares the names
        if not 0 <= info.header_offset - stop <= DESCRIPTOR:
            break
        file.seek(info.header_offset + LOCAL_HEADER - 4)
        stop = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4))) + info.compress_size
    if not 0 <= archive.start_dir - stop <= DESCRIPTOR:
        raise zipfile.BadZipFile("it holds more than its directory lists")


def keys(archive: zipfile.ZipFile) -> list[str]:
    """Names of the arrays of an .npz."""
    return [name.removesuffix(".npy") for name in archive.namelist()]


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """An array of an .npz, its checksum compared and nothing left over; no pickles."""
    data = io.BytesIO(archive.read(f"{name}.npy"))
    array: np.ndarray[Any, Any] = npy.read_array(data, allow_pickle=False)
    if data.read(1):
        raise ValueError(f"{name} is shorter than its file")
    return array


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of a .npy stream, which is then at its first element."""
    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise ValueError("its arrays are in Fortran order; save them with numpy.ascontiguousarray")
    return shape, dtype


def check_npz(path: Path, holds: Iterable[str] = (IMAGES, LABELS), what: str = "an .npz of images") -> None:
    """The rule for an .npz that is to be written: absent, or one of the same arrays, which is replaced."""

    def is_ours(path: Path) -> bool:
        with contextlib.suppress(UserError), reading_npz(path) as archive:
            return set(keys(archive)) <= set(holds)
        return path.stat().st_size == 0

    check_file(path, what, is_ours)


def write_npz(path: Path, count: int, side: int, batches: Iterable[Tensor], labels: Tensor | None = None) -> None:
    """Write images as an .npz, batch after batch; the file appears whole or not at all.

    Args:
        count: number of images.
        side: their height and width.
        batches: uint8 [b, 3, side, side], ``count`` images in all.
        labels: integers [count].

    Raises:
        WorkError: the batches hold fewer or more images, or images of another size or type.
    """
    done = 0
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(_member(IMAGES), "w", force_zip64=True) as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)}
            npy.write_array_header_1_0(out, header)
            for images in batches:
                if images.dtype != torch.uint8 or images.shape[1:] != (3, side, side):
                    raise WorkError(f"{path}: a batch is {images.dtype} {list(images.shape)}, not {side}-pixel images")
                out.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
                done += len(images)
        if done != count:
            raise WorkError(f"{path}: {done} images came instead of {count}")
        if labels is not None:
            with archive.open(_member(LABELS), "w") as out:
                npy.write_array(out, labels.cpu().long().numpy(), allow_pickle=False)


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy", EPOCH)
