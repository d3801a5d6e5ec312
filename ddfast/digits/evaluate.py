"""Measuring a digits teacher or student: draw samples, compare them with the real data and with the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ddfast.digits.classifier import DigitsClassifier, extract
from ddfast.digits.metrics import accuracy
from ddfast.evaluation.statistics import FeatureStatistics, feature_statistics, frechet_distance
from ddfast.models import Teacher
from ddfast.models.distilled import Distilled
from ddfast.sampling import Drawing, Plan, Sampler, few_step_plan, plan_name, teacher_plan

SAMPLES = 5000
TEACHER_SAMPLES = 20_000  # behind the statistics that students are compared with
BATCH = 500
SEED = 1


@dataclass(frozen=True)
class Quality:
    """Figures of a set of samples.

    Attributes:
        accuracy: the share that the classifier assigns to the class asked for.
        fd: Frechet distance to the real data.
        fd_teacher: the same to 20,000 of the teacher's ordinary samples; None where no student was measured.
    """

    accuracy: float
    fd: float
    fd_teacher: float | None = None

    def to_dict(self) -> dict[str, float]:
        """JSON-able, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Draw = Callable[[Tensor, int], Tensor]
"""``draw(labels [B], first) -> images [B, 3, H, W]``; ``first`` is the index of the batch's first sample."""


def measure(
    draw: Draw, classes: int, classifier: DigitsClassifier, reference: FeatureStatistics, samples: int = SAMPLES
) -> tuple[Quality, FeatureStatistics]:
    """Draw ``samples`` images, classes in turn: their quality against ``reference``, and their statistics."""
    labels = torch.arange(samples) % classes
    features, logits = [], []
    for part in torch.arange(samples).split(BATCH):
        out = extract(classifier, draw(labels[part], int(part[0]))[:, :1])
        features.append(out[0])
        logits.append(out[1])
    own = feature_statistics(torch.cat(features))
    return Quality(accuracy(torch.cat(logits), labels), frechet_distance(own, reference)), own


def measure_teacher(
    teacher: Teacher,
    classifier: DigitsClassifier,
    reference: FeatureStatistics,
    students: Mapping[str, Distilled] | None = None,
    seed: int = SEED,
) -> dict[str, Quality]:
    """The teacher at its default preset, by ordinary sampling (``teacher``) and through the flow (``flow map``), then
    each student by name, in one step and in the steps it was trained for, all from the same noise.
    """
    groups, flow = len(teacher.groups), Drawing(teacher, teacher.preset())
    ordinary = Sampler(drawing=replace(flow, ordinary=True))
    ways: dict[str, Draw] = {
        "teacher": drawn(ordinary, teacher_plan(groups), seed),
        "flow map": drawn(Sampler(drawing=flow), teacher_plan(groups), seed),
    }
    for name, model in (students or {}).items():
        for steps in sorted({1, len(model.timesteps)}):
            plan = few_step_plan(model.timesteps[:steps], groups)
            ways[f"{name}, {plan_name(plan, groups)}"] = drawn(Sampler(model), plan, seed)
    measured = {name: measure(draw, teacher.num_classes, classifier, reference) for name, draw in ways.items()}
    if not students:
        return {name: quality for name, (quality, _) in measured.items()}
    more = drawn(ordinary, teacher_plan(groups), seed + 1)  # other samples than those of the first row
    _, theirs = measure(more, teacher.num_classes, classifier, reference, TEACHER_SAMPLES)
    return {
        name: Quality(quality.accuracy, quality.fd, frechet_distance(own, theirs))
        for name, (quality, own) in measured.items()
    }


def drawn(sampler: Sampler, plan: Plan, seed: int) -> Draw:
    """The images of ``plan``, sample by sample from the seed's noise."""

    def draw(labels: Tensor, first: int) -> Tensor:
        return sampler.images(labels, sampler.noise(seed, torch.arange(first, first + len(labels))), plan)

    return draw
