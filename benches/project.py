"""What 1.2 million pairs of each teacher take, in hours and money: rewrites the tables in docs/throughput.md.

From rates that were measured (benches/results/pairs-cpu.json, gpu-*.json) and the work that each teacher of the zoo is.
A teacher that was not measured gets the rate of the nearest one of its family, by arithmetic, but LlamaGen on a GPU by
bytes of weights and cache read.

    python benches/project.py
    python benches/project.py --price-gpu 2.2 --price-cpu 0.08
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _common import RESULTS
from gpu_pairs import BARS, Work, count_work

from ddfast.models import TEACHERS

PAGE = Path(__file__).parent.parent / "docs" / "throughput.md"
BEGIN, END = "<!-- projection: written by benches/project.py -->", "<!-- end of projection -->"
PAIRS = 1_200_000
PRICE_GPU, PRICE_CPU = 3.0, 0.1  # dollars an hour, for a GPU and for the CPU of pairs-cpu.json
TFLOP_PER_S, COPY_GB_PER_S, BATCH = 750.0, 4000.0, 256  # what a measured H200 may give; only bars rest on these

Row = dict[str, Any]


def work_of(name: str) -> Work | None:
    """What a guided image of a teacher of the zoo takes; None for a bundled one."""
    config = TEACHERS[name].config
    return None if config is None else count_work(config)


def unit(name: str, gpu: bool) -> str:
    """By what rates scale within a family: arithmetic, but on a GPU LlamaGen by what it reads."""
    return "GB read" if gpu and TEACHERS[name].family == "LlamaGen" else "GFLOP"


def amount(name: str, batch: int, gpu: bool) -> float:
    """The size of a pair in that unit."""
    work = work_of(name)
    assert work is not None
    return (work.flop if unit(name, gpu) == "GFLOP" else work.read_bytes(batch)) / 1e9


def size(name: str, batch: int, gpu: bool) -> str:
    """That size with its unit."""
    if work_of(name) is None:
        return "small"
    digits = 0 if unit(name, gpu) == "GFLOP" else 1
    return f"{amount(name, batch, gpu):,.{digits}f} {unit(name, gpu)}"


def best(rows: Iterable[Row]) -> dict[str, Row]:
    """Each measured teacher's fastest row that changes nothing: no int8, no fp8."""
    found: dict[str, Row] = {}
    for row in rows:
        plain = row.get("precision", "native") == "native" and "pairs_per_s" in row
        if plain and row["pairs_per_s"] > found.get(row["teacher"], {"pairs_per_s": 0})["pairs_per_s"]:
            found[row["teacher"]] = row
    return found


def rate(name: str, measured: dict[str, Row], gpu: bool) -> tuple[float, str] | None:
    """(pairs a second, where it is from), or None where nothing of the family was measured."""
    if name in measured:
        row = measured[name]
        return row["pairs_per_s"], f"measured: {row['dtype']}, batch {row['batch']}"
    family = [n for n in measured if TEACHERS[n].family == TEACHERS[name].family and work_of(n) is not None]
    if not family or work_of(name) is None:
        return None

    def apart(other: str) -> float:
        batch = measured[other]["batch"]
        return abs(amount(other, batch, gpu) - amount(name, batch, gpu))

    near = min(family, key=apart)
    pairs_per_s, batch = measured[near]["pairs_per_s"], measured[near]["batch"]
    return pairs_per_s * amount(near, batch, gpu) / amount(name, batch, gpu), f"{near}, by {unit(name, gpu)}"


def number(value: float) -> str:
    """Two digits or more, without an exponent.

    >>> number(1432.1), number(23.4), number(0.0232)
    ('1,432', '23', '0.023')
    """
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def in_all(pairs_per_s: float, price: float) -> str:
    """Hours and dollars of 1.2M pairs."""
    hours = PAIRS / pairs_per_s / 3600
    cost = hours * price
    return f"{number(hours)} | ${cost:,.0f}" if cost >= 10 else f"{number(hours)} | ${cost:.2f}"


