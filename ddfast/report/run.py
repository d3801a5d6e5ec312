"""Measuring a study: every row of the paper's Tables 1 and 2 and the curves of its Figures 6 and 7, for one teacher.

All ways of drawing start from the same noise. With several students, of which each was trained with another seed, every
way is measured once a student, each from noise of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..evaluation.evaluate import judge
from ..evaluation.features import FeatureExtractor, Measured, measure
from ..evaluation.reference import Reference
from ..evaluation.sampled import SampledImages
from ..evaluation.statistics import FeatureStatistics, frechet_distance
from ..models import Distilled
from ..models.classes import name_of
from ..pictures import grid
from ..sampling import (
    Drawing,
    Marginals,
    Plan,
    Sampler,
    few_step_plan,
    involved_plan,
    onestep_plan,
    passes,
    plan_name,
    teacher_plan,
)
from ..training.checkpoint import read_checked, steps_saved
from .record import Kind, Point, Row, Study

TEACHER_SEED = 1 << 32  # added to the seed for the teacher's samples that others are compared with
WARMUP, REPEATS = 2, 5
COLUMNS = 10
Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: images drawn of a stage."""
KEYS = {
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "spatial_frechet_distance": "sFID",
}


@dataclass(frozen=True)
class Subject:
    """What a study is of.

    Attributes:
        students: of one teacher, alike but for their seeds.
        drawing: that teacher.
        marginals: of its pairs, for onestep*; None leaves that row out.
        runs: their runs' folders, whose checkpoints make the curve over training; may be none.
        by_pairs: number of pairs trained on, to students that differ from the others in that alone.
    """

    students: Sequence[Distilled]
    drawing: Drawing
    marginals: Marginals | None = None
    runs: Sequence[Path] = ()
    by_pairs: Mapping[int, Sequence[Distilled]] | None = None


@dataclass(frozen=True)
class Settings:
    """How a study is measured.

    Attributes:
        num: samples a figure.
        teacher_num: ordinary samples of the teacher, which FD_T is the distance to.
        batch: images drawn together.
        time_batches: batches at which milliseconds an image are measured.
        involved: the teacher's groups (first, stop) in teacher-involved sampling; None for :func:`usual_involved`.
        skips: groups left out; None for :func:`usual_skips`.
        seed: of the first student's noise; the others follow.
    """

    num: int
    teacher_num: int
    batch: int
    time_batches: tuple[int, ...]
    involved: tuple[tuple[int, int], ...] | None = None
    skips: tuple[int, ...] | None = None
    seed: int = 0


