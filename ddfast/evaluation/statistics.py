"""Gaussians fitted to features, and the Frechet distance between two of them, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

CHUNK = 4096  # rows widened to float64 at a time


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian fitted to features.

    Attributes:
        mean: float64 [D].
        covariance: float64 [D, D], unbiased.
        count: number of features behind them, None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None


class RunningStatistics:
    """Mean and covariance of features that come in batches, on their device, without keeping them.

    Batches are joined by Chan's update, so that a mean far from zero costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0)
        self._scatter = torch.zeros(0)

    def add(self, features_BD: Tensor) -> None:
        """Take in another batch."""
        x_BD = features_BD.double()
        batch, dim = x_BD.shape
        if not self.count:
            self._mean, self._scatter = x_BD.new_zeros(dim), x_BD.new_zeros(dim, dim)
        mean_D = x_BD.mean(0)
        centred_BD, step_D = x_BD - mean_D, mean_D - self._mean
        share = batch / (self.count + batch)
        self._scatter.addmm_(centred_BD.T, centred_BD).addr_(step_D, step_D, alpha=self.count * share)
        self._mean += step_D * share
        self.count += batch

    def result(self) -> FeatureStatistics:
        """The Gaussian, on the CPU. Raises UserError for less than two features."""
        if self.count < 2:
            raise UserError(f"a covariance needs features of at least two images; there are {self.count}")
        return FeatureStatistics(self._mean.cpu(), (self._scatter / (self.count - 1)).cpu(), self.count)


def feature_statistics(features_ND: Tensor) -> FeatureStatistics:
    """Mean and unbiased covariance of ``features`` [N, D], accumulated in float64. Needs N >= 2."""
    if features_ND.dim() != 2 or len(features_ND) < 2:
        raise UserError(f"features of shape {tuple(features_ND.shape)}: expected [N, D] with at least two rows")
    running = RunningStatistics()
    for part in features_ND.split(CHUNK):
        running.add(part)
    return running.result()


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, as used by FID (arXiv 1706.08500).

    |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)). With S_a = A A^T and S_b = B B^T the eigenvalues of
    S_a S_b are those of the symmetric G = (A^T B)(A^T B)^T, so the last trace is the sum of their roots: real and
    non-negative. A and B have a column for each rank, so that singular S (fewer samples than features) lose nothing.
    """
    cross = _factor(a.covariance).T @ _factor(b.covariance)
    gram = cross @ cross.T if len(cross) <= len(cross.T) else cross.T @ cross
    trace = a.covariance.trace() + b.covariance.trace() - 2 * torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + trace)


def _factor(covariance_DD: Tensor) -> Tensor:
    """F [D, rank] with F F^T = ``covariance``; eigenvalues within rounding of zero are left out."""
    values, vectors = torch.linalg.eigh(covariance_DD)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
