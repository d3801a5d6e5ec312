"""What a training step takes, seen before it is taken: memory, and room on the disk for checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import check_room
from ..pairs.memory import free_bytes
from .checkpoint import steps_saved

MARGIN = 1.3  # of what is saved for the gradient: what a backward pass holds besides
STATE = 4 * 4  # bytes a weight in a checkpoint: it, its average and both moments, in float32
TO_COME = 3 * 4  # bytes a weight that the first step adds: gradient and both moments


def saved_bytes(run: Callable[[], Any], owned: set[int]) -> int:
    """Bytes that ``run`` saves for the gradient, each storage once.

    ``owned``: addresses of storages that do not count, since they are there anyway.
    """
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.compiler.set_stance("force_eager"):
        result = run()
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in owned)
    del result
    return total


def check_memory(pair: int, fixed: int, micro: int, share: int, device: torch.device) -> None:
    """Raise UserError where a step does not fit in the free memory of ``device``.

    Args:
        pair: bytes that one pair saves for the gradient.
        fixed: bytes that a step takes whatever its pairs.
        micro, share: pairs in one pass, and of a rank in a step.
    """
    free, each = free_bytes(device), int(MARGIN * pair)
    if fixed + micro * each <= free:
        return
    need = (
        f"a step needs about {(fixed + micro * each) / 2**30:.1f} GiB: {each / 2**20:.1f} MiB for each of the {micro} "
    )
    need += f"pairs of a pass, and {fixed / 2**30:.1f} GiB for gradients and optimiser; {free / 2**30:.1f} GiB are free"
    fitting = [size for size in range(1, micro) if share % size == 0 and fixed + size * each <= free]
    if fitting:
        raise UserError(f"{need} on {device}. Use --micro-batch {fitting[-1]}, which learns the same")
    raise UserError(
        f"{need} on {device}. Use --parallel fsdp on several GPUs, --activation-checkpointing, or another device"
    )


def check_disk(folder: Path, weights: int, keep: int) -> None:
    """Raise UserError where the disk has no room for a run's checkpoints and its student.

    A new checkpoint is written before an old one goes, and a new student before the old one.
    """
    checkpoints = max(0, keep + 1 - len(steps_saved(folder)))
    need = weights * (checkpoints * STATE + 2 * 4)
    check_room(folder, need, f"{checkpoints} checkpoints and the student", "choose another --out or a smaller --keep")
