"""The command line. Exit codes: 0 done, 1 failed while working, 2 refused before work, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import UserError, WorkError
from . import bench, convert, digits, eval, export, info, pairs, report, run, sample, train

EPILOG = """\
try it now, on a laptop, without downloads:
  ddfast pairs --teacher digits-var --num 2000 --out pairs/
  ddfast train --teacher digits-var --pairs pairs/ --steps 300 --out runs/first
  ddfast sample --student runs/first --compare --out grid.png
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddfast",
        description="Distilled Decoding: noise-token pairs of an autoregressive image teacher, and what comes of them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ddfast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (info, pairs, train, sample, eval, report, export, run, bench, convert, digits):
        command.add_parser(commands)
    parser.set_defaults(func=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.func is None:
        parser.print_help()
        return 2
    try:
        return int(args.func(args))
    except UserError as error:
        return fail(str(error), 2)
    except WorkError as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"{error.strerror or error} ({error.filename or 'no file named'})", 1)
    except KeyboardInterrupt:
        return fail("interrupted; what was finished is kept, and the same command goes on from there", 130)


def fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK")
    where = f" (rank {rank})" if rank is not None else ""
    print(f"ddfast{where}: {message}", file=sys.stderr)
    return code
