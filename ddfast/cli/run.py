"""``ddfast run``: images by an exported folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..export.build import open_engine
from ..export.images import engine_images
from ..models.classes import parse_classes
from .models import SEED, SEED_HELP
from .pairs import choose_device
from .written import add_written, check_written, write_images

DESCRIPTION = """\
Draw images with a folder of `ddfast export`, by the runtime that it is for. Sample i starts from the noise of pair i of
the seed, as everywhere else: the pictures are those of `ddfast sample --student … --steps N` with the same seed.
torch makes the noise and writes the pictures; the model itself is the runtime's."""

EPILOG = """\
examples:
  ddfast run engine/ --classes 3,7 --seed 0 --out grid.png
  ddfast run engine/ --num 50000 --out samples/    # goes on where it was interrupted
  ddfast run engine/ --num 5000 --out samples.npz
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="draw images with an exported folder",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("engine", type=Path, metavar="DIR", help="a folder of `ddfast export`")
    what = parser.add_argument_group("which samples")
    what.add_argument(
        "--classes", metavar="LIST", help="in turn: numbers, ranges or names, e.g. 207,3-5,goldfish (default: all)"
    )
    what.add_argument("-n", "--num", type=int, metavar="N", help="samples (default: one a class named, else 20)")
    what.add_argument("--seed", type=int, default=SEED, help=SEED_HELP)
    run_ = parser.add_argument_group("how it runs")
    run_.add_argument("--batch", type=int, metavar="B", help="images drawn together (default: what it was built for)")
    run_.add_argument("--device", default="auto", help="auto (what it was built for), cpu, cuda or cuda:N")
    add_written(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    for name in ("num", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    check_written(args)
    engine = open_engine(args.engine, engine_device(args.device))
    shapes = engine.manifest.shapes
    classes = None if args.classes is None else parse_classes(args.classes, shapes.num_classes)
    images = engine_images(engine, classes, args.num or (20 if classes is None else len(classes)), args.seed)
    write_images(args.out, images, args.batch or engine.manifest.batch.best, args.columns)
    print(f"by {engine.runtime}")
    return 0


def engine_device(name: str) -> str:
    """``auto`` is left to the engine."""
    return name if name == "auto" else str(choose_device(name))
