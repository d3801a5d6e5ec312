"""From a manifest to a folder of shards: the device decodes, a thread writes, and neither waits for the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, reason
from ..files import check_folder, check_room, remove_abandoned
from ..flow.tokens import BAD_NOISE, check_codebook
from ..models import Teacher
from .decoder import PairDecoder
from .manifest import FILE, Manifest, claim, read_manifest, require_same
from .store import Run, read_shard, shards_there, write_shard
from .writer import Writer

BUFFERS = 3  # shards in host memory: one being filled, one being written, one to spare
ALIKE = 4  # pairs of a class, on average, that cannot be alike by chance
BATCHES_AHEAD = 2  # given to a GPU before the first of them is done: it never waits, and Ctrl-C does not take long


class ShardBuffer:
    """A shard on its way from the device to the disk: host memory, pinned beside a GPU.

    Attributes: tokens int64 [N, L], evaluations int32 [N, L] and, if the manifest stores it, noise float32 [N, L, C].
    """

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        self.manifest, self._device = manifest, device
        pinned = device.type == "cuda"
        shape = (len(manifest.shard_range(0)), manifest.num_tokens)
        self.tokens = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        self.evaluations = torch.empty(shape, dtype=torch.int32, pin_memory=pinned)
        self.noise = torch.empty(*shape, manifest.channels, pin_memory=pinned) if manifest.store_noise else None
        self._filled: torch.cuda.Event | None = None

    @torch.inference_mode()
    def take(self, decoded: PairDecoder, row: int, count: int) -> torch.cuda.Event | None:
        """Copy ``count`` pairs of a batch to rows from ``row`` on, without waiting: on a GPU, the event tells when."""
        source, rows = decoded.decoder, slice(row, row + count)
        self.tokens[rows].copy_(source.tokens_BL[:count], non_blocking=True)
        self.evaluations[rows].copy_(source.evaluations_BL[:count], non_blocking=True)
        if self.noise is not None:
            self.noise[rows].copy_(source.noise_BLC[:count], non_blocking=True)
        if self._device.type == "cuda":
            self._filled = torch.cuda.Event()
            self._filled.record(torch.cuda.current_stream(self._device))
        return self._filled

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """What the shard is to hold, waiting for the device.

        Raises:
            UserError: naming the first pair and position at which the teacher's logits overflowed.
        """
        if self._filled is not None:
            with torch.cuda.device(self._device):  # a thread that waits would otherwise take a piece of the first GPU
                self._filled.synchronize()
        pairs = self.manifest.shard_range(shard)
        count = len(pairs)
        raise_bad_pairs(self.evaluations[:count], pairs.start, shard)
        labels = self.manifest.pair_labels(torch.arange(pairs.start, pairs.stop))
        raise_alike(self.tokens[:count], labels, shard)
        out = {"labels": labels, "tokens": self.tokens[:count]}
        return out | ({} if self.noise is None else {"noise": self.noise[:count]})


def raise_bad_pairs(evaluations: Tensor, first: int, shard: int) -> None:
    """Raise UserError for the first of a shard's tokens (evaluations [N, L], pairs first..) that could not be found."""
    bad = (evaluations < 0).nonzero()
    if len(bad):
        row, position = bad[0].tolist()
        where = f"pair {first + row}, position {position} (shard {shard})"
        if int(evaluations[row, position]) == BAD_NOISE:
            raise UserError(f"{where}: its noise is not finite: this device computes wrongly")
        raise UserError(
            f"{where}: the guided logits have NaN, +inf or no finite entry; check the teacher's weights for overflow, "
            "or compute in a wider --dtype"
        )


def raise_alike(tokens: Tensor, labels: Tensor, shard: int) -> None:
    """Raise UserError where every class of a shard (tokens [N, L], labels [N]) has one image, whatever the noise."""
    images, classes = len(tokens.unique(dim=0)), len(labels.unique())
    if len(tokens) >= ALIKE * classes and images <= classes:
        raise UserError(
            f"all {len(tokens)} pairs of shard {shard} have the tokens of their class, whatever their noise: the "
            "teacher draws one image a class. Look at --top-k, --top-p, --temperature and the weights"
        )


class Progress:
    """Tells ``done`` of batches once a GPU has made them, and keeps the host from running further ahead of it."""

    def __init__(self, done: Callable[[int], None]) -> None:
        self._done = done
        self._ahead: deque[tuple[torch.cuda.Event | None, int]] = deque()

    def add(self, event: torch.cuda.Event | None, count: int) -> None:
        """A batch that is done at ``event``, or already if that is None."""
        self._ahead.append((event, count))
        self.wait(0 if event is None else BATCHES_AHEAD - 1)

    def wait(self, ahead: int = 0) -> None:
        """Wait until at most so many batches are not done."""
        while len(self._ahead) > ahead:
            event, count = self._ahead.popleft()
            if event is not None:
                event.synchronize()
            self._done(count)


