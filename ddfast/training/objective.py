"""The loss of Distilled Decoding (arXiv 2412.17153, Sec. 3.3): from a point of the trajectory to its end.

Axes: B pairs, L tokens of an image, V codebook size, C codebook channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.student import Student
from ..pairs import Pairs
from .config import TrainConfig
from .distance import Distance


@dataclass(frozen=True)
class Losses:
    """Of each pair, float32 [B], over the tokens that were noise.

    total: what is minimised; distance, cross_entropy: its two terms without their weights; agreement: the share of
    tokens whose largest logit is the pair's.
    """

    total: Tensor
    distance: Tensor
    cross_entropy: Tensor
    agreement: Tensor

    def sums(self) -> Tensor:
        """Float32 [4]: each summed over the batch, detached, in the order of the fields."""
        return torch.stack([self.total, self.distance, self.cross_entropy, self.agreement]).detach().float().sum(1)


class Objective:
    """Losses of pairs at given timesteps.

    Args:
        student: for its groups; ``model`` may be the same wrapped for several ranks.
        distance: between predicted and true embeddings.
        codebook: [V, C] float32.
    """

    def __init__(self, student: Student, distance: Distance, codebook: Tensor, config: TrainConfig) -> None:
        self.student, self.distance, self.codebook, self.config = student, distance, codebook, config

    def point(self, pairs: Pairs, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t [B, L, C] (Eq. 5), the end of the trajectory [B, L, C], and where x_t is noise, bool [B, L]."""
        target = self.codebook[pairs.tokens]
        unknown = self.student.known(t_B, target.device)[:, 1:] == 0
        return torch.where(unknown.unsqueeze(2), pairs.noise, target), target, unknown

    def __call__(self, model: nn.Module, pairs: Pairs, t_B: Tensor) -> Losses:
        """``t_B`` int64 [B] on the pairs' device. Autocast, if any, is the caller's; sums are float32."""
        x_t, target, unknown = self.point(pairs, t_B)
        embeddings, logits = model(pairs.labels, x_t, t_B)
        count_B = unknown.sum(1)
        with torch.autocast(x_t.device.type, enabled=False):
            nll = F.cross_entropy(logits.float().flatten(0, 1), pairs.tokens.flatten(), reduction="none")
            cross_entropy = (nll.view_as(unknown) * unknown).sum(1) / count_B
            predicted = torch.where(unknown.unsqueeze(2), embeddings.float(), target)
            total = distance = torch.zeros_like(cross_entropy)
            if self.config.ce_weight:  # a head that is not read gets no gradient, rather than one of zeros
                total = self.config.ce_weight * cross_entropy
            if self.config.distance_weight:
                distance = self.distance(predicted, target, unknown)
                total = total + self.config.distance_weight * distance
        hits = (logits.detach().argmax(-1) == pairs.tokens) & unknown
        return Losses(total, distance, cross_entropy, hits.sum(1) / count_B)
