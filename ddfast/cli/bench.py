"""``ddfast bench``: the latency of an exported folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..errors import UserError
from ..export.bench import Latency, latency
from ..export.build import open_engine
from ..files import check_writable, write_atomic
from ..hardware import cpu_name
from .run import engine_device

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


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="latency of an exported folder",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("engine", type=Path, metavar="DIR", help="a folder of `ddfast export`")
    parser.add_argument("--batches", default="1,8,64", metavar="LIST", help="images at once (default: 1,8,64)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="a size, and at least 3 calls (default: 5)"
    )
    parser.add_argument("--device", default="auto", help="auto (what it was built for), cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    batches = [part.strip() for part in args.batches.split(",")]
    if not all(part.isdecimal() and int(part) for part in batches):
        raise UserError(f"--batches {args.batches!r} is no list of numbers like 1,8,64")
    if not args.seconds >= 0:
        raise UserError(f"--seconds is {args.seconds}; it must not be negative")
    if args.json is not None:
        check_writable(args.json.parent)
    engine = open_engine(args.engine, engine_device(args.device))
    limits = engine.manifest.batch
    sizes = [int(part) for part in batches]
    possible = [size for size in sizes if limits.least <= size <= limits.most]
    if not possible:
        raise UserError(f"{args.engine} takes {limits.least} to {limits.most} images at once, not {args.batches}")
    console = Console(stderr=True)
    if left := [size for size in sizes if size not in possible]:
        listed = ", ".join(map(str, left))
        console.print(f"{listed} images at once are left out: it takes {limits.least} to {limits.most}")
    rows = []
    for batch in possible:
        with console.status(f"batch {batch}"):
            rows.append(latency(engine, batch, args.seconds))
    hardware = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    where = hardware if engine.device.type == "cuda" else f"{hardware}, {threads} thread" + "s" * (threads > 1)
    Console().print(table_of(f"{args.engine}: {engine.runtime} on {where}", rows))
    if args.json is not None:
        facts: dict[str, Any] = {"engine": engine.manifest.target, "precision": dict(engine.manifest.precision)}
        facts |= {"student": engine.manifest.student["name"], "timesteps": list(engine.manifest.timesteps)}
        facts |= {"runtime": engine.runtime, "hardware": where, "ddfast": __version__}
        facts["rows"] = [row.record() for row in rows]
        write_atomic(args.json, (json.dumps(facts, indent=1) + "\n").encode())
    return 0


def table_of(title: str, rows: list[Latency]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("batch", "median ms", "p20 - p80", "ms an image", "images/s", "first call ms", "calls"):
        table.add_column(name, justify="right")
    for r in rows:
        each = r.median_ms / r.batch
        spread = f"{r.p20_ms:,.1f} - {r.p80_ms:,.1f}"
        figures = (f"{r.median_ms:,.1f}", spread, f"{each:,.2f}", f"{1e3 / each:,.1f}", f"{r.first_ms:,.0f}")
        table.add_row(str(r.batch), *figures, str(r.calls))
    return table
