"""What `ddfast sample` and `ddfast run` write: a labelled grid, an .npz, or a folder of pictures."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import mimetypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..evaluation.images import MANIFEST, PNG_ENDING, Sampling, check_npz, is_sound, read_sampling, write_npz
from ..evaluation.sampled import DrawnImages
from ..files import check_folder, check_room, remove_abandoned, say_once, write_atomic
from ..launcher import torchrun
from ..models.classes import name_of
from ..pictures import FORMATS, check_grid, grid
from ..records import differences, signed
from .progress import console, progress_bar

NPZ = ".npz"
FORMAT = 2  # of sampling.json; before it had a checksum it said none
ENDINGS = (*FORMATS, NPZ)
OTHERS = (".npy", ".pt", ".pth", ".ckpt", ".safetensors")  # and what Python's mimetypes knows


def check_written(args: argparse.Namespace) -> None:
    """Raise UserError for an --out that cannot be, before anything is loaded."""
    if args.columns < 1:
        raise UserError(f"--columns is {args.columns}; it must be at least 1")
    launch, folder = torchrun(), is_folder(args.out)
    if folder:
        check_folder(args.out, "images of `ddfast sample`", lambda folder: read_sampling(folder) is not None)
    elif args.out.suffix.lower() == NPZ:
        check_npz(args.out)
    if launch.world > 1 and not folder:
        raise UserError(f"{launch.world} ranks can share a folder only; give --out without an ending")


def is_folder(out: Path) -> bool:
    """Whether --out stands for a folder: it is one, or does not end as a file of images does.

    Raises UserError for the ending of another sort of file, and for one that is nearly ours.
    """
    ending = out.suffix.lower()
    if out.is_dir() or not ending:
        return True
    if ending in ENDINGS:
        return False
    if (
        ending in OTHERS
        or mimetypes.guess_type(f"x{ending}")[0]
        or difflib.get_close_matches(ending, ENDINGS, n=1, cutoff=0.7)
    ):
        raise UserError(
            f"{out} must end in {', '.join(ENDINGS)}; for a folder of that name, make it first: mkdir {out}"
        )
    return True


def check_images(out: Path, images: DrawnImages, columns: int) -> None:
    """Raise UserError where ``out`` cannot hold so many images, by arithmetic."""
    pixels = 3 * images.size**2
    advice = "name fewer with --num, or choose another --out"
    if is_folder(out):
        check_room(out, images.num * (pixels // 4 + 512), f"{images.num} pictures", advice)
    elif out.suffix.lower() == NPZ:
        check_room(out.parent, images.num * (pixels + 8), f"{images.num} images", advice)
    else:
        check_grid(out, images.num, images.size, columns)


def write_images(out: Path, images: DrawnImages, batch: int, columns: int) -> None:
    """Draw ``images``, ``batch`` at a time, with a progress bar, and say what was written."""
    launch = torchrun()
    begin = time.perf_counter()
    with progress_bar(console(quiet=launch.rank != 0)) as bar:
        task = bar.add_task(f"{images.how['way']} of {images.name}", total=len(images))
        if is_folder(out):
            made = fill_folder(out, images, batch, launch.rank, launch.world, lambda n: bar.advance(task, n))
        else:
            made = len(images)
            parts = watched(images.batches(batch), lambda n: bar.advance(task, n))
            if out.suffix.lower() == NPZ:
                write_npz(out, made, images.size, parts, images.labels)
            else:
                grid(torch.cat(list(parts)).float() / 255, captions(images), columns, out)
    seconds = time.perf_counter() - begin
    there = f" ({len(images) - made} were there, or are other ranks')" if made < len(images) else ""
    print(f"{out}: {made} images, {images.how['way']}, in {seconds:.1f} s, {batch} at a time{there}")


def captions(images: DrawnImages) -> list[str]:
    return [name_of(label, images.num_classes) for label in images.labels.tolist()]


def watched(parts: Iterator[Tensor], advance: Callable[[int], Any]) -> Iterator[Tensor]:
    for part in parts:
        advance(len(part))
        yield part


def fill_folder(
    folder: Path, images: DrawnImages, batch: int, rank: int, world: int, advance: Callable[[int], Any]
) -> int:
    """Write sample i to ``NNNNNN.png`` unless it is there, whole; batches are shared out by rank. Returns how many were
    made.

    ``sampling.json`` says what the images are.

    Raises:
        UserError: the folder holds other images, or something that is no file in a picture's place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, there = images.facts(), read_sampling(folder)
    if there is not None:
        check_same(folder, there, record)
    write_atomic(folder / MANIFEST, (json.dumps(signed(record | {"format": FORMAT}), indent=1) + "\n").encode())
    remove_abandoned(folder, MANIFEST, f"*{PNG_ENDING}")
    made = damaged = 0
    for first in list(range(0, len(images), batch))[rank::world]:
        samples = torch.arange(first, min(first + batch, len(images)))
        sound = [is_sound(place(folder, i), images.size) for i in samples.tolist()]
        damaged += sum(state is False for state in sound)
        missing = samples[[not state for state in sound]]
        if len(missing):
            for i, pixels in zip(missing.tolist(), images.draw(missing), strict=True):
                buffer = io.BytesIO()
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
                write_atomic(place(folder, i), buffer.getvalue())
        made += len(missing)
        advance(len(samples))
    if damaged:
        say_once(f"{damaged} pictures in {folder} were damaged or of another size, and were drawn again")
    return made


def check_same(folder: Path, there: Sampling, record: dict[str, Any]) -> None:
    """Raise UserError where a folder holds other images than those of ``record``, or more."""
    lines = differences(there.record | {"num": record["num"]}, json.loads(json.dumps(record)))
    if lines:
        raise UserError(f"{folder} holds other images; choose another --out. There " + "; ".join(lines))
    if there.num > record["num"]:
        raise UserError(f"{folder} is for {there.num} images; name as many or more with --num")


def place(folder: Path, sample: int) -> Path:
    return folder / f"{sample:06d}{PNG_ENDING}"
