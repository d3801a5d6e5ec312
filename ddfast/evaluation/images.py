"""Sets of images: a folder of pictures, or an .npz as OpenAI's ADM evaluator reads it, never whole in memory.

That .npz holds ``arr_0`` uint8 [N, H, W, 3] and, where labels are known, ``arr_1`` integers [N].
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from ..errors import UserError, WorkError
from ..files import writing

ENDINGS = (".jpeg", ".jpg", ".png", ".webp")
IMAGES, LABELS = "arr_0", "arr_1"
MANIFEST = "sampling.json"  # what `ddfast sample` says of its folder
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every member, so that the bytes are a function of the input
DAMAGE = (OSError, EOFError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error)


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
    if path.suffix != ".npz":
        raise UserError(f"{path} is neither a folder of pictures nor an .npz")
    return _open_npz(path)


# --- a folder


@dataclass(frozen=True)
class FolderImages:
    """The pictures of a folder, in natural order of their names: 2.png before 10.png.

    Attributes:
        sampling: what ``ddfast sample`` says of its own, labels included.
    """

    path: Path
    files: tuple[Path, ...]
    size: int
    sampling: dict[str, Any] | None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def facts(self) -> dict[str, Any]:
        facts = {"path": str(self.path), "images": len(self), "size": self.size}
        return facts if self.sampling is None else facts | {"sampling": self.sampling}

    def batches(self, n: int) -> Iterator[Tensor]:
        for first in range(0, len(self), n):
            yield torch.stack([_pixels(file) for file in self.files[first : first + n]])


def _open_folder(folder: Path) -> FolderImages:
    files = sorted((p for p in folder.iterdir() if p.suffix.lower() in ENDINGS), key=_natural)
    if not files:
        raise UserError(f"{folder} holds no picture ({', '.join(ENDINGS)}) of its own; folders inside are not searched")
    side = 0
    for file in files:
        with _opened(file) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(f"{file} is a picture of mode {image.mode}; save it as RGB or gray (L)")
            width, height = image.size
            if width != height:
                raise UserError(f"{file} is {width}x{height}; crop and resize the pictures to squares of one size")
            side = side or width
            if width != side:
                raise UserError(f"{file} is {width}x{width}, the pictures before it {side}x{side}; resize them alike")
    sampling = _sampling(folder, len(files))
    labels = None
    if sampling is not None:
        classes = sampling["classes"]
        in_turn = torch.arange(sampling["num_classes"]) if classes == "all" else torch.tensor(classes)
        labels = in_turn[torch.arange(len(files)) % len(in_turn)]
    return FolderImages(folder, tuple(files), side, sampling, labels)


def _sampling(folder: Path, count: int) -> dict[str, Any] | None:
    """What ``ddfast sample`` left in its folder; UserError where it was interrupted."""
    if not (folder / MANIFEST).exists():
        return None
    record = read_manifest(folder)
    if record["num"] != count:
        raise UserError(f"{folder} holds {count} pictures of {record['num']}; run its `ddfast sample` once more")
    return record


def read_manifest(folder: Path) -> dict[str, Any]:
    """The ``sampling.json`` of a folder of ``ddfast sample``; UserError where it is damaged."""
    path = folder / MANIFEST
    try:
        record = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); draw the images again") from error
    if missing := {"classes", "num_classes", "num"} - record.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; draw the images again")
    return record


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A sort key by which digits count as numbers."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(0, int(part)) if i % 2 else (1, part) for i, part in enumerate(parts)]


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        image = Image.open(file)
    except DAMAGE as error:
        raise UserError(f"{file} cannot be read as a picture; is it complete? ({error})") from error
    with image:
        yield image


def _pixels(file: Path) -> Tensor:
    """uint8 [3, H, W]"""
    with _opened(file) as image:
        try:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except DAMAGE as error:
            raise UserError(f"{file} cannot be read as a picture; is it complete? ({error})") from error


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
                pixels = torch.frombuffer(data, dtype=torch.uint8).view(b, self.size, self.size, 3)
                yield pixels.permute(0, 3, 1, 2)


def _open_npz(path: Path) -> NpzImages:
    with reading_npz(path) as archive:
        if f"{IMAGES}.npy" not in archive.namelist():
            raise UserError(f"{path} holds no images: it has no {IMAGES}, only {', '.join(keys(archive))}")
        with archive.open(f"{IMAGES}.npy") as file:
            shape, dtype = read_header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or 0 in shape:
            raise UserError(f"{IMAGES} of {path} is {dtype} {list(shape)}; images are uint8 [N, side, side, 3], N >= 1")
        labels = _labels(archive, path, shape[0]) if f"{LABELS}.npy" in archive.namelist() else None
    return NpzImages(path, shape[0], shape[1], labels)


def _labels(archive: zipfile.ZipFile, path: Path, count: int) -> Tensor:
    with archive.open(f"{LABELS}.npy") as file:
        labels = npy.read_array(file, allow_pickle=False)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{LABELS} of {path} is {labels.dtype} {list(labels.shape)}; labels are {count} integers")
    return torch.from_numpy(labels.astype(np.int64))


@contextmanager
def reading_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz; any damage met before it is closed becomes a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read as an .npz; is it complete? ({error})") from error


def keys(archive: zipfile.ZipFile) -> list[str]:
    """Names of the arrays of an .npz."""
    return [name.removesuffix(".npy") for name in archive.namelist()]


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of a .npy stream, which is then at its first element."""
    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise ValueError("its arrays are in Fortran order; save them with numpy.ascontiguousarray")
    return shape, dtype


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
    path.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    with writing(path, os.replace) as file, zipfile.ZipFile(file, "w") as archive:
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
