"""Temperature, top-k and top-p, exactly as each teacher family's public sampling code defines them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast.errors import UserError

RULES = ("var", "llamagen")
_MIN_LLAMAGEN_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class LogitFilter:
    """Which tokens of a distribution may be drawn.

    temperature: logits are divided by it (> 0; "llamagen" raises it to at least 1e-5).
    top_k: keep the k largest logits and everything tied with the k-th; 0 is off. k > V is an error for "var", all of V
        for "llamagen".
    top_p: keep the most probable tokens; ``None`` is off. The rules differ:

        - "var": sort ascending, remove while the cumulative probability is <= 1 - top_p, never the last one; 0 is off.
        - "llamagen": sort descending, remove what comes after the cumulative probability first exceeds top_p; 1 is off
          and 0 keeps one token.

    Raises UserError for a value out of range.

    >>> LogitFilter(top_k=900, top_p=0.95, rule="var")
    LogitFilter(temperature=1.0, top_k=900, top_p=0.95, rule='var')
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float | None = None
    rule: str = "var"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"filter rule {self.rule!r} does not exist: use one of {', '.join(RULES)}")
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise UserError(f"temperature must be a number above 0, not {self.temperature!r} (1.0 leaves logits alone)")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise UserError(f"top_k must be a whole number >= 0, not {self.top_k!r} (0 is off)")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 <= self.top_p <= 1):
            raise UserError(f"top_p must lie in [0, 1], not {self.top_p!r} (None is off)")

    @property
    def divisor(self) -> float:
        """What logits are divided by."""
        return self.temperature if self.rule == "var" else max(self.temperature, _MIN_LLAMAGEN_TEMPERATURE)

    @property
    def cuts_mass(self) -> bool:
        """Whether top_p is on."""
        return self.top_p is not None and self.top_p != (0 if self.rule == "var" else 1)

    @property
    def keeps_one(self) -> bool:
        """Whether one token of every distribution is left, up to ties, so that nothing depends on chance."""
        return self.top_k == 1 or self.rule == "llamagen" and self.top_p == 0

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The fields as JSON-able values; ``LogitFilter(**d)`` restores the filter."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "rule": self.rule}


def filter_logits(logits: Tensor, f: LogitFilter) -> Tensor:
    """Divide logits [..., V] by the temperature and set those outside the kept set to -inf.

    The quotient has the input's dtype (float32 or float64); probabilities are summed in float64, so that every backend
    cuts at the same entry whatever its order of summation. Where equal logits straddle the top-p cut the public result
    depends on the sort's order; here the lower index is kept first. The input is not modified.

    Returns a new tensor [..., V]. Raises UserError for another dtype, or for a "var" top_k larger than V.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise UserError(f"filter_logits takes float32 or float64 logits, not {logits.dtype}: convert with .float()")
    vocab = logits.shape[-1]
    check_filter(f, vocab)
    out = logits / f.divisor
    if f.top_k:
        _top_k_(out, min(f.top_k, vocab))
    if f.top_p is not None and f.cuts_mass:
        (_top_p_var_ if f.rule == "var" else _top_p_llamagen_)(out, f.top_p)
    return out


def check_filter(f: LogitFilter, vocab: int) -> None:
    """Refuse a filter that asks for more tokens than there are, under the rule that does."""
    if f.rule == "var" and f.top_k > vocab:
        raise UserError(f"top_k={f.top_k} is larger than the vocabulary of {vocab}: use top_k <= {vocab}, or 0 for off")


def _top_k_(logits: Tensor, k: int) -> None:
    """Mask everything below the k-th largest of logits [..., V], in place."""
    kth = logits.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    logits.masked_fill_(logits < kth, -torch.inf)


def _top_p_var_(logits: Tensor, top_p: float) -> None:
    """Mask the least probable tokens of logits [..., V] while their total is <= 1 - top_p, in place."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)  # ties: lower index first
    values, order = values.flip(-1), order.flip(-1)
    remove = values.softmax(dim=-1, dtype=torch.float64).cumsum_(dim=-1) <= 1 - top_p
    remove[..., -1] = False
    logits.masked_fill_(torch.empty_like(remove).scatter_(-1, order, remove), -torch.inf)


def _top_p_llamagen_(logits: Tensor, top_p: float) -> None:
    """Mask what follows the token at which the descending cumulative sum of logits [..., V] exceeds top_p, in place."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    over = values.softmax(dim=-1, dtype=torch.float64).cumsum_(dim=-1) > top_p
    remove = torch.zeros_like(over)
    remove[..., 1:] = over[..., :-1]
    logits.masked_fill_(torch.empty_like(remove).scatter_(-1, order, remove), -torch.inf)


def _is_number(value: object) -> bool:
    """Whether value is a finite int or float (bool is neither)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
