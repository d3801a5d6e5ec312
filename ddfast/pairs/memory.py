"""How many pairs to decode together: by the memory at hand, and by where more no longer help."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import UserError
from ..launcher import torchrun
from ..models import Teacher
from .manifest import Manifest

# Of the free memory, what a batch chosen here may take: other programs share a CPU's, and its file cache.
SHARE_CPU, SHARE_GPU = 0.5, 0.8
# Rows of the largest group, both halves of guidance counted, from which on matrix products are as fast as they get.
ENOUGH_ROWS_CPU, ENOUGH_ROWS_GPU = 4096, 65_536
ENOUGH_PAIRS_GPU = 1024


def pair_bytes(teacher: Teacher, manifest: Manifest) -> int:
    """About what one pair of a batch takes: KV cache, activations and logits of the largest group, noise and tokens.

    Activations of a position are taken to be as large as its keys and values: more than they are from six layers on.
    """
    halves = 2 if guided(teacher, manifest) else 1
    largest, length = max(manifest.groups), manifest.num_tokens
    cache = teacher.cache_bytes(halves == 2)
    logits = halves * largest * manifest.vocab_size * teacher.dtype.itemsize
    return cache + cache * largest // length + logits + length * (8 * manifest.channels + 24)


def guided(teacher: Teacher, manifest: Manifest) -> bool:
    """Whether any group is decoded with and without its class."""
    s = manifest.sampling
    return any(w != 1 for w in teacher.guidance_weights(s["guidance"], s["guidance_interval"]))


def default_batch(teacher: Teacher, manifest: Manifest) -> int:
    """The batch that a share of the free memory holds, no larger than helps, that cuts shards into the fewest batches.

    On a CPU half of the free memory and 4,096 rows of the largest group; on a GPU 80%, 65,536 rows and 1,024 pairs.
    """
    cpu = teacher.device.type == "cpu"
    rows = max(manifest.groups) * (2 if guided(teacher, manifest) else 1)
    most = int((SHARE_CPU if cpu else SHARE_GPU) * free_bytes(teacher.device)) // pair_bytes(teacher, manifest)
    most = min(most, ENOUGH_ROWS_CPU // rows if cpu else min(ENOUGH_ROWS_GPU // rows, ENOUGH_PAIRS_GPU))
    return tidy(max(1, most), len(manifest.shard_range(0)))


def tidy(most: int, shard: int) -> int:
    """A power of two or a divisor of ``shard``, at most ``most``: what makes the fewest batches, and then the smaller.

    >>> tidy(130, 1000), tidy(130, 1024), tidy(7, 3)
    (125, 128, 3)
    """
    most = min(most, shard)
    power = 1 << most.bit_length() - 1
    divisor = next(d for d in range(most, 0, -1) if shard % d == 0)
    return min(power, divisor, key=lambda batch: (-(-shard // batch), batch))


def fits(batch: int, teacher: Teacher, manifest: Manifest) -> bool:
    """Whether the free memory holds a batch."""
    return batch * pair_bytes(teacher, manifest) <= free_bytes(teacher.device)


def check_batch(batch: int, teacher: Teacher, manifest: Manifest) -> None:
    """Raise UserError for a batch that is larger than fits in the free memory."""
    if not fits(batch, teacher, manifest):
        free, each = free_bytes(teacher.device), pair_bytes(teacher, manifest)
        raise UserError(
            f"--batch {batch} needs about {batch * each / 2**30:.1f} GiB ({each / 2**20:.1f} MiB a pair), but "
            f"{free / 2**30:.1f} GiB are free on {teacher.device}"
            + (f" for each of {ranks} ranks" if (ranks := ranks_sharing(teacher.device)) > 1 else "")
            + (f"; use at most {free // each}" if free >= each else "; free some, or use another device")
        )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device for this process: its part, where ranks of one machine share the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps for later is free, too
        return torch.cuda.mem_get_info(device)[0] // ranks_sharing(device)
    return free_host_bytes() // ranks_sharing(device)


def ranks_sharing(device: torch.device) -> int:
    """How many ranks of torchrun on this machine use a device: all of them its CPU, as a rule one a GPU."""
    ranks = torchrun().local_world
    return ranks if device.type == "cpu" else -(-ranks // max(1, torch.cuda.device_count()))


def free_host_bytes(root: Path = Path("/")) -> int:
    """Main memory that this process can still take: what is available, or what its control group leaves, if less.

    Where the system does not tell what is available (it is no Linux), all that is built in.
    """
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        fields = (line.split() for line in meminfo.read_text().splitlines())
        available = next((1024 * int(words[1]) for words in fields if words[0] == "MemAvailable:"), None)
        if available is not None:
            return min([available, *_control_groups(root)])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_groups(root: Path) -> list[int]:
    """What each control group that this process is in leaves of its limit; file cache counts as free."""
    found, mine = [], root / "proc/self/cgroup"
    lines = mine.read_text().splitlines() if mine.exists() else []
    for number, controllers, path in (line.split(":", 2) for line in lines):
        second = number == "0" and not controllers
        if not second and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup" if second else "sys/fs/cgroup/memory")
        limit, used, cache = (
            ("memory.max", "memory.current", "inactive_file")
            if second
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        inside = Path(path.lstrip("/"))
        for folder in (mount / inside, *(mount / parent for parent in inside.parents)):
            if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append(max(0, int(most) - int((folder / used).read_text()) + int(stat.get(cache, 0))))
    return found
