"""Measuring a digits teacher: draw samples in one of two ways, compare them with the real data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from ddfast import ops
from ddfast.digits.classifier import DigitsClassifier, extract
from ddfast.digits.metrics import FeatureStatistics, accuracy, feature_statistics, frechet_distance
from ddfast.flow import filter_logits, make_solver
from ddfast.models import Sampling, Teacher
from ddfast.pairs import decode

SAMPLES = 5000
BATCH = 500
SEED = 1


@dataclass(frozen=True)
class Quality:
    """Figures of a set of samples: the share the classifier assigns to the class asked for, and FD to the real data."""

    accuracy: float
    fd: float

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return asdict(self)


Draw = Callable[[Tensor, int], Tensor]
"""``draw(labels [B], first) -> tokens [B, L]``; ``first`` is the index of the batch's first sample."""


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
    pairs = torch.arange(first, first + len(labels))
    noise = ops.normal_noise(seed, pairs, 0, teacher.num_tokens, teacher.codebook.shape[1])
    return decode(teacher, labels, noise, sampling, make_solver())


def measure(
    teacher: Teacher, draw: Draw, classifier: DigitsClassifier, reference: FeatureStatistics, samples: int = SAMPLES
) -> Quality:
    """Draw ``samples`` images, classes in turn, and measure them against ``reference``."""
    labels = torch.arange(samples) % teacher.num_classes
    features, logits = [], []
    for part in torch.arange(samples).split(BATCH):
        tokens = draw(labels[part], int(part[0]))
        out = extract(classifier, teacher.images(tokens)[:, :1])
        features.append(out[0])
        logits.append(out[1])
    fd = frechet_distance(feature_statistics(torch.cat(features)), reference)
    return Quality(accuracy(torch.cat(logits), labels), fd)


def measure_teacher(
    teacher: Teacher, classifier: DigitsClassifier, reference: FeatureStatistics, seed: int = SEED
) -> dict[str, Quality]:
    """The teacher at its default preset, by ordinary sampling (``teacher``) and through the flow (``flow map``)."""
    sampling, generator = teacher.preset(), torch.Generator().manual_seed(seed)
    ways: dict[str, Draw] = {
        "teacher": lambda labels, _first: multinomial(teacher, labels, sampling, generator),
        "flow map": partial(flow_map, teacher, sampling=sampling, seed=seed),
    }
    return {name: measure(teacher, draw, classifier, reference) for name, draw in ways.items()}
