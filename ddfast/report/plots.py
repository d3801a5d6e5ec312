"""Plots of a report, one column a study: quality against forward passes, time, training and pairs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import UserError
from .record import KINDS, METRICS, Kind, Point, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import LineStyleType

    Floats = np.ndarray[Any, np.dtype[np.float64]]

DPI = 160
COLUMN, HEIGHT = 5.2, 4.2  # inches
LOG_RANGE = 10  # a y axis is logarithmic where its values span more than this factor
NEAR = 5  # points around a marker that no name may touch
NAME_SIZE = 8
DISTANCES = (6, 14, 24, 38, 54)  # points from a marker to its name, tried in this order
DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))

# Told apart by shape and grey value too, for print in black and white.
LOOKS: dict[Kind, tuple[str, str]] = {
    "teacher": ("s", "#000000"),
    "student": ("o", "#0072b2"),
    "involved": ("D", "#d55e00"),
    "baseline": ("^", "#808080"),
}
LABELS: dict[Kind, str] = {
    "teacher": "teacher",
    "student": "student",
    "involved": "teacher-involved student",
    "baseline": "baseline",
}
GREY = "#666666"
LEVEL: LineStyleType = (0, (6, 3))  # dashes of the teacher's level
LINES: tuple[tuple[LineStyleType, str, str], ...] = (
    ("-", "o", "#0072b2"),
    ("--", "D", "#d55e00"),
    (":", "^", "#444444"),
    ("-.", "v", "#009e73"),
)
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


class Plot(NamedTuple):
    """A PNG, the stem of its file name, its caption, and what it says in words."""

    name: str
    caption: str
    alt: str
    png: bytes


def check_matplotlib() -> None:
    """Raise UserError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("the page's plots need matplotlib: pip install 'ddfast[report]'") from None


def draw(studies: Sequence[Study]) -> list[Plot]:
    """The plots that the studies have points for. Error bars reach from the least to the largest value over seeds."""
    check_matplotlib()
    plots = [quality_against_passes(studies), quality_against_time(studies)]
    plots += [quality_against_points(studies, "training"), quality_against_points(studies, "pairs")]
    return [plot for plot in plots if plot is not None]


def quality_against_passes(studies: Sequence[Study]) -> Plot:
    """Every row, by its forward passes (log)."""

    def paint(axes: Axes, study: Study) -> list[Anchor]:
        anchors = []
        for row in study.rows:
            marker, colour = LOOKS[row.kind]
            point(axes, row.passes, row.values[study.metric], marker, colour, colour)
            anchors.append(Anchor(row.name, row.passes, fmean(row.values[study.metric])))
        return anchors

    png = figure(studies, paint, "forward passes an image", "log2", kinds_of(studies))
    caption = f"{chief(studies)} against forward passes."
    return Plot("passes", caption, f"Plot. {caption} {listed(studies)} The numbers are in the tables.", png)


def quality_against_time(studies: Sequence[Study]) -> Plot | None:
    """Every timed row, by its milliseconds an image, log-log; a line a batch size joins the teacher and its student."""
    timed = [study for study in studies if study.batches]
    if not timed:
        return None
    batches = sorted({batch for study in timed for batch in study.batches}, key=int)
    several = len(batches) > 1

    def paint(axes: Axes, study: Study) -> list[Anchor]:
        anchors: list[Anchor] = []
        named: set[str] = set()
        for batch in study.batches:
            index = batches.index(batch)
            style, _, _ = LINES[index % len(LINES)]
            rows = sorted((r for r in study.rows if batch in r.ms_per_image), key=lambda r: r.ms_per_image[batch])
            joined = [row for row in rows if row.kind != "baseline"]
            times, heights = [r.ms_per_image[batch] for r in joined], [fmean(r.values[study.metric]) for r in joined]
            axes.plot(times, heights, linestyle=style, color=GREY, linewidth=1, zorder=1)
            for row in rows:
                marker, colour = LOOKS[row.kind]
                values, ms = row.values[study.metric], row.ms_per_image[batch]
                point(axes, ms, values, marker, colour, colour if index == 0 else "white")
                anchors.append(Anchor("" if row.name in named else row.name, ms, fmean(values)))
                named.add(row.name)
        return anchors

    handles = kinds_of(timed)
    handles += [Handle(f"batch {batch}", LINES[index % len(LINES)][0], "", GREY) for index, batch in enumerate(batches)]
    png = figure(timed, paint, "measured time per image (ms)", "log", handles, log_y=True)
    sizes = " and ".join(batches)
    caption = f"{chief(timed)} against measured time per image, at batch {sizes}."
    if several:
        caption += f" Filled markers: batch {batches[0]}; a name holds for all the points at its height."
    return Plot("time", caption, f"Plot. {caption} {listed(timed)} The numbers are in the tables.", png)


