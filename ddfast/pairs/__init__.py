"""Noise-token pairs: making them with a teacher, storing them in shards, reading them back."""

from __future__ import annotations

from .dataset import PairDataset, Pairs
from .engine import Plan, decode, default_batch, execute
from .manifest import Manifest, describe, read_manifest
from .store import Run, read_shard

__all__ = [
    "Manifest",
    "PairDataset",
    "Pairs",
    "Plan",
    "Run",
    "decode",
    "default_batch",
    "describe",
    "execute",
    "read_manifest",
    "read_shard",
]
