"""Tiny teachers of both families, and pairs of them: what the tests of the engine share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddfast import ops
from ddfast.flow import make_solver
from ddfast.models import Sampling, Teacher
from ddfast.pairs import Manifest, Plan, decode, describe, execute

FAMILIES = ("var", "llamagen")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def manifest_of(teacher: Teacher, num: int = 50, shard_size: int = 16, **changes: Any) -> Manifest:
    plain = teacher.plain_sampling()
    sampling = Sampling(1.5, 6, plain.top_p, guidance_interval=changes.pop("interval", -1))
    return describe(teacher, sampling, make_solver(), num=num, shard_size=shard_size, **changes)


def make(folder: Path, teacher: Teacher, manifest: Manifest, batch: int = 8, **options: Any) -> None:
    execute(Plan(folder, manifest, range(manifest.num_shards)), teacher, batch, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def at_once(teacher: Teacher, manifest: Manifest, first: int, count: int) -> torch.Tensor:
    """Tokens of some pairs by the plain function."""
    pairs = torch.arange(first, first + count, device=teacher.device)
    noise = ops.normal_noise(manifest.seed, pairs, 0, manifest.num_tokens, manifest.channels)
    sampling = Sampling(**manifest.sampling)
    return decode(teacher, manifest.pair_labels(pairs), noise, sampling, make_solver())