def quality_against_points(studies: Sequence[Study], name: str) -> Plot | None:
    """``name`` is training (by optimiser steps) or pairs (by their number, log); one line a way of sampling."""
    label = {"training": "optimiser steps", "pairs": "noise-token pairs trained on"}[name]
    shown = [study for study in studies if getattr(study, name)]
    if not shown:
        return None
    ways = list(dict.fromkeys(p.way for study in shown for p in getattr(study, name)))

    def paint(axes: Axes, study: Study) -> list[Anchor]:
        for index, way in enumerate(ways):
            points = curve(getattr(study, name), way)
            if not points:
                continue
            style, marker, colour = LINES[index % len(LINES)]
            heights = [fmean(p.values[study.metric]) for p in points]
            axes.plot([p.x for p in points], heights, linestyle=style, color=colour, linewidth=1.4, zorder=2)
            for p in points:
                point(axes, p.x, p.values[study.metric], marker, colour, colour)
        return []

    handles = [Handle(way, *LINES[index % len(LINES)]) for index, way in enumerate(ways)]
    png = figure(shown, paint, label, "log" if name == "pairs" else "linear", handles)
    caption = f"{chief(shown)} against {label}."
    curves = []
    for study in shown:
        for way in ways:
            points = curve(getattr(study, name), way)
            numbers = ", ".join(f"{fmean(p.values[study.metric]):.3g} at {p.x:,}" for p in points)
            curves += [f"{study.teacher}, {way}: {numbers}."] if points else []
    return Plot(name, caption, f"Plot. {caption} {' '.join(curves)}", png)


# -- what the plots share


class Anchor(NamedTuple):
    """A marker in data coordinates that a name belongs to; an empty name only keeps others away."""

    name: str
    x: float
    y: float


class Handle(NamedTuple):
    """A line of the legend."""

    label: str
    style: LineStyleType
    marker: str
    colour: str


def curve(points: Sequence[Point], way: str) -> list[Point]:
    """The points of one way, by x."""
    return sorted((p for p in points if p.way == way), key=lambda p: p.x)


def chief(studies: Sequence[Study]) -> str:
    """The chief metrics, in words."""
    names = dict.fromkeys(study.metric for study in studies)
    return " or ".join(f"{METRICS[name].meaning} ({name}, lower is better)" for name in names)


def listed(studies: Sequence[Study]) -> str:
    return f"Columns: {', '.join(study.teacher for study in studies)}."


def kinds_of(studies: Sequence[Study]) -> list[Handle]:
    """A line of the legend for each kind that occurs."""
    there = {row.kind for study in studies for row in study.rows}
    return [Handle(LABELS[kind], "", *LOOKS[kind]) for kind in KINDS if kind in there]


def point(axes: Axes, x: float, values: Sequence[float], marker: str, colour: str, face: str) -> None:
    """A marker at the mean and, over several seeds, a bar from the least to the largest value."""
    y = fmean(values)
    if len(values) > 1:
        reach = [[y - min(values)], [max(values) - y]]
        axes.errorbar([x], [y], yerr=reach, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5, zorder=2)
    axes.plot([x], [y], marker, color=colour, markerfacecolor=face, markersize=6, linestyle="", zorder=3)


