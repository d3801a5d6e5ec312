"""``ddfast bench``: the latency of an exported folder."""

from __future__ import annotations

from pathlib import Path

from .common import TRUST_HELP
from .parser import Parser

DESCRIPTION = """\
Time an exported folder: from class and noise, where the runtime wants them, to pixels, left there. The first call of a
batch size, which may compile or allocate, is told apart; the others are given as median and 20th to 80th percentile.
Making the noise, reading the folder and writing pictures are not included."""

EPILOG = """\
examples:
  ddfast bench engine/
  ddfast bench engine/ --batches 1,4 --seconds 30 --json latency.json
  OMP_NUM_THREADS=1 ddfast bench cpu/    # one core
"""


def make_parser() -> Parser:
    parser = Parser("bench", DESCRIPTION, EPILOG, "bench:run")
    parser.add_argument("engine", type=Path, metavar="DIR", help="a folder of `ddfast export`")
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    parser.add_argument("--batches", default="1,8,64", metavar="LIST", help="images at once (default: 1,8,64)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="a size, and at least 3 calls (default: 5)"
    )
    parser.add_argument("--device", default="auto", help="auto (what it was built for), cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser
