"""What `ddfast sample` and `ddfast run` write: a labelled grid, an .npz, or a folder of pictures."""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from ..errors import UserError
from ..evaluation.images import MANIFEST, read_manifest, write_npz
from ..evaluation.sampled import DrawnImages
from ..files import check_writable, remove_abandoned, write_atomic
from ..models.classes import name_of
from ..pictures import check_ending, grid
from ..records import differences
from .pairs import torchrun
from .progress import progress_bar


def add_written(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("what is written")
    out.add_argument("--out", type=Path, required=True, metavar="FILE|DIR", help="a picture, an .npz, or a folder")
    out.add_argument("--columns", type=int, default=10, metavar="N", help="images in a grid's row (default: 10)")


def check_written(args: argparse.Namespace) -> None:
    """Raise UserError for an --out that cannot be, before anything is drawn."""
    if args.columns < 1:
        raise UserError(f"--columns is {args.columns}; it must be at least 1")
    folder = is_folder(args.out)
    if not folder and args.out.suffix != ".npz":
        check_ending(args.out)
    check_writable(args.out if folder else args.out.parent)
    _, world = torchrun()
    if world > 1 and not folder:
        raise UserError(f"{world} ranks can share a folder only; give --out without an ending")


def is_folder(out: Path) -> bool:
    return out.suffix == "" or out.is_dir()


def write_images(out: Path, images: DrawnImages, batch: int, columns: int) -> None:
    """Draw ``images``, ``batch`` at a time, with a progress bar, and say what was written."""
    rank, world = torchrun()
    begin = time.perf_counter()
    with progress_bar(Console(stderr=True, quiet=rank != 0)) as bar:
        task = bar.add_task(f"{images.how['way']} of {images.name}", total=len(images))
        if is_folder(out):
            made = fill_folder(out, images, batch, rank, world, lambda n: bar.advance(task, n))
        else:
            made = len(images)
            parts = watched(images.batches(batch), lambda n: bar.advance(task, n))
            if out.suffix == ".npz":
                write_npz(out, made, images.size, parts, images.labels)
            else:
                grid(torch.cat(list(parts)).float() / 255, captions(images), columns, out)
    seconds = time.perf_counter() - begin
    print(f"{out}: {made} images, {images.how['way']}, in {seconds:.1f} s, {batch} at a time")


def captions(images: DrawnImages) -> list[str]:
    return [name_of(label, images.num_classes) for label in images.labels.tolist()]


def watched(parts: Iterator[Tensor], advance: Callable[[int], Any]) -> Iterator[Tensor]:
    for part in parts:
        advance(len(part))
        yield part


def fill_folder(
    folder: Path, images: DrawnImages, batch: int, rank: int, world: int, advance: Callable[[int], Any]
) -> int:
    """Write sample i to ``NNNNNN.png`` unless it is there; batches are shared out by rank. Returns how many were made.

    ``sampling.json`` says what the images are.

    Raises:
        UserError: the folder holds other images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, path = images.facts(), folder / MANIFEST
    if path.exists():
        there = read_manifest(folder)
        lines = differences(there | {"num": len(images)}, json.loads(json.dumps(record)))
        if lines:
            raise UserError(f"{folder} holds other images; choose another --out. There " + "; ".join(lines))
        if there["num"] > len(images):
            raise UserError(f"{folder} is for {there['num']} images; name as many or more with --num")
    elif next(folder.glob("*.png"), None) is not None:
        raise UserError(f"{folder} holds pictures that `ddfast sample` did not write; choose another --out")
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    remove_abandoned(folder)
    made = 0
    for samples in list(torch.arange(len(images)).split(batch))[rank::world]:
        missing = samples[[not place(folder, i).exists() for i in samples.tolist()]]
        if len(missing):
            for i, pixels in zip(missing.tolist(), images.draw(missing), strict=True):
                buffer = io.BytesIO()
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
                write_atomic(place(folder, i), buffer.getvalue())
        made += len(missing)
        advance(len(samples))
    return made


def place(folder: Path, sample: int) -> Path:
    return folder / f"{sample:06d}.png"
