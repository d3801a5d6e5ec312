"""A report as one HTML page that carries its pictures, and as one Markdown page beside them."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from ..errors import UserError
from ..files import remove_abandoned, write_atomic
from .plots import LABELS, Plot, draw
from .record import FILE, KINDS, METRICS, Report, Row, Study

FIGURES = "figures"
PAPER = "https://arxiv.org/abs/2412.17153"
ONESTEP = "onestep*"  # one step from the marginals of each token, Prop. 3.1 of the paper
ABSENT = "–"

STYLE = """\
:root { color-scheme: light dark; --line: #ccc; --soft: #f3f3f3; --ink: #1a1a1a; --page: #fff; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #242424; --ink: #e4e4e4; --page: #161616; --link: #7db7f0; }
}
body { margin: 0 auto; padding: 1rem 1.2rem 3rem; max-width: 70rem; color: var(--ink); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; }
a { color: var(--link); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
.settings td { overflow-wrap: anywhere; }
thead th { border-bottom-width: 2px; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--soft); }
.figures tbody { white-space: nowrap; }
.figures th:nth-child(n+3), .figures td:nth-child(n+3) { text-align: right; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; }
figcaption { font-size: .95rem; }
"""


def write_page(folder: Path, report: Report) -> None:
    """Write report.html, report.md, report.json and figures/*.png into ``folder``, each whole or not at all.

    report.html needs no other file; report.md shows the figures and the pictures beside it.

    Raises:
        UserError: before anything is written, for a picture that is missing or none, and where matplotlib is missing.
    """
    pictures = read_pictures(folder, report)
    plots = draw(report.studies)
    blocks = list(content(report, plots, pictures))
    pages = {"report.md": to_markdown(blocks), "report.html": to_html(report.title, blocks), FILE: report.to_json()}
    remove_abandoned(folder, *pages)
    remove_abandoned(folder / FIGURES, "*.png")
    for plot in plots:
        write_atomic(folder / FIGURES / f"{plot.name}.png", plot.png)
    for name, text in pages.items():
        write_atomic(folder / name, text.encode(errors="backslashreplace"))


def read_pictures(folder: Path, report: Report) -> dict[str, tuple[bytes, str]]:
    """Bytes and media type of each picture that the report names, by file name."""
    pictures = {}
    for name in (name for study in report.studies for name in study.pictures.values()):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"the report's picture {name} lies outside of {folder}; copy it beside the page")
        try:
            data = path.read_bytes()
        except OSError as e:
            raise UserError(f"cannot read the report's picture {path}: {e.strerror}") from None
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                image.load()
                pictures[name] = data, Image.MIME[str(image.format)]
        except (OSError, SyntaxError, Image.DecompressionBombError):
            raise UserError(f"{path} is damaged, or no PNG, JPEG or WebP picture; make it again") from None
    return pictures


# -- content, the same for both pages


class Heading(NamedTuple):
    level: int
    text: str


class Text(NamedTuple):
    text: str
    link: str | None = None


class Items(NamedTuple):
    texts: list[str]


class Table(NamedTuple):
    """Cells are texts, True with those in bold. ``style`` is a class of :data:`STYLE`."""

    head: list[str]
    rows: list[list[tuple[str, bool]]]
    style: str


class Picture(NamedTuple):
    """``file`` lies beside the Markdown page; ``data`` is the same file's."""

    file: str
    data: bytes
    media_type: str
    caption: str
    alt: str


Block = Heading | Text | Items | Table | Picture


def content(report: Report, plots: Sequence[Plot], pictures: dict[str, tuple[bytes, str]]) -> Iterator[Block]:
    """The page, block by block."""
    yield Heading(1, report.title)
    yield Text(f"{report.created}. Times measured on {report.hardware}.")
    yield Text("The method and its tables: Distilled Decoding, arXiv 2412.17153", PAPER)
    yield Heading(2, "Quality and time")
    yield from how_to_read(report)
    for study in report.studies:
        yield Heading(3, f"{study.teacher} and {study.student}")
        yield table(study)
        line = gap_line(study)
        if line:
            yield Text(line)
    yield Heading(2, "Plots")
    yield Text("Markers are means; where there are several seeds, bars reach from the least to the largest value.")
    for plot in plots:
        yield Picture(f"{FIGURES}/{plot.name}.png", plot.png, "image/png", plot.caption, plot.alt)
    if pictures:
        yield Heading(2, "Pictures")
    for study in report.studies:
        for caption, name in study.pictures.items():
            yield Picture(name, *pictures[name], f"{study.teacher}. {caption}", f"Images: {caption}")
    if any(study.facts for study in report.studies):
        yield Heading(2, "Settings")
    for study in report.studies:
        if study.facts:
            yield Heading(3, f"{study.teacher} and {study.student}")
            yield Table(["setting", "value"], [[(n, False), (v, False)] for n, v in settings(study.facts)], "settings")
    if report.notes:
        yield Heading(2, "Notes")
        yield Items(report.notes)


def how_to_read(report: Report) -> Iterator[Block]:
    used = {metric for study in report.studies for metric in study.metrics}
    texts = [
        f"{name}: {metric.meaning}; {'higher' if metric.higher else 'lower'} is better."
        for name, metric in METRICS.items()
        if name in used
    ]
    texts.append("passes: forward passes an image, the teacher's and the student's together.")
    if any(len(values) > 1 for study in report.studies for row in study.rows for values in row.values.values()):
        texts.append("a ± b: mean over seeds, and half the distance between the least and the largest value.")
    texts.append("Bold: the best of its column, the teacher left out.")
    yield Items(texts)


def table(study: Study) -> Table:
    """A row a way of sampling, by kind; quality, measured time and speed-up over the teacher."""
    head = ["sampling", "kind", "passes", *(f"{m} {'↑' if METRICS[m].higher else '↓'}" for m in study.metrics)]
    for batch in study.batches:
        head += [f"ms/image, batch {batch}", f"speed-up, batch {batch}"]
    best = {metric: best_mean(study, metric) for metric in study.metrics}
    rows = []
    for row in sorted(study.rows, key=lambda row: KINDS.index(row.kind)):
        cells = [(row.name, False), (LABELS[row.kind], False), (str(row.passes), False)]
        for metric in study.metrics:
            values = row.values.get(metric)
            bold = values is not None and row.kind != "teacher" and mean_text(metric, values) == best[metric]
            cells.append((with_spread(metric, values) if values else ABSENT, bold))
        for batch in study.batches:
            cells += [(text, False) for text in timing(study, row, batch)]
        rows.append(cells)
    return Table(head, rows, "figures")


def timing(study: Study, row: Row, batch: str) -> tuple[str, str]:
    """Milliseconds an image, and how many times fewer than the teacher's."""
    ms, teacher = row.ms_per_image.get(batch), study.teacher_row
    if ms is None:
        return ABSENT, ABSENT
    slow = teacher.ms_per_image.get(batch) if teacher else None
    return three_digits(ms), ABSENT if slow is None else f"{three_digits(slow / ms)}×"


def best_mean(study: Study, metric: str) -> str | None:
    """The best mean of the rows other than the teacher's, as it is shown: equal ones are all the best."""
    means = [fmean(row.values[metric]) for row in study.rows if row.kind != "teacher" and metric in row.values]
    if not means:
        return None
    return mean_text(metric, [max(means) if METRICS[metric].higher else min(means)])


def gap_line(study: Study) -> str | None:
    """How much of the distance from onestep* to the teacher each student's row closes; None without such rows."""
    teacher, onestep = study.teacher_row, next((row for row in study.rows if row.name == ONESTEP), None)
    students = [row for row in study.rows if row.kind == "student"]
    if teacher is None or onestep is None or not students:
        return None
    parts = []
    for row in students:
        closed = gap_closed(*(r.values[study.metric] for r in (row, teacher, onestep)))
        if closed is None:
            return f"Gap closed: undefined, for {ONESTEP} is no worse than the teacher in {study.metric}."
        least = f" (least of {len(closed)} seeds: {percent(min(closed))})" if len(closed) > 1 else ""
        parts.append(f"{row.name} {percent(fmean(closed))}{least}")
    return f"Gap closed between {ONESTEP} and the teacher, in {study.metric}: {', '.join(parts)}."


def gap_closed(row: Sequence[float], teacher: Sequence[float], onestep: Sequence[float]) -> list[float] | None:
    """1 - (row - teacher) / (onestep - teacher), seed by seed; None where onestep is not worse than the teacher.

    Each argument holds one value a seed, or a single one for all.
    """
    seeds = max(map(len, (row, teacher, onestep)))
    values = zip(*(list(v) * (seeds if len(v) == 1 else 1) for v in (row, teacher, onestep)), strict=True)
    triples = list(values)
    if any(o <= t for _, t, o in triples):
        return None
    return [1 - (r - t) / (o - t) for r, t, o in triples]


def settings(facts: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values; those of nested records as ``record.name``."""
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield from settings(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", in_words(value)


def in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, list) and not any(isinstance(v, list | dict) for v in value):
        return ", ".join(map(in_words, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


# -- numbers


def decimals(metric: str, value: float) -> int:
    """Digits after the point: of a Frechet distance three below 1 and two from there on, otherwise three in all."""
    if METRICS[metric].frechet:
        return 3 if abs(value) < 1 else 2
    return max(0, 2 - exponent(value))


def mean_text(metric: str, values: Sequence[float]) -> str:
    return f"{fmean(values):.{decimals(metric, fmean(values))}f}"


def with_spread(metric: str, values: Sequence[float]) -> str:
    """The mean, and half the range if there are several values."""
    if len(values) == 1:
        return mean_text(metric, values)
    half = (max(values) - min(values)) / 2
    return f"{mean_text(metric, values)} ± {half:.{decimals(metric, fmean(values))}f}"


def exponent(value: float) -> int:
    """Of ten, when ``value`` is rounded to three digits."""
    return int(f"{value:.2e}".partition("e")[2])


def three_digits(value: float) -> str:
    """In three digits: 0.0123, 1.23, 12.3, 123 and 12,300."""
    power = exponent(value)
    return f"{round(value, 2 - power):,.{max(0, 2 - power)}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


# -- HTML


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page without scripts or other files."""
    body = "\n".join(map(html_block, blocks))
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def html_block(block: Block) -> str:
    e = html.escape
    if isinstance(block, Heading):
        return f"<h{block.level}>{e(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{e(block.text)}</p>" if block.link is None else f'<p><a href="{block.link}">{e(block.text)}</a></p>'
    if isinstance(block, Items):
        return "<ul>\n" + "".join(f"<li>{e(text)}</li>\n" for text in block.texts) + "</ul>"
    if isinstance(block, Table):
        head = "".join(f'<th scope="col">{e(text)}</th>' for text in block.head)
        rows = "".join(f"<tr>{''.join(map(html_cell, range(len(row)), row))}</tr>\n" for row in block.rows)
        table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>"
        return f'<div class="wide"><table class="{block.style}">\n{table}\n</table></div>'
    source = f"data:{block.media_type};base64,{base64.b64encode(block.data).decode()}"
    image = f'<img src="{source}" alt="{e(block.alt)}">'
    return f"<figure>\n{image}\n<figcaption>{e(block.caption)}</figcaption>\n</figure>"


def html_cell(column: int, cell: tuple[str, bool]) -> str:
    text = f"<strong>{html.escape(cell[0])}</strong>" if cell[1] else html.escape(cell[0])
    return f"<td>{text}</td>" if column else f'<th scope="row">{text}</th>'


# -- Markdown


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(markdown_block, blocks)) + "\n"


def markdown_block(block: Block) -> str:
    m = markdown_text
    if isinstance(block, Heading):
        return f"{'#' * block.level} {m(block.text)}"
    if isinstance(block, Text):
        return m(block.text) if block.link is None else f"[{m(block.text)}]({block.link})"
    if isinstance(block, Items):
        return "\n".join(f"- {m(text)}" for text in block.texts)
    if isinstance(block, Table):
        rule = [":--", ":--"] + (["--:"] * (len(block.head) - 2) if block.style == "figures" else [])
        rows = [[f"**{m(text)}**" if bold else m(text) for text, bold in row] for row in block.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in ([m(text) for text in block.head], rule, *rows))
    return f"![{m(block.alt)}]({quote(block.file)})\n\n{m(block.caption)}"


def markdown_text(text: str) -> str:
    """``text`` on one line, with nothing in it that Markdown reads as markup."""
    text = re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d+(?=[.)](?: |$))|(?=[-+]))", r"\1\\", text)  # nor as an item of a list
