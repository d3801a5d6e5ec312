"""Noise-token pairs: making them with a teacher, storing them in shards, reading them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import front

if TYPE_CHECKING:
    from .dataset import PairDataset as PairDataset
    from .dataset import Pairs as Pairs
    from .decoder import Decoder as Decoder
    from .decoder import PairDecoder as PairDecoder
    from .decoder import decode as decode
    from .engine import Plan as Plan
    from .engine import execute as execute
    from .manifest import Manifest as Manifest
    from .manifest import describe as describe
    from .manifest import read_manifest as read_manifest
    from .memory import check_batch as check_batch
    from .memory import default_batch as default_batch
    from .memory import fits as fits
    from .store import Run as Run
    from .store import read_shard as read_shard

__getattr__, __all__ = front(
    __name__,
    {
        "PairDataset": "dataset",
        "Pairs": "dataset",
        "Decoder": "decoder",
        "PairDecoder": "decoder",
        "decode": "decoder",
        "Plan": "engine",
        "execute": "engine",
        "Manifest": "manifest",
        "describe": "manifest",
        "read_manifest": "manifest",
        "check_batch": "memory",
        "default_batch": "memory",
        "fits": "memory",
        "Run": "store",
        "read_shard": "store",
    },
)
