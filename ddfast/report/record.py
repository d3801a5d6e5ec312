"""What a report is made of: the measured figures of teachers and their students, stored as ``report.json``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..errors import UserError
from ..records import read_json, restore

FILE = "report.json"

Kind = Literal["teacher", "student", "involved", "baseline"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order of a table's rows


class Metric(NamedTuple):
    """How a figure is read: whether higher is better, whether it is a Frechet distance, and what it measures."""

    higher: bool
    frechet: bool
    meaning: str


METRICS = {
    "FD": Metric(False, True, "Frechet distance to the data"),
    "FID": Metric(False, True, "Frechet Inception distance to the data"),
    "FD_T": Metric(False, True, "Frechet distance to the teacher's samples"),
    "sFID": Metric(False, True, "FID of spatial features"),
    "IS": Metric(True, False, "Inception Score"),
    "precision": Metric(True, False, "share of the samples that lie among the data"),
    "recall": Metric(True, False, "share of the data that lie among the samples"),
    "accuracy": Metric(True, False, "share of the samples that are classified as the class asked for"),
}


@dataclass(frozen=True)
class Row:
    """A way to sample, measured.

    Attributes:
        name: as the paper calls it: teacher, DD-1, pre-trained-4-6, onestep*, skip-1.
        kind: whose way it is; "involved" is a student after some of its teacher's steps.
        passes: forward passes an image takes; the teacher's prefix counts with its first.
        values: for a metric, one value a seed (or a single one for all).
        ms_per_image: for a batch size, the measured milliseconds an image.
    """

    name: str
    kind: Kind
    passes: int
    values: dict[str, list[float]]
    ms_per_image: dict[str, float]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"{self.name}: kind {self.kind!r} is unknown; use {', '.join(KINDS)}")
        if self.passes < 1:
            raise UserError(f"{self.name}: passes is {self.passes}; it must be at least 1")
        check_values(self.name, self.values)
        for batch, ms in self.ms_per_image.items():
            if not (batch.isdecimal() and int(batch) > 0):
                raise UserError(f"{self.name}: ms_per_image has batch size {batch!r}; it must be a number from 1")
            if not (math.isfinite(ms) and ms > 0):
                raise UserError(f"{self.name}: {ms} ms an image at batch {batch}; it must be positive")


@dataclass(frozen=True)
class Point:
    """A student on the way to being trained.

    Attributes:
        x: optimiser steps, or pairs trained on.
        way: how it was sampled: "1 step", "2 steps".
        values: for a metric, one value a seed.
    """

    x: int
    way: str
    values: dict[str, list[float]]

    def __post_init__(self) -> None:
        check_values(f"{self.way} at {self.x}", self.values)


@dataclass(frozen=True)
class Study:
    """A teacher and its student.

    Attributes:
        teacher, student: their names.
        metric: the chief one, that of the plots; lower is better.
        rows: ways to sample, each measured in ``metric``.
        training: ``x`` counts optimiser steps.
        pairs: ``x`` counts the pairs trained on.
        pictures: for a caption, the name of a picture beside the page.
        facts: settings, as JSON holds them: guidance, samples, seeds, timesteps, hashes.
    """

    teacher: str
    student: str
    metric: str
    rows: list[Row]
    training: list[Point]
    pairs: list[Point]
    pictures: dict[str, str]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        if self.metric not in METRICS or METRICS[self.metric].higher:
            lower = ", ".join(name for name, metric in METRICS.items() if not metric.higher)
            raise UserError(f"{self.teacher}: metric {self.metric!r} cannot be the chief one; use {lower}")
        if not self.rows:
            raise UserError(f"{self.teacher}: the study has no rows")
        check_once((row.name for row in self.rows), f"rows of {self.teacher}")
        for name, points in (("training", self.training), ("pairs", self.pairs)):
            check_once(((point.way, point.x) for point in points), f"{name} of {self.teacher}")
            for point in points:
                if point.x < (1 if name == "pairs" else 0):
                    raise UserError(f"{self.teacher}: {name} has a point at {point.x}")
        measured = [(row.name, row.values) for row in self.rows]
        measured += [(f"{point.way} at {point.x}", point.values) for point in (*self.training, *self.pairs)]
        for name, values in measured:
            if self.metric not in values:
                raise UserError(f"{self.teacher}: {name} was not measured in {self.metric}, the chief metric")
        for metric in self.metrics:
            counts = {len(row.values[metric]) for row in self.rows if metric in row.values} - {1}
            if len(counts) > 1:
                raise UserError(
                    f"{self.teacher}: rows have {' and '.join(map(str, sorted(counts)))} values of {metric}; "
                    "give one a seed, or a single one for all seeds"
                )
        try:
            facts = json.loads(json.dumps(self.facts, allow_nan=False))
        except (TypeError, ValueError) as e:
            raise UserError(f"{self.teacher}: facts hold what JSON cannot: {e}") from None
        object.__setattr__(self, "facts", facts)

    @property
    def metrics(self) -> list[str]:
        """The metrics of any row, the chief one first."""
        measured = {metric for row in self.rows for metric in row.values}
        return [self.metric, *(metric for metric in METRICS if metric in measured - {self.metric})]

    @property
    def batches(self) -> list[str]:
        """The batch sizes that any row was timed at, rising."""
        return sorted({batch for row in self.rows for batch in row.ms_per_image}, key=int)

    @property
    def teacher_row(self) -> Row | None:
        """What the others are compared with: the first row of kind teacher."""
        return next((row for row in self.rows if row.kind == "teacher"), None)


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
        title: of the page.
        hardware: what the milliseconds were measured on.
        created: the date.
        studies: one or more.
        notes: remarks, a sentence or more each.
    """

    title: str
    hardware: str
    created: str
    studies: list[Study]
    notes: list[str]

    def __post_init__(self) -> None:
        if not self.studies:
            raise UserError("the report has no studies")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_dict` restores the report."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report of ``to_dict``'s result; UserError for keys that are missing or unknown, and for wrong types."""
        return restore(cls, values, "report")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """The report in a ``report.json``; UserError where there is none, or it is damaged."""
    return Report.from_dict(read_json(path))


def check_values(owner: str, values: dict[str, list[float]]) -> None:
    """Raise UserError for metrics that are unknown, without values or not finite."""
    for metric, numbers in values.items():
        if metric not in METRICS:
            raise UserError(f"{owner}: metric {metric!r} is unknown; use {', '.join(METRICS)}")
        if not numbers:
            raise UserError(f"{owner}: {metric} has no values; give one a seed, or leave it out")
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"{owner}: {metric} is {', '.join(map(str, numbers))}; values must be finite")


def check_once(names: Iterable[object], where: str) -> None:
    """Raise UserError for a name that comes twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: {twice[0]!r} comes twice")
