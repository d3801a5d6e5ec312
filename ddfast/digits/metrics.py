"""Accuracy and PSNR."""

from __future__ import annotations

from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of ``logits`` [N, K] whose largest entry is at ``labels`` [N]."""
    return float((logits.argmax(dim=-1) == labels).double().mean())


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two equally shaped batches in [0, 1], from the MSE over all pixels."""
    return float(-10 * (images.double() - reference.double()).square().mean().log10())
