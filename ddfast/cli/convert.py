"""``ddfast convert``: a released checkpoint to a ddfast safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models.checkpoints import PLACES, make_part, read_copies, require_copy, save_bundle
from ..models.zoo import STUDENTS, identify, is_bundle, models

DESCRIPTION = """\
Convert a released .pth, .pt or .safetensors checkpoint to safetensors with its configuration in the metadata.

The model is recognised by the names and shapes of its weights, all of which must fit. Sizes that share every shape
(LlamaGen's 256 and 384 pixel versions) are told apart with --model. Of a student's two copies, the moving average of
its weights is taken, or with --copy raw the weights themselves."""

EPILOG = """\
examples:
  ddfast convert var_d16.pth --out var-d16.safetensors
  ddfast convert c2i_B_384.pt --model llamagen-b-384 --out llamagen-b-384.safetensors
  ddfast convert var-d16.pth --out var-dd-d16.safetensors
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a released checkpoint to safetensors",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="the checkpoint, as released")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, NAME.safetensors")
    parser.add_argument("--model", metavar="NAME", help="which model it is, where the shapes leave a choice")
    parser.add_argument("--copy", choices=tuple(PLACES), help="which copy of a student's weights (default: ema)")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    out: Path = args.out
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
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
    if len(names) > 1:
        raise UserError(f"{path} has the shapes of {' and '.join(names)}; say which with --model")
    return names[0]
