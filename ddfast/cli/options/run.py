"""``ddfast run``: images by an exported folder."""

from __future__ import annotations

from pathlib import Path

from .common import SEED, SEED_HELP, TRUST_HELP, add_written
from .parser import Parser

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


def make_parser() -> Parser:
    parser = Parser("run", DESCRIPTION, EPILOG, "run:run")
    parser.add_argument("engine", type=Path, metavar="DIR", help="a folder of `ddfast export`")
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
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
    return parser
