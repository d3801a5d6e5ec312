"""What torchrun tells a process about itself, checked: a cluster or another launcher may have left variables behind."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process among those of torchrun; the values of one process without it.

    Attributes:
        rank, world: among all processes.
        local_rank, local_world: among those of this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def torchrun() -> Launch:
    """What the environment says.

    Raises UserError where its variables do not go together.
    """
    rank, world, local_rank, local_world = map(_number, VARIABLES)
    count = 1 if world is None else world
    if world is None and rank:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is not set; {_advice()}")
    if rank is None and count != 1:
        raise UserError(f"WORLD_SIZE is {count}, but RANK is not set; {_advice()}")
    if count < 1 or not 0 <= (rank or 0) < count:
        raise UserError(f"RANK is {rank or 0} and WORLD_SIZE is {count}; a rank lies in [0, WORLD_SIZE); {_advice()}")
    if (local_rank or 0) < 0 or (local_world is not None and local_world < 1):
        raise UserError(f"LOCAL_RANK is {local_rank} and LOCAL_WORLD_SIZE is {local_world}; {_advice()}")
    return Launch(rank or 0, count, local_rank or 0, local_world or 1)


def check_meeting() -> None:
    """Raise UserError where ranks would not know where to meet."""
    missing = [name for name in MEETING if not os.environ.get(name)]
    if missing:
        names, be = " and ".join(missing), "are" if len(missing) > 1 else "is"
        raise UserError(f"WORLD_SIZE is {torchrun().world}, but {names} {be} not set; {_advice()}")


def _number(name: str) -> int | None:
    """A variable's number; None where it is not set, or set to nothing."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 10):
        raise UserError(f"the environment variable {name} is {text!r}, which is no number; {_advice()}")
    return int(text)


def _advice() -> str:
    left = [name for name in (*VARIABLES, *MEETING) if name in os.environ]
    return f"start several processes with torchrun; for one, `unset {' '.join(left)}`, which another launcher left"
