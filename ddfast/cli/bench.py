"""``ddfast bench``: the latency of an exported folder."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from rich.table import Table

from .. import __version__
from ..errors import UserError
from ..export.bench import Latency, latency
from ..export.build import open_engine
from ..files import check_file, replacing, starts_with
from ..hardware import cpu_name
from .progress import console
from .shared import engine_device


def run(args: argparse.Namespace) -> int:
    batches = [part.strip() for part in args.batches.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 and int(part) for part in batches):
        raise UserError(f"--batches {args.batches!r} is no list of numbers like 1,8,64")
    if not 0 <= args.seconds < math.inf:
        raise UserError(f"--seconds is {args.seconds}; it must be a finite number, not negative")
    if args.json is not None:
        check_file(args.json, "JSON", starts_with(b"{"))
    engine = open_engine(args.engine, engine_device(args.device), args.trust)
    limits = engine.manifest.batch
    sizes = [int(part) for part in batches]
    possible = [size for size in sizes if limits.least <= size <= limits.most]
    if not possible:
        raise UserError(f"{args.engine} takes {limits.least} to {limits.most} images at once, not {args.batches}")
    shown = console()
    if left := [size for size in sizes if size not in possible]:
        listed = ", ".join(map(str, left))
        shown.print(f"{listed} images at once are left out: it takes {limits.least} to {limits.most}")
    rows = []
    for batch in possible:
        if not shown.is_terminal:
            shown.print(f"batch {batch}: at least {args.seconds:g} s")
        with shown.status(f"batch {batch}"):
            rows.append(latency(engine, batch, args.seconds))
    hardware = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    where = hardware if engine.device.type == "cuda" else f"{hardware}, {threads} thread" + "s" * (threads > 1)
    console(stderr=False).print(table_of(f"{args.engine}: {engine.runtime} on {where}", rows))
    if args.json is not None:
        facts: dict[str, Any] = {"engine": engine.manifest.target, "precision": dict(engine.manifest.precision)}
        facts |= {"student": engine.manifest.student["name"], "timesteps": list(engine.manifest.timesteps)}
        facts |= {"runtime": engine.runtime, "hardware": where, "ddfast": __version__}
        facts["rows"] = [row.record() for row in rows]
        with replacing(args.json) as file:
            file.write((json.dumps(facts, indent=1) + "\n").encode())
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
