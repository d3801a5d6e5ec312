"""Random flow problems of the two families' sizes, shared by the tests and the benches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast.flow import LogitFilter, filter_logits


@dataclass(frozen=True)
class Family:
    """How problems are drawn: V codes of C channels, and logits whose unfiltered perplexity is log-uniform in a range.

    std: per-channel standard deviation of the codebook; 0 puts its rows on the unit sphere.
    geometry: share of the logits' variance that is linear in the code, so that likely codes lie together.
    """

    vocab: int
    channels: int
    std: float
    geometry: float
    filter: LogitFilter
    perplexity: tuple[float, float] = (50.0, 1000.0)


_VAR = LogitFilter(top_k=900, top_p=0.95)
_TOP_2000 = LogitFilter(top_k=2000, rule="llamagen")
_DENSE = LogitFilter(rule="llamagen")

FAMILIES = {
    "var-0.3": Family(4096, 32, 0.3, 0.0, _VAR),
    "var-0.5": Family(4096, 32, 0.5, 0.0, _VAR),
    "var-1.0": Family(4096, 32, 1.0, 0.0, _VAR),
    "var-geo": Family(4096, 32, 0.5, 0.8, _VAR),
    "llama-iid": Family(16384, 8, 0.0, 0.0, _DENSE),
    "llama-geo": Family(16384, 8, 0.0, 0.8, _DENSE),
    "llama-k2000": Family(16384, 8, 0.0, 0.0, _TOP_2000),
    "var-sharp": Family(4096, 32, 0.5, 0.4, _VAR, (1.2, 50.0)),
    "llama-sharp": Family(16384, 8, 0.0, 0.4, _DENSE, (1.2, 50.0)),
    "small": Family(64, 8, 1.0, 0.4, _DENSE, (1.2, 40.0)),
    "small-c4": Family(64, 4, 1.0, 0.0, _DENSE, (5.0, 60.0)),
}


@dataclass(frozen=True)
class Problem:
    """log_p [N, V] (unnormalised, filtered), codebook [V, C], noise [N, C], all float32."""

    log_p: Tensor
    codebook: Tensor
    noise: Tensor


def draw(family: Family, count: int, seed: int, chunk: int = 200) -> Iterator[Problem]:
    """``count`` problems in chunks that share one codebook; a chunk depends on family, seed and its number only."""
    codebook = _codebook(family, _generator(seed, 0))
    for number, start in enumerate(range(0, count, chunk), start=1):
        g = _generator(seed, number)
        logits = _logits(family, codebook, chunk, g)
        noise = torch.randn(chunk, family.channels, generator=g)
        rows = min(chunk, count - start)
        yield Problem(filter_logits(logits[:rows], family.filter), codebook, noise[:rows])


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + number)


def _codebook(family: Family, g: torch.Generator) -> Tensor:
    rows = torch.randn(family.vocab, family.channels, generator=g)
    return family.std * rows if family.std else torch.nn.functional.normalize(rows, dim=1)


def _logits(family: Family, codebook: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Normal logits [count, V], each row sharpened by bisection to its own perplexity."""
    iid = torch.randn(count, family.vocab, generator=g)
    direction = torch.nn.functional.normalize(torch.randn(count, family.channels, generator=g), dim=1)
    linear = direction @ codebook.T / codebook.square().mean().sqrt()
    base = math.sqrt(1 - family.geometry) * iid + math.sqrt(family.geometry) * linear
    low_p, high_p = map(math.log, family.perplexity)
    target = low_p + (high_p - low_p) * torch.rand(count, generator=g)
    low, high = torch.zeros(count), torch.full((count,), 100.0)
    for _ in range(25):
        middle = (low + high) / 2
        log_p = (middle[:, None] * base).log_softmax(1)
        too_flat = -(log_p.exp() * log_p).sum(1) > target
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return high[:, None] * base
