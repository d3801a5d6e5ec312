"""``ddfast convert``: a released checkpoint to a ddfast safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from ..files import check_file
from ..models.checkpoints import make_part, read_copies, require_copy, save_bundle
from ..models.zoo import STUDENTS, alike, check_file_name, everything, identify, is_bundle, models
from ..tensors import check_finite, read_safetensors


def run(args: argparse.Namespace) -> int:
    out: Path = args.out
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    check_file(out, "a safetensors file", is_weights)
    if out.exists() and not args.force:
        raise UserError(f"{out} exists; choose another --out, or pass --force to replace it")
    if args.file.exists() and is_bundle(args.file):
        raise UserError(f"{args.file} is a ddfast file already")
    copies = read_copies(args.file)
    name = args.model or recognise(args.file, {k: tuple(t.shape) for k, t in next(iter(copies.values())).items()})
    if name not in models():
        raise UserError(f"--model {name} is not known; use one of {', '.join(models())}")
    kind, config = models()[name]
    if args.copy and name not in STUDENTS:
        raise UserError(f"--copy {args.copy} is for students, and this is {name}; drop it")
    copy = (args.copy or "ema") if name in STUDENTS else "raw"
    require_copy(copies, copy, args.file)
    part = make_part(kind, config, copies[copy], str(args.file))
    check_file_name(args.file, name)
    check_finite(part.tensors, args.file)
    label = kind.rpartition("-")[2]  # transformer, tokenizer or student
    save_bundle(out, name, {label: part}, {"copy": copy} if name in STUDENTS else None)
    print(f"{out}: {name}, {len(part.tensors)} tensors, sha256 {part.sha256[:16]}…")
    return 0


def recognise(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """The one released model with these shapes; UserError when there is none, or several."""
    names = identify(shapes)
    if not names:
        raise UserError(
            f"{path} is none of the released models ({', '.join(models())}); with --model NAME, what differs is listed"
        )
    known = {entry.file: entry.name for entry in everything() if entry.name in names}
    if len(names) > 1 and path.name in known and set(names) == set(alike(names[0])):
        return known[path.name]
    if len(names) > 1:
        raise UserError(f"{path} has the shapes of {' and '.join(names)}; say which with --model")
    return names[0]


def is_weights(path: Path) -> bool:
    """Whether a file is a safetensors file, which --force may replace."""
    try:
        read_safetensors(path)
    except UserError:
        return not path.stat().st_size
    return True