def fill(
    decoder: PairDecoder, shard: int, buffer: ShardBuffer, progress: Progress, check: Callable[[], None] = lambda: None
) -> None:
    """Decode a shard into a buffer, batch after batch; ``check()`` is called before each."""
    pairs = decoder.manifest.shard_range(shard)
    for first in range(pairs.start, pairs.stop, decoder.batch):
        check()
        count = min(decoder.batch, pairs.stop - first)
        decoder.make(first, count)
        progress.add(buffer.take(decoder, first - pairs.start, count), count)


def make_shard(
    teacher: Teacher, manifest: Manifest, shard: int, batch: int, done: Callable[[int], None] = lambda n: None
) -> dict[str, Tensor]:
    """Compute one shard: labels int64 [N], tokens int64 [N, L] and, if it is stored, noise [N, L, C], all on the CPU.

    ``done(n)`` is called after every n pairs.
    """
    buffer, progress = ShardBuffer(manifest, teacher.device), Progress(done)
    fill(PairDecoder(teacher, manifest, batch), shard, buffer, progress)
    progress.wait()
    return buffer.tensors(shard)


def run_of(teacher: Teacher, batch: int, precision: str = "native") -> Run:
    """What is recorded with each shard about how it is computed."""
    device = "cpu" if teacher.device.type == "cpu" else torch.cuda.get_device_name(teacher.device)
    return Run(batch, str(teacher.dtype).removeprefix("torch."), device, precision)


class Plan:
    """Which shards of a folder are there, found sound, and which are to be made.

    Args:
        folder: the folder of pairs; it need not exist.
        manifest: what it is to hold.
        shards: the shards this process is responsible for.

    Raises:
        UserError: the folder holds other pairs, a damaged shard, or the disk has no room for the missing ones.
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[int]) -> None:
        self.folder, self.manifest = folder, manifest
        check_folder(folder, "pairs", lambda folder: (folder / FILE).exists() or bool(shards_there(folder)))
        there = shards_there(folder)
        if (folder / FILE).exists():
            require_same(folder, read_manifest(folder), manifest)
        elif there:
            raise UserError(f"{folder} holds shards but no {FILE}; restore it, or choose another --out")
        self.present = sorted(s for s in there if s in shards)
        self._check_room(len(shards) - len(self.present))
        self.missing = [s for s in shards if s not in there]
        self.runs = {read_shard(folder, manifest, s).run for s in self.present}

    def _check_room(self, missing: int) -> None:
        """By arithmetic: a number with some zeros too many is seen before any list is made of it."""
        each = self.manifest.shard_bytes(0) + 4096
        least = max(0, missing - 1) * each + (missing > 0) * self.manifest.shard_bytes(self.manifest.num_shards - 1)
        check_room(self.folder, least, "the missing shards", "choose another --out or a smaller --num")

    @property
    def pairs_missing(self) -> int:
        return sum(len(self.manifest.shard_range(s)) for s in self.missing)


def execute(
    plan: Plan, teacher: Teacher, batch: int, done: Callable[[int], None] = lambda n: None, *, precision: str = "native"
) -> None:
    """Make the missing shards of a plan. Interrupted anywhere, only whole shards remain, and a new plan finishes.

    A thread writes what is made, so that no device waits for a disk; memory does not grow with the number of shards.

    Args:
        batch: pairs decoded together.
        done: called with the number of pairs after every batch.
        precision: what the teacher was prepared for, to be recorded.

    Raises:
        UserError: the teacher's codebook is not finite, or the batch does not fit; nothing has been written then. Or
            the teacher's logits overflow: the error names the pair, and the shards before it are kept.
    """
    manifest, folder = plan.manifest, plan.folder
    check_codebook(teacher.codebook)
    try:
        decoder = PairDecoder(teacher, manifest, min(batch, len(manifest.shard_range(0)))) if plan.missing else None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a batch of {batch} does not fit on {teacher.device}: use a smaller --batch ({reason(error)})"
        ) from error
    claim(folder, manifest)
    remove_abandoned(folder, FILE, "shard-*.safetensors")
    if decoder is None:
        return
    run, types = run_of(teacher, batch, precision), {"labels": np.int32, "tokens": np.uint16, "noise": np.float32}

    def write(shard: int, buffer: ShardBuffer) -> None:
        arrays = {name: t.numpy().astype(types[name], copy=False) for name, t in buffer.tensors(shard).items()}
        write_shard(folder, manifest, shard, run, arrays)

    buffers = (ShardBuffer(manifest, teacher.device) for _ in range(min(BUFFERS, len(plan.missing))))
    progress = Progress(done)
    with Writer(write, buffers) as writer:
        for shard in plan.missing:
            buffer = writer.take()
            fill(decoder, shard, buffer, progress, writer.check)
            writer.put(shard, buffer)
        progress.wait()
