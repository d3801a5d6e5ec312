"""Pictures of images side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import UserError
from .files import write_atomic

SMALLEST = 64  # images narrower than this are enlarged by a whole factor
CAPTION, GAP = 16, 4


def check_ending(path: Path) -> None:
    """Raise UserError when the ending of ``path`` is no picture format."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{path} must end in .png, .jpg or .webp")


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
    width, height = tiles[0].width + GAP, tiles[0].height + CAPTION + GAP
    left = GAP + (int(max(font.getlength(row) for row in rows)) + 2 * GAP if rows else 0)
    count = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (left + width * min(columns, len(tiles)), height * count + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        draw.text((GAP, height * i + GAP + CAPTION + tiles[0].height / 2), row, fill="black", font=font, anchor="lm")
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        x, y = left + width * (i % columns), GAP + height * (i // columns)
        text = fitting(caption, font, tile.width)
        draw.text((x + tile.width / 2, y + CAPTION / 2 - 1), text, fill="black", font=font, anchor="mm")
        sheet.paste(tile, (x, y + CAPTION))
    buffer = io.BytesIO()
    sheet.save(buffer, format=Image.registered_extensions()[path.suffix.lower()])
    write_atomic(path, buffer.getvalue())


def fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``text``, or as much of its beginning as is ``width`` pixels wide."""
    if font.getlength(text) <= width:
        return text
    return next((cut for n in range(len(text), 0, -1) if font.getlength(cut := text[:n] + "…") <= width), "")
