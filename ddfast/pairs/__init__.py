"""Noise-token pairs: making them with a teacher, storing them in shards, reading them back."""

from __future__ import annotations

from .dataset import PairDataset, Pairs
from .decoder import Decoder, PairDecoder, decode
from .engine import Plan, execute
from .manifest import Manifest, describe, read_manifest
from .memory import check_batch, default_batch, fits
from .store import Run, read_shard

__all__ = [
    "Decoder",
    "Manifest",
    "PairDataset",
    "PairDecoder",
    "Pairs",
    "Plan",
    "Run",
    "check_batch",
    "decode",
    "default_batch",
    "describe",
    "execute",
    "fits",
    "read_manifest",
    "read_shard",
]