def table(measured: dict[str, Row], price: float, gpu: bool) -> list[str]:
    """A line a teacher: its size, rate, hours and cost."""
    lines = [
        "| teacher | a guided pair | pairs/s | from | hours | cost |",
        "|---|---|---|---|---|---|",
    ]
    for name in TEACHERS:
        known = rate(name, measured, gpu)
        if known is None:
            lines.append(f"| {name} | {size(name, BATCH, gpu)} | not measured | | | |")
            continue
        speed, source = known
        batch = measured.get(name, {"batch": BATCH})["batch"]
        lines.append(f"| {name} | {size(name, batch, gpu)} | {number(speed)} | {source} | {in_all(speed, price)} |")
    return lines


def bar_rate(name: str, tflop_per_s: float, gb_per_s: float) -> float:
    """Pairs a second at which the bar of the family is just held."""
    if TEACHERS[name].family == "VAR":
        return BARS["share_of_matmul_peak"] * 1e3 * tflop_per_s / amount(name, BATCH, gpu=True)
    return BARS["share_of_copy_bandwidth"] * gb_per_s / amount(name, BATCH, gpu=True)


def bar_table(tflop_per_s: float, gb_per_s: float, price: float) -> list[str]:
    """What the bars would mean for each teacher of the zoo."""
    lines = ["| teacher | a guided pair | pairs/s at the bar | hours | cost |", "|---|---|---|---|---|"]
    for name in TEACHERS:
        if work_of(name) is not None:
            speed = bar_rate(name, tflop_per_s, gb_per_s)
            lines.append(f"| {name} | {size(name, BATCH, gpu=True)} | {number(speed)} | {in_all(speed, price)} |")
    return lines


def projection(
    results: Path, price_gpu: float, price_cpu: float, tflop_per_s: float = TFLOP_PER_S, gb_per_s: float = COPY_GB_PER_S
) -> str:
    """The text between the two marks."""
    cpu = json.loads((results / "pairs-cpu.json").read_text())
    gpus = [
        figures for path in sorted(results.glob("gpu-*.json")) if (figures := json.loads(path.read_text())).get("pairs")
    ]
    lines = [
        f"**CPU: {cpu['hardware']['cpu']}**, at ${price_cpu:.2f} an hour, from benches/results/pairs-cpu.json:",
        "",
        *table(best(cpu["rows"]), price_cpu, gpu=False),
        "",
    ]
    for figures in gpus:
        gpu = figures["hardware"]["gpu"]
        lines += [
            f"**GPU: {gpu}**, one, at ${price_gpu:.2f} an hour:",
            "",
            *table(best(figures["pairs"]), price_gpu, gpu=True),
            "",
        ]
    if not gpus:
        lines += ["**GPU: not measured.** No GPU was at hand yet; `make gpu` measures one and this table follows.", ""]
    arithmetic, copying = (f"{bar:.0%}" for bar in BARS.values())
    lines += [
        f"**Bars, not measurements.** On an H200 the engine is held to {arithmetic} of the bf16 matmul peak for VAR, "
        f"to {copying} of the copy bandwidth for LlamaGen (weights and cache reads, batch {BATCH}). With "
        f"{tflop_per_s:,.0f} TFLOP/s and {gb_per_s:,.0f} GB/s, round guesses at what such a GPU reaches, and "
        f"${price_gpu:.2f} an hour, that would be:",
        "",
        *bar_table(tflop_per_s, gb_per_s, price_gpu),
    ]
    return "\n".join(lines)


def rewritten(page: str, text: str) -> str:
    """The page with ``text`` between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} has lost its marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price-gpu", type=float, default=PRICE_GPU, help="dollars an hour (default %(default)s)")
    parser.add_argument("--price-cpu", type=float, default=PRICE_CPU, help="dollars an hour (default %(default)s)")
    parser.add_argument("--print", action="store_true", help="show the tables instead of rewriting the page")
    args = parser.parse_args()
    text = projection(RESULTS, args.price_gpu, args.price_cpu)
    if args.print:
        print(text)
    else:
        PAGE.write_text(rewritten(PAGE.read_text(), text))


if __name__ == "__main__":
    main()
