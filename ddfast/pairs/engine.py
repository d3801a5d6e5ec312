"""From noise to tokens (Alg. 1 of arXiv 2412.17153) and from a manifest to a folder of shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import UserError
from ..files import remove_abandoned
from ..flow import Solver, solver_from_dict
from ..flow.tokens import check_codebook, raise_bad_rows
from ..models import Sampling, Teacher
from .manifest import FILE, Manifest, claim, read_manifest, require_same
from .store import Run, read_shard, shard_path, write_shard


@torch.inference_mode()
def decode(teacher: Teacher, labels: Tensor, noise: Tensor, sampling: Sampling, solver: Solver) -> Tensor:
    """Alg. 1: map each image's noise to its tokens, group after group, through the flow of Eq. 3-4.

    Args:
        labels: int64 [B], on the teacher's device.
        noise: float32 [B, L, C], standard normal.

    Returns:
        Tokens int64 [B, L].

    Raises:
        UserError: naming the first image and position at which the teacher's logits overflowed.
    """
    state = teacher.decode_state(labels, sampling.guidance, sampling.guidance_interval)
    rule, codebook = teacher.filter(sampling), teacher.codebook
    batch, length, channels = noise.shape
    tokens = torch.empty(batch, length, dtype=torch.int64, device=noise.device)
    evaluations = torch.empty_like(tokens, dtype=torch.int32)
    start = 0
    for n in teacher.groups:
        stop = start + n
        weight = state.weight
        cond, uncond = teacher.logits(state)
        result = ops.flow(
            cond.flatten(0, 1),
            None if uncond is None else uncond.flatten(0, 1),
            noise[:, start:stop].reshape(-1, channels),
            codebook,
            guidance=weight,
            filter=rule,
            solver=solver,
            check=False,
        )
        tokens[:, start:stop] = result.tokens.view(batch, n)
        evaluations[:, start:stop] = result.evaluations.view(batch, n)
        teacher.append(state, tokens[:, start:stop])
        start = stop
    raise_bad_rows(evaluations)  # once, since it waits for the device
    return tokens


def make_shard(
    teacher: Teacher, manifest: Manifest, shard: int, batch: int, done: Callable[[int], None]
) -> dict[str, Tensor]:
    """Compute one shard: labels [N], tokens [N, L] and, if the manifest stores it, noise [N, L, C], on the CPU.

    ``done(n)`` is called after every n pairs.
    """
    sampling, solver = Sampling(**manifest.sampling), solver_from_dict(manifest.solver)
    pairs_N = torch.tensor(manifest.shard_range(shard), device=teacher.device)
    labels_N = manifest.pair_labels(pairs_N)
    tokens, noises = [], []
    for pairs, labels in zip(pairs_N.split(batch), labels_N.split(batch), strict=True):
        noise = ops.normal_noise(manifest.seed, pairs, 0, manifest.num_tokens, manifest.channels)
        tokens.append(decode(teacher, labels, noise, sampling, solver).cpu())
        if manifest.store_noise:
            noises.append(noise.cpu())
        done(len(pairs))
    out = {"labels": labels_N.cpu(), "tokens": torch.cat(tokens)}
    return out | ({"noise": torch.cat(noises)} if noises else {})


def run_of(teacher: Teacher, batch: int) -> Run:
    """What is recorded with each shard about how it is computed."""
    device = "cpu" if teacher.device.type == "cpu" else torch.cuda.get_device_name(teacher.device)
    return Run(batch, str(teacher.dtype).removeprefix("torch."), device)


def default_batch(teacher: Teacher, manifest: Manifest) -> int:
    """As many pairs as keep the KV cache within 1 GiB on a CPU and 16 GiB on a GPU: at least 1, at most 256."""
    budget = 2**30 if teacher.device.type == "cpu" else 16 * 2**30
    guided = any(
        w != 1 for w in teacher.guidance_weights(manifest.sampling["guidance"], manifest.sampling["guidance_interval"])
    )
    return max(1, min(256, budget // teacher.cache_bytes(guided), manifest.shard_size))


class Plan:
    """Which shards of a folder are there, found sound, and which are to be made.

    Args:
        folder: the folder of pairs; it need not exist.
        manifest: what it is to hold.
        shards: the shards this process is responsible for.

    Raises:
        UserError: the folder holds other pairs, a damaged shard, or the disk has no room for the missing ones.
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: Iterable[int]) -> None:
        self.folder, self.manifest = folder, manifest
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder; choose another --out")
        if (folder / FILE).exists():
            require_same(folder, read_manifest(folder), manifest)
        elif any(folder.glob("shard-*.safetensors")):
            raise UserError(f"{folder} holds shards but no {FILE}; restore it, or choose another --out")
        mine = list(shards)
        self.present = [s for s in mine if shard_path(folder, s).exists()]
        self.missing = [s for s in mine if not shard_path(folder, s).exists()]
        self.runs = {read_shard(folder, manifest, s).run for s in self.present}
        self._check_room()

    def _check_room(self) -> None:
        need = sum(self.manifest.shard_bytes(s) + 4096 for s in self.missing)
        existing = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if need > free:
            raise UserError(
                f"the missing shards need {need / 2**20:,.0f} MiB, but {existing} has {free / 2**20:,.0f} MiB free; "
                "make room, choose another --out or a smaller --num"
            )

    @property
    def pairs_missing(self) -> int:
        return sum(len(self.manifest.shard_range(s)) for s in self.missing)


def execute(plan: Plan, teacher: Teacher, batch: int, done: Callable[[int], None] = lambda n: None) -> None:
    """Make the missing shards of a plan. Interrupted anywhere, only whole shards remain, and a new plan finishes.

    Raises:
        UserError: the teacher's codebook is not finite; nothing has been written then.
    """
    check_codebook(teacher.codebook)
    claim(plan.folder, plan.manifest)
    remove_abandoned(plan.folder)
    run = run_of(teacher, batch)
    for shard in plan.missing:
        tensors = make_shard(teacher, plan.manifest, shard, batch, done)
        types = {"labels": np.int32, "tokens": np.uint16, "noise": np.float32}
        write_shard(plan.folder, plan.manifest, shard, run, {k: t.numpy().astype(types[k]) for k, t in tensors.items()})
