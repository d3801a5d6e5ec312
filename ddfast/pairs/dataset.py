"""Reading pairs back for training: random access, memory-mapped, noise made on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import ops
from ..errors import UserError
from .manifest import read_manifest
from .store import read_shard, shard_path


class Pairs(NamedTuple):
    """Some noise-token pairs.

    labels: int64 [B]; tokens: int64 [B, L]; noise: float32 [B, L, C].
    """

    labels: Tensor
    tokens: Tensor
    noise: Tensor


class PairDataset(Dataset[Pairs]):
    """The pairs of a folder.

    ``dataset[i]`` is one pair without the batch axis, ``dataset[[i, j, …]]`` a batch; with a DataLoader, batches are
    fastest as ``DataLoader(dataset, sampler=BatchSampler(…), batch_size=None)``.

    Args:
        folder: made by ``ddfast pairs``.
        verify: compare every shard's checksum on opening (about a second a gigabyte).
        partial: take the leading whole shards of an unfinished folder instead of refusing it.

    Raises:
        UserError: no pairs there, shards missing, damaged or of other pairs.
    """

    def __init__(self, folder: str | Path, verify: bool = True, partial: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = m = read_manifest(self.folder)
        count = next((s for s in range(m.num_shards) if not shard_path(self.folder, s).exists()), m.num_shards)
        if count < (1 if partial else m.num_shards):
            raise UserError(
                f"{self.folder} is unfinished: shard {count} of {m.num_shards} is missing; "
                "run the `ddfast pairs` command that began it once more"
            )
        self._shards = [read_shard(self.folder, m, s, full=verify).tensors for s in range(count)]
        self._length = sum(len(s["labels"]) for s in self._shards)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> Pairs:
        if isinstance(index, int):
            return Pairs(*(t[0] for t in self[[index]]))
        pairs = torch.as_tensor(index, dtype=torch.int64)
        pairs = torch.where(pairs < 0, pairs + self._length, pairs)
        return Pairs(*self.rows(pairs), self.noise(pairs))

    def rows(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored of the ``pairs`` int64 [B]: labels int64 [B] and tokens int64 [B, L]."""
        if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < self._length:
            raise IndexError(f"pair index out of range: the folder holds {self._length}")
        return self._gather("labels", pairs).long(), self._gather("tokens", pairs).long()

    def labels(self) -> Tensor:
        """Of all pairs: int64 [N]."""
        return torch.cat([shard["labels"] for shard in self._shards]).long()

    def tokens_at(self, pairs: Tensor, positions: Tensor) -> Tensor:
        """One token each, int64 [n]: of the ``pairs`` int64 [n] at the ``positions`` int64 [n]."""
        shard_of, rows = pairs // self.manifest.shard_size, pairs % self.manifest.shard_size
        out = torch.empty_like(pairs)
        for shard in shard_of.unique().tolist():
            here = shard_of == shard
            words = self._shards[shard]["tokens"].view(torch.int16)  # gathering knows no uint16
            out[here] = words[rows[here], positions[here]].long() & 0xFFFF
        return out

    def noise(self, pairs: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Noise float32 [B, L, C] of the ``pairs`` int64 [B], on ``device``; made there unless it was stored."""
        m = self.manifest
        if m.store_noise:
            return self._gather("noise", pairs).to(device, non_blocking=True)
        return ops.normal_noise(m.seed, pairs.to(device, non_blocking=True), 0, m.num_tokens, m.channels)

    def _gather(self, name: str, pairs: Tensor) -> Tensor:
        places = [divmod(i, self.manifest.shard_size) for i in pairs.tolist()]
        rows = [self._shards[shard][name][row] for shard, row in places]
        return torch.stack(rows) if rows else self._shards[0][name][:0]