def figure(
    studies: Sequence[Study],
    paint: Callable[[Axes, Study], list[Anchor]],
    label: str,
    x_scale: str,
    handles: Sequence[Handle],
    log_y: bool = False,
) -> bytes:
    """A PNG with a column a study, which ``paint`` fills; it returns what is to be named there."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(STYLE)
        chart = Figure(figsize=(COLUMN * len(studies), HEIGHT), dpi=DPI, layout="constrained")
        FigureCanvasAgg(chart)
        columns = chart.subplots(1, len(studies), squeeze=False)[0]
        anchors = [paint(axes, study) for axes, study in zip(columns, studies, strict=True)]
        levels = [fmean(study.teacher_row.values[study.metric]) if study.teacher_row else None for study in studies]
        for axes, study, level in zip(columns, studies, levels, strict=True):
            axes.set(title=f"{study.teacher} and {study.student}", xlabel=label)
            axes.set_ylabel(f"{study.metric} (lower is better)")
            if level is not None:
                axes.axhline(level, color="black", linestyle=LEVEL, linewidth=0.9, zorder=1)
        log_y = log_y or any(axes.dataLim.ymax > LOG_RANGE * axes.dataLim.ymin for axes in columns)
        for axes in columns:
            scale(axes, "x", x_scale)
            scale(axes, "y", "log" if log_y else "linear")
        if any(level is not None for level in levels):
            handles = [*handles, Handle("the teacher's level", LEVEL, "", "black")]
        lines = [Line2D([], [], linestyle=s, marker=m, color=c, label=name) for name, s, m, c in handles]
        rows = math.ceil(len(lines) / (3 * len(studies)))
        chart.legend(handles=lines, loc="outside lower center", ncols=math.ceil(len(lines) / rows), handlelength=3)
        chart.draw_without_rendering()  # settles where the axes lie
        chart.set_layout_engine("none")
        for axes, names in zip(columns, anchors, strict=True):
            if names:
                place_names(chart, axes, names)
        chart.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def scale(axes: Axes, along: str, kind: str) -> None:
    """Limits around the data ``along`` x or y, and ticks in plain numbers; ``kind`` is linear, log or log2.

    Data that reach down to zero are shown linear.
    """
    from matplotlib.scale import LogScale
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = axes.xaxis if along == "x" else axes.yaxis
    low, high = axes.dataLim.intervalx if along == "x" else axes.dataLim.intervaly
    if kind == "linear" or low <= 0:
        pad = 0.08 * (high - low) or 0.1 * abs(high) or 1
        low, high = low - pad, high + pad
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        base, subs = (2, (1,)) if kind == "log2" else (10, (1,) if high > 1000 * low else (1, 2, 5))
        axes.set(**{f"{along}scale": LogScale(axis, base=base)})
        pad = max((high / low) ** 0.1, 1.25)
        low, high = low / pad, high * pad
        axis.set_major_locator(LogLocator(base, subs=subs, numticks=20))
        axis.set_minor_locator(NullLocator())
    axes.set(**{f"{along}lim": (low, high)})
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


def place_names(chart: Figure, axes: Axes, anchors: Sequence[Anchor]) -> None:
    """Write each name beside its marker, where it covers no marker, no line and no other name if there is such a place.

    Names are placed one after the other, in several orders; the best outcome stays.
    """
    from matplotlib.patheffects import withStroke

    unit = chart.dpi / 72  # pixels a typographic point
    named = [anchor for anchor in anchors if anchor.name]
    notes = [axes.text(0, 0, anchor.name, fontsize=NAME_SIZE, parse_math=False) for anchor in named]
    sizes = {a: np.array(note.get_window_extent().size) for a, note in zip(named, notes, strict=True)}
    for note in notes:
        note.remove()
    spots = {anchor: axes.transData.transform((anchor.x, anchor.y)) for anchor in anchors}
    lines = [line for line in axes.get_lines() if line.get_linestyle() != "None"]
    paths = [line.get_transform().transform_path(line.get_path()).interpolated(40).vertices for line in lines]
    inside = np.array([axes.get_window_extent().extents])
    obstacles = np.concatenate(
        [squares(np.array(list(spots.values())), NEAR * unit), *(squares(np.array(path), unit) for path in paths)]
    )

    def in_turn(order: Sequence[Anchor]) -> tuple[float, dict[Anchor, tuple[int, tuple[int, int]]]]:
        """Each name at its cheapest place, given those before it: the sum of costs; distances and directions."""
        taken, total, chosen = obstacles, 0.0, {}
        for anchor in order:
            choices = []
            for far, direction in product(DISTANCES, DIRECTIONS):
                towards, half = unit * np.array(direction), sizes[anchor] / 2
                centre = spots[anchor] + far * towards + np.array(direction) * half
                box = np.concatenate([centre - half, centre + half])
                leader = squares(spots[anchor] + np.outer(np.arange(2 * NEAR, far, 4), towards), unit)
                crossed = sum(overlap(square, taken) for square in leader)
                outside = np.prod(2 * half) - overlap(box, inside)
                choices.append((far + overlap(box, taken) + 3 * crossed + 10 * outside, far, direction, box, leader))
            cost, far, direction, box, leader = min(choices, key=lambda choice: round(choice[0], 3))
            total += cost
            chosen[anchor] = far, direction
            taken = np.concatenate([taken, box[None], leader])
        return total, chosen

    orders = [sorted(named, key=lambda a: sign * (a.y if by_y else a.x)) for sign in (1, -1) for by_y in (True, False)]
    _, chosen = min((in_turn(order) for order in orders), key=lambda result: result[0])
    for anchor, (far, (dx, dy)) in chosen.items():
        start = (0.5 - dx / 2, 0.5 - dy / 2)  # of the leader: the side or corner of the name that faces the marker
        leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": start}
        axes.annotate(
            anchor.name,
            (anchor.x, anchor.y),
            xytext=(far * dx, far * dy),
            textcoords="offset points",
            ha=("right", "center", "left")[dx + 1],
            va=("top", "center", "bottom")[dy + 1],
            fontsize=NAME_SIZE,
            arrowprops=leader if far > DISTANCES[0] else None,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            parse_math=False,
        )


def squares(centres: Floats, half: float) -> Floats:
    """Boxes [N, 4] of x0, y0, x1, y1 around points [N, 2]."""
    return np.concatenate([centres - half, centres + half], axis=1)


def overlap(box: Floats, boxes: Floats) -> float:
    """The area that a box [4] shares with boxes [N, 4], summed over them."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    return float(np.prod(np.maximum(sides, 0), axis=1).sum())
