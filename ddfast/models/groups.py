"""Groups of tokens: sizes n_0 .. n_{K-1} that sum to L."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..errors import UserError


def starts(groups: Sequence[int]) -> list[int]:
    """Where each group begins, and L last."""
    return [0, *accumulate(groups)]


def first_groups(groups: Sequence[int], count: int) -> tuple[int, ...]:
    """The first groups, of ``count`` tokens together; UserError where these end within a group."""
    ends = starts(groups)
    if count not in ends:
        near = ", ".join(map(str, ends[1:11])) + (", …" if len(ends) > 11 else "")
        raise UserError(f"{count} tokens end within a group; groups end at {near}")
    return tuple(groups[: ends.index(count)])
