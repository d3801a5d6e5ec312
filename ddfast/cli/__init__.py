"""The command line. Exit codes: 0 done, 1 failed while working, 2 refused before work, 130 interrupted.

A command's options are in ``options/NAME.py``, which needs no torch; its work, in ``NAME.py``, is imported to be done.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import UserError, WorkError
from .options.parser import Parser, command_list

COMMANDS = {
    "info": "list the known teachers and students and which weights are found",
    "pairs": "make noise-token pairs with a teacher, show or verify them",
    "train": "train a student on noise-token pairs",
    "sample": "draw images with a student, its teacher, both, or a baseline",
    "eval": "FID, sFID, Inception Score, precision and recall of images",
    "report": "the paper's tables and curves for a teacher and its students",
    "export": "a student as ONNX, TensorRT, OpenVINO, AOTInductor or a Triton server's model",
    "run": "draw images with an exported folder",
    "bench": "latency of an exported folder",
    "convert": "convert a released checkpoint to safetensors",
    "digits": "train or measure the bundled digits teachers",
}

DESCRIPTION = f"""\
Distilled Decoding: noise-token pairs of an autoregressive image teacher, and what comes of them.

commands (`ddfast COMMAND --help` has each one's options and examples):
{command_list(COMMANDS)}"""

EPILOG = """\
try it now, on a laptop, without downloads:
  ddfast pairs --teacher digits-var --num 2000 --out pairs/
  ddfast train --teacher digits-var --pairs pairs/ --steps 300 --out runs/first
  ddfast sample --student runs/first --compare --out grid.png

exit codes: 0 done, 1 failed while working, 2 refused before work, 130 interrupted
"""
INTERRUPTED = "what was finished is kept, and the same command goes on from there"


def build_parser() -> Parser:
    """Of `ddfast` itself; commands have their own, see :func:`read`."""
    parser = Parser("", DESCRIPTION, EPILOG)
    parser.usage = "ddfast COMMAND ..."
    parser.add_argument("--version", action="version", version=f"ddfast {__version__}")
    return parser


def read(words: Sequence[str]) -> argparse.Namespace | None:
    """The options of a command line; None where it names no command. Leaves with a message where it cannot be read."""
    if words and words[0] in COMMANDS:
        parser: Parser = importlib.import_module(f".options.{words[0]}", __package__).make_parser()
        args = parser.read(words[1:])
        if args.work is None:
            parser.error(f"say which of {', '.join(parser.actions)}")
        return args
    if not words or words[0].startswith("-"):
        build_parser().read(words)
        return None
    near = difflib.get_close_matches(words[0], COMMANDS, n=1)
    hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}"
    build_parser().error(f"no command is called {words[0]!r}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    interrupted = INTERRUPTED
    try:
        args = read(sys.argv[1:] if argv is None else list(argv))
        if args is None:
            build_parser().print_help()
            return 2
        interrupted = args.interrupted or INTERRUPTED
        from .process import imported, prepared

        module, _, function = args.work.partition(":")
        work = getattr(imported(f"{__package__}.{module}"), function)
        with prepared():
            code = int(work(args))
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except UserError as error:
        return fail(str(error), 2)
    except WorkError as error:
        return fail(str(error), 1)
    except BrokenPipeError:
        return 1  # nobody reads what is printed any more
    except OSError as error:
        return fail(os_message(error), 1)
    except MemoryError as error:
        return fail(f"out of memory{f' ({error})' if str(error) else ''}: use a smaller --batch or --num", 1)
    except KeyboardInterrupt:
        return fail(f"interrupted; {interrupted}", 130)
    finally:
        settle()


def os_message(error: OSError) -> str:
    """What the system says, of which file."""
    if error.filename is None:
        return str(error.strerror or error)
    return f"{error.strerror or error} ({os.fsdecode(error.filename)})"


def settle() -> None:
    """Where what was printed cannot be delivered, a full disk or a closed pipe, keep Python from repeating that."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK")
    where = f" (rank {rank})" if rank else ""
    with contextlib.suppress(OSError):
        print(f"ddfast{where}: {message}", file=sys.stderr)
    return code
