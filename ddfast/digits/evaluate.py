"""Measuring a digits teacher or student: draw samples, compare them with the real data and with the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from ddfast import ops
from ddfast.digits.classifier import DigitsClassifier, extract
from ddfast.digits.metrics import FeatureStatistics, accuracy, feature_statistics, frechet_distance
from ddfast.flow import filter_logits, make_solver
from ddfast.models import Sampling, Teacher
from ddfast.models.distilled import Distilled
from ddfast.pairs import decode
from ddfast.sampling import few_step

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


@torch.inference_mode()
def multinomial(teacher: Teacher, labels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Ordinary autoregressive sampling: each token drawn from the guided, filtered softmax. Returns tokens [B, L]."""
    state = teacher.decode_state(labels, sampling.guidance, sampling.guidance_interval)
    rule, out = teacher.filter(sampling), []
    for _ in teacher.groups:
        weight = state.weight
        cond, uncond = teacher.logits(state)
        logits = cond if uncond is None else uncond + weight * (cond - uncond)
        probs = filter_logits(logits, rule).softmax(-1)
        tokens = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(probs.shape[:2])
        teacher.append(state, tokens)
        out.append(tokens)
    return torch.cat(out, dim=1)


def flow_map(teacher: Teacher, labels: Tensor, first: int, sampling: Sampling, seed: int) -> Tensor:
    """The same distribution through the flow (Alg. 1), noise by seed and sample index. Returns tokens [B, L]."""
    noise = sample_noise(seed, labels, first, teacher.num_tokens, teacher.codebook.shape[1])
    return decode(teacher, labels, noise, sampling, make_solver())


def sample_noise(seed: int, labels: Tensor, first: int, length: int, channels: int) -> Tensor:
    """Noise [B, length, channels] of the samples ``first`` and following, the same for teacher and student."""
    return ops.normal_noise(seed, torch.arange(first, first + len(labels)), 0, length, channels)


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
    each student by name, in one step and in the steps it was trained for, from the noise that the flow map started at.
    """
    sampling, generator = teacher.preset(), torch.Generator().manual_seed(seed)
    ways: dict[str, Draw] = {
        "teacher": lambda labels, _first: teacher.images(multinomial(teacher, labels, sampling, generator)),
        "flow map": lambda labels, first: teacher.images(flow_map(teacher, labels, first, sampling, seed)),
    }
    for name, model in (students or {}).items():
        for steps in sorted({1, len(model.timesteps)}):
            ways[f"{name}, {steps} step{'s' * (steps > 1)}"] = partial(draw_student, model, steps, seed)
    measured = {name: measure(draw, teacher.num_classes, classifier, reference) for name, draw in ways.items()}
    if not students:
        return {name: quality for name, (quality, _) in measured.items()}
    more = torch.Generator().manual_seed(seed + 1)  # other samples than those of the first row
    _, theirs = measure(
        lambda labels, _first: teacher.images(multinomial(teacher, labels, sampling, more)),
        teacher.num_classes,
        classifier,
        reference,
        TEACHER_SAMPLES,
    )
    return {
        name: Quality(quality.accuracy, quality.fd, frechet_distance(own, theirs))
        for name, (quality, own) in measured.items()
    }


def draw_student(model: Distilled, steps: int, seed: int, labels: Tensor, first: int) -> Tensor:
    """A student's images of the samples ``first`` and following, in its first ``steps`` timesteps."""
    student = model.student
    noise = sample_noise(seed, labels, first, student.num_tokens, student.channels)
    x = few_step(student, labels, noise, model.codebook, model.timesteps[:steps], model.split)
    return model.images(x)
