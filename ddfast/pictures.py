"""Pictures of images side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import UserError
from .files import check_file, replacing, starts_with

SMALLEST = 64  # images narrower than this are enlarged by a whole factor
CAPTION, GAP = 16, 4
MOST_BYTES = 1 << 29  # of a grid in memory: Pillow opens no larger one
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MOST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}  # pixels that a format can hold
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


def check_ending(path: Path) -> None:
    """Raise UserError when the ending of ``path`` is no picture format."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} must end in .png, .jpg or .webp")


def check_grid(path: Path, count: int, side: int, columns: int, rows: Sequence[str] = ()) -> None:
    """Raise UserError for a grid that its file or its format cannot hold, before anything is drawn.

    Args:
        path: of the picture.
        count: images of ``side`` pixels.
        columns, rows: as of :func:`grid`.
    """
    check_ending(path)
    check_file(path, "a picture", starts_with(*MAGIC))
    name = FORMATS[path.suffix.lower()]
    size = sheet_size(side, count, columns, rows)
    if max(size) > MOST_SIDE[name]:
        raise UserError(
            f"{count} images in rows of {columns} make a grid of {size[0]}x{size[1]} pixels, and {name} ends at "
            f"{MOST_SIDE[name]}: use more --columns, or write a folder or an .npz"
        )
    if 3 * size[0] * size[1] > MOST_BYTES:
        raise UserError(
            f"{count} images make a grid of {size[0]}x{size[1]} pixels, more than a picture is good for; write a "
            "folder or an .npz, or fewer with --num"
        )


def sheet_size(side: int, count: int, columns: int, rows: Sequence[str] = ()) -> tuple[int, int]:
    """Width and height in pixels of a grid."""
    tile = side * max(1, -(-SMALLEST // side))
    width = _left(rows) + (tile + GAP) * min(columns, count)
    return width, (tile + CAPTION + GAP) * -(-count // columns) + GAP


def _left(rows: Sequence[str]) -> int:
    """Pixels to the left of the images, which the names of ``rows`` take."""
    font = ImageFont.load_default(size=12)
    return GAP + (int(max(font.getlength(row) for row in rows)) + 2 * GAP if rows else 0)


def grid(images: Tensor, captions: Sequence[str], columns: int, path: Path, rows: Sequence[str] = ()) -> None:
    """Write images float [B, 3, H, W] in [0, 1], each under its caption, ``columns`` to a row.

    ``rows`` are written to the left of their rows. Captions wider than an image are cut.

    Raises UserError when the ending of ``path`` is no picture format.
    """
    check_ending(path)
    scale = max(1, -(-SMALLEST // images.shape[-1]))
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    tiles = [
        Image.fromarray(p).resize((p.shape[1] * scale, p.shape[0] * scale), Image.Resampling.NEAREST) for p in pixels
    ]
    font = ImageFont.load_default(size=12)
    width, height, left = tiles[0].width + GAP, tiles[0].height + CAPTION + GAP, _left(rows)
    sheet = Image.new("RGB", sheet_size(images.shape[-1], len(tiles), columns, rows), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        draw.text((GAP, height * i + GAP + CAPTION + tiles[0].height / 2), row, fill="black", font=font, anchor="lm")
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        x, y = left + width * (i % columns), GAP + height * (i // columns)
        text = fitting(caption, font, tile.width)
        draw.text((x + tile.width / 2, y + CAPTION / 2 - 1), text, fill="black", font=font, anchor="mm")
        sheet.paste(tile, (x, y + CAPTION))
    buffer = io.BytesIO()
    sheet.save(buffer, format=FORMATS[path.suffix.lower()])
    with replacing(path) as file:
        file.write(buffer.getvalue())


def fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``text``, or as much of its beginning as is ``width`` pixels wide."""
    if font.getlength(text) <= width:
        return text
    return next((cut for n in range(len(text), 0, -1) if font.getlength(cut := text[:n] + "…") <= width), "")
