"""How samples are measured: Frechet distance of classifier features, accuracy, and PSNR."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast.errors import UserError


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian fitted to features: ``mean`` [D] and ``covariance`` [D, D], float64, and the ``count`` behind them."""

    mean: Tensor
    covariance: Tensor
    count: int


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Mean and unbiased covariance of ``features`` [N, D], accumulated in float64. Needs N >= 2."""
    if features.dim() != 2 or len(features) < 2:
        raise UserError(f"features of shape {tuple(features.shape)}: expected [N, D] with at least two rows")
    x = features.double()
    return FeatureStatistics(x.mean(0), torch.cov(x.T), len(x))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, as used by FID (arXiv 1706.08500).

    |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)). The last trace is taken from the eigenvalues of the
    symmetric A S_b A with A = S_a^(1/2), which are those of S_a S_b: real and non-negative even for singular S.
    """
    root = _symmetric_root(a.covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return float((a.mean - b.mean).square().sum() + trace)


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of ``logits`` [N, K] whose largest entry is at ``labels`` [N]."""
    return float((logits.argmax(dim=-1) == labels).double().mean())


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two equally shaped batches in [0, 1], from the MSE over all pixels."""
    return float(-10 * (images.double() - reference.double()).square().mean().log10())
