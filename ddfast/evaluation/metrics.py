"""Inception Score, precision and recall of features and logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError

SPLIT = 5000
NEIGHBOURS = 3


def inception_score(logits_NK: Tensor, split: int = SPLIT) -> float:
    """Inception Score (arXiv 1606.03498) as OpenAI's ADM evaluator takes it, in float64.

    exp(mean_i KL(p_i || q)) with q the mean of the class probabilities p_i, for each consecutive part of ``split``
    images; then the mean over parts. A shorter last part counts as a whole one.
    """
    if logits_NK.dim() != 2 or not len(logits_NK):
        raise UserError(f"logits of shape {tuple(logits_NK.shape)}: expected [N, K] with at least one row")
    scores = []
    for part in logits_NK.split(split):
        log_p = part.double().log_softmax(-1)
        log_q = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(
    samples_ND: Tensor, reference_MD: Tensor, neighbours: int = NEIGHBOURS, chunk: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991), from float32 distances on the features' device.

    Every feature is the centre of a ball that reaches to its ``neighbours``-th nearest neighbour in its own set.
    Precision is the share of samples inside any reference ball, recall that of reference features inside any sample's.

    Args:
        chunk: rows of distances held at a time: memory is 4 bytes x ``chunk`` x the larger of N and M.

    Raises:
        UserError: a set has no more than ``neighbours`` features.
    """
    for name, features in (("samples", samples_ND), ("reference", reference_MD)):
        if len(features) <= neighbours:
            raise UserError(f"precision and recall need more than {neighbours} images; {name}: {len(features)}")
    centre_D = reference_MD.double().mean(0).float()  # distances of vectors far from zero would cancel
    samples, reference = samples_ND.float() - centre_D, reference_MD.float() - centre_D
    return (
        _covered(samples, reference, _radii(reference, neighbours, chunk), chunk),
        _covered(reference, samples, _radii(samples, neighbours, chunk), chunk),
    )


def _radii(x_ND: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Distance [N] of each vector to its ``neighbours``-th nearest, without itself."""
    out = []
    for rows in torch.arange(len(x_ND), device=x_ND.device).split(chunk):
        distances = torch.cdist(x_ND[rows], x_ND)
        distances[torch.arange(len(rows), device=x_ND.device), rows] = torch.inf
        out.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(out)


def _covered(x_ND: Tensor, centres_MD: Tensor, radii_M: Tensor, chunk: int) -> float:
    """Share of ``x`` inside any ball."""
    inside = [(torch.cdist(part, centres_MD) <= radii_M).any(dim=1) for part in x_ND.split(chunk)]
    return float(torch.cat(inside).double().mean())