def usual_involved(timesteps: Sequence[int], groups: int) -> tuple[tuple[int, int], ...]:
    """The teacher from the start, half-way and three quarters of the way up to the student's second timestep, as for
    LlamaGen in the paper, and from there to the end."""
    if len(timesteps) < 2:
        return ()
    switch = timesteps[1]
    firsts = sorted({0, switch // 2, 3 * switch // 4} - {switch})
    return (*((first, switch) for first in firsts), (switch, groups))


def usual_skips(groups: int) -> tuple[int, ...]:
    """A tenth and a fifth of the groups: VAR's skip-1 and skip-2."""
    tenth = max(1, round(groups / 10))
    return tuple(n for n in (tenth, 2 * tenth) if n < groups)


@dataclass(frozen=True)
class Way:
    """A row to be: ``ordinary`` is for the teacher's tokens by their probabilities."""

    name: str
    kind: Kind
    plan: Plan
    ordinary: bool = False


def ways_of(subject: Subject, settings: Settings) -> list[Way]:
    """Every row, in the order of the table."""
    student = subject.students[0]
    groups, timesteps = len(student.student.groups), student.timesteps
    involved = usual_involved(timesteps, groups) if settings.involved is None else settings.involved
    skips = usual_skips(groups) if settings.skips is None else settings.skips
    few = [few_step_plan(timesteps[:n], groups) for n in range(1, len(timesteps) + 1)]
    plans: list[tuple[Kind, Plan]] = [("student", plan) for plan in few]
    plans += [("involved", involved_plan(*span, groups)) for span in involved]
    plans += [("baseline", teacher_plan(groups, skip)) for skip in skips]
    if subject.marginals is not None:
        plans.append(("baseline", onestep_plan(groups)))
    whole = teacher_plan(groups)
    return [
        Way("teacher", "teacher", whole, ordinary=True),
        Way("teacher, by the flow", "teacher", whole),
        *(
            Way(f"DD, {plan_name(p, groups)}" if kind == "student" else plan_name(p, groups), kind, p)
            for kind, p in plans
        ),
    ]


class Examiner:
    """Draws, measures and times the ways of a study."""

    def __init__(
        self,
        subject: Subject,
        settings: Settings,
        extractor: FeatureExtractor,
        reference: Reference,
        progress: Progress,
    ) -> None:
        self.subject, self.settings, self.progress = subject, settings, progress
        self.extractor, self.reference = extractor, reference
        self.ways = ways_of(subject, settings)
        if subject.marginals is not None:
            subject.marginals.check_classes(range(subject.students[0].student.num_classes))
        self.groups = len(subject.students[0].student.groups)
        self.theirs = self._teacher()

    def samplers(self, ordinary: bool = False) -> list[Sampler]:
        """One a student. New ones each time: a sampler holds the teacher's KV cache."""
        drawing = replace(self.subject.drawing, ordinary=ordinary)
        return [Sampler(student, drawing, self.subject.marginals) for student in self.subject.students]

    def _teacher(self) -> FeatureStatistics:
        """Of the teacher's ordinary samples, none of which are in a row."""
        sampler = self.samplers(ordinary=True)[0]
        images = self.images(sampler, teacher_plan(self.groups), self.settings.teacher_num, TEACHER_SEED)
        return self._measure("the teacher's samples", images).pool

    def images(self, sampler: Sampler, plan: Plan, num: int, seed: int) -> SampledImages:
        classes = tuple(range(sampler.num_classes))
        return SampledImages(classes, num, self.settings.seed + seed, {}, sampler, plan)

    def _measure(self, stage: str, images: SampledImages) -> Measured:
        def advance(done: int) -> None:
            self.progress(stage, done, len(images))

        return measure(images.batches(self.settings.batch), self.extractor, advance=advance)

    def figures(
        self, stage: str, samplers: Sequence[Sampler], plan: Plan, neighbours: bool = True
    ) -> dict[str, list[float]]:
        """Every metric, a value a sampler; each draws from a seed of its own. ``neighbours``: precision and recall too,
        which take as long as the drawing."""
        found: dict[str, list[float]] = {}
        reference = self.reference if neighbours else replace(self.reference, features=None)
        for seed, sampler in enumerate(samplers):
            images = self.images(sampler, plan, self.settings.num, seed)
            measured = self._measure(f"{stage}, {seed + 1} of {len(samplers)}", images)
            judged = judge(measured, images.labels, reference, self.extractor)
            values = {self.extractor.distance: judged["frechet_distance"]}
            values["FD_T"] = frechet_distance(measured.pool, self.theirs)
            values |= {name: judged[key] for key, name in KEYS.items()}
            for name, value in values.items():
                if value is not None:
                    found.setdefault(name, []).append(float(value))
        return found

    def study(self, folder: Path, facts: dict[str, Any]) -> Study:
        """All rows and curves; a picture goes to ``folder``."""
        subject, student = self.subject, self.subject.students[0]
        rows = []
        for way in self.ways:
            samplers = self.samplers(way.ordinary)
            values = self.figures(way.name, samplers, way.plan)
            seconds = {str(b): time_plan(samplers[0], way.plan, b) / b for b in self.settings.time_batches}
            ms = {batch: 1e3 * s for batch, s in seconds.items()}
            rows.append(Row(way.name, way.kind, passes(way.plan), values, ms))
        drawing = subject.drawing
        own = {
            "noise": f"seeds {self.settings.seed} to {self.settings.seed + len(subject.students) - 1}",
            "teacher": {"name": drawing.teacher.name, "sampling": asdict(drawing.sampling)},
            "student": {"timesteps": list(student.timesteps), "split": student.split},
            "samples": self.settings.num,
            "samples of the teacher behind FD_T": self.settings.teacher_num,
            "seeds": len(subject.students),
            "classes": "all, in turn",
            "reference": self.reference.facts,
            "features": self.extractor.facts(),
        }
        return Study(
            teacher=drawing.teacher.name,
            student=student.name,
            metric=self.extractor.distance,
            rows=rows,
            training=list(self._training()),
            pairs=list(self._pairs()),
            pictures={"The same noise, drawn in every way": self.compare(folder)},
            facts=own | facts,
        )

    def _points(self, x: int, students: Sequence[Distilled], stage: str) -> Iterator[Point]:
        """A point for each number of steps."""
        samplers = [Sampler(student) for student in students]
        for n in range(1, len(students[0].timesteps) + 1):
            plan = few_step_plan(students[0].timesteps[:n], self.groups)
            way = plan_name(plan, self.groups)
            yield Point(x, way, self.figures(f"{stage}, {way}", samplers, plan, neighbours=False))

    def _training(self) -> Iterator[Point]:
        """The students as they were at their runs' checkpoints, as far as all runs have these."""
        if not self.subject.runs:
            return
        steps = set.intersection(*(set(steps_saved(run)) for run in self.subject.runs))
        for step in sorted(steps):
            then = [at_step(s, run, step) for s, run in zip(self.subject.students, self.subject.runs, strict=True)]
            yield from self._points(step, then, f"after {step} steps")

    def _pairs(self) -> Iterator[Point]:
        for count, students in sorted((self.subject.by_pairs or {}).items()):
            yield from self._points(count, students, f"{count} pairs")

    def compare(self, folder: Path) -> str:
        """A picture of every way, a row each, from the same noise; returns its name."""
        sampler = self.samplers()[0]
        count = min(COLUMNS, sampler.num_classes)
        ways = [way for way in self.ways if not way.ordinary]
        drawn = [self.images(sampler, way.plan, count, 0).draw(torch.arange(count)) for way in ways]
        captions = [name_of(label, sampler.num_classes) for label in range(count)]
        path = folder / f"{self.subject.drawing.teacher.name}-compare.png"
        grid(torch.cat(drawn).float() / 255, captions * len(ways), count, path, [way.name for way in ways])
        return path.name


def at_step(student: Distilled, run: Path, step: int) -> Distilled:
    """``student`` with the moving average of its run's checkpoint at ``step``."""
    tensors = read_checked(run, step)[1]
    then = type(student.student)(student.student.settings)
    then.load_state_dict({k.removeprefix("ema."): t for k, t in tensors.items() if k.startswith("ema.")})
    like = next(student.student.parameters())
    return replace(student, student=then.to(like.device, like.dtype).requires_grad_(False).eval(), sha256="")


def time_plan(sampler: Sampler, plan: Plan, batch: int) -> float:
    """Seconds for ``batch`` images from noise to pixels: the median of five, behind two that do not count."""
    samples = torch.arange(batch)
    labels = (samples % sampler.num_classes).to(sampler.device)
    seconds = []
    for _ in range(WARMUP + REPEATS):
        _wait(sampler.device)
        begin = time.perf_counter()
        sampler.images(labels, sampler.noise(0, samples), plan)
        _wait(sampler.device)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[WARMUP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
