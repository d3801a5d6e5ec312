"""One process or many: torchrun's ranks, and where a tensor's whole value is.

Ranks hold equal parts of every batch. DDP keeps the weights on each; FSDP2 keeps a share of weights, average and
optimiser state on each, for students that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError
from ..launcher import check_meeting, torchrun
from ..models.student import Student


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun; (0, 1) without it."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def part(self, count: int) -> range:
        """This rank's share of ``count`` things, which the number of ranks divides."""
        size = count // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    def total(self, values: Tensor) -> Tensor:
        """``values`` summed over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def most(self, values: Tensor) -> Tensor:
        """The largest of each of ``values`` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The process group of torchrun, for as long as the scope lasts."""
    launch = torchrun()
    if launch.world == 1:
        yield Ranks()
        return
    check_meeting()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(launch.rank, launch.world)
    finally:
        dist.destroy_process_group()


def parallelise(student: Student, way: str, ranks: Ranks, both_heads: bool) -> nn.Module:
    """What to call in place of ``student`` for gradients that are means over all ranks.

    Args:
        way: "ddp" or "fsdp".
        both_heads: whether the loss reads both.
    """
    if way == "fsdp":
        if ranks.world == 1:
            raise UserError("--parallel fsdp needs several ranks: start it with torchrun, or drop it")
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for unit, method in student.units():
            fully_shard(unit)
            if method is not None:
                register_fsdp_forward_method(unit, method)
        fully_shard(student)
        return student
    if ranks.world == 1:
        return student
    device = next(student.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(student, device_ids=ids, find_unused_parameters=not both_heads)


@contextmanager
def last_of_several(model: nn.Module, last: bool) -> Iterator[None]:
    """A backward pass of an accumulated batch: only the last one speaks to other ranks."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with nullcontext() if last else model.no_sync():
            yield
        return
    synchronise: Callable[[bool], Any] | None = getattr(model, "set_requires_gradient_sync", None)
    if synchronise is not None:
        synchronise(last)
    yield


def drop_gathered(model: nn.Module) -> None:
    """Call after writing to weights: a pass without gradients leaves FSDP2's outermost ones gathered, and now stale."""
    reshard: Callable[[], Any] | None = getattr(model, "reshard", None)
    if reshard is not None:
        reshard()


def whole(t: Tensor) -> Tensor:
    """A parameter's or state's full value; every rank must ask."""
    gathered: Callable[[], Tensor] | None = getattr(t, "full_tensor", None)
    return t if gathered is None else gathered()


def local(t: Tensor) -> Tensor:
    """What of a parameter is on this rank."""
    own: Callable[[], Tensor] | None = getattr(t, "to_local", None)
    return t if own is None else own()


@torch.no_grad()
def assign(t: Tensor, value: Tensor) -> None:
    """Write a full value to a parameter or state, in place."""
    value = value.to(device=t.device, dtype=t.dtype)
    if hasattr(t, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # takes a second to import

        shared: Any = t
        value = distribute_tensor(value, shared.device_mesh, shared.placements)
    t.copy_(value)
