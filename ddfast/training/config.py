"""What decides a student: one frozen record, and the recipes it starts from.

How a run is computed (ranks, micro-batches, precision of the arithmetic, logging) is in :class:`Run`: it decides
rounding and speed alone. Nothing here needs torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import UserError

LR_BATCH = 256
"""Learning rates are given for this batch."""
SCHEDULES = ("cosine", "constant")
DISTANCES = ("lpips", "l2", "features")
PRECISIONS = ("float32", "bfloat16")
WAYS = ("ddp", "fsdp")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a student's weights, apart from rounding.

    Attributes:
        steps, batch: optimiser steps, and pairs in each, over all ranks.
        timesteps: those trained on, each a group; a pair's is drawn uniformly (Eq. 5). The first is 0.
        lr: AdamW's peak learning rate for a batch of 256; it grows in proportion to ``batch``.
        schedule: "cosine" or "constant", after ``warmup`` linear steps.
        final_lr_ratio: share of the peak rate at which a cosine ends.
        weight_decay: of matrices; vectors and embeddings have none.
        betas: AdamW's.
        clip_grad_norm: largest norm of the gradient.
        ema: decay of the weights' moving average a step; the average at step n uses at most (1 + n) / (10 + n).
        distance: "lpips" or "features" between decoded images, or "l2" between embeddings.
        distance_weight, ce_weight: of the distance and of the cross entropy.
        layerwise: whether every block has its own map of the noise/data embedding, where the family has one.
        split: groups before it are drawn from logits, later ones by the embedding head; None stands for all.
        holdout: pairs, the last ones, kept from training and measured.
        seed: of the new weights, the order of the pairs, and their timesteps.
    """

    steps: int
    batch: int
    timesteps: tuple[int, ...]
    lr: float
    schedule: str = "constant"
    warmup: int = 0
    final_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad_norm: float = 1.0
    ema: float = 0.9999
    distance: str = "lpips"
    distance_weight: float = 1.0
    ce_weight: float = 0.1
    layerwise: bool = True
    split: int | None = None
    holdout: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "holdout"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("lr", "clip_grad_norm"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, value, "must be a finite number above 0")
        for name in ("weight_decay", "distance_weight", "ce_weight", "final_lr_ratio"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "must be a finite number >= 0")
        if not self.distance_weight + self.ce_weight:
            raise UserError("distance-weight and ce-weight are both 0; raise one of them")
        _require(0 <= self.ema < 1, "ema", self.ema, "must lie in [0, 1)")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "must lie in [0, 2^31)")
        _require(0 <= self.warmup <= self.steps, "warmup", self.warmup, f"must lie between 0 and --steps {self.steps}")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"must be one of {', '.join(SCHEDULES)}")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must lie in [0, 1)")

    def check_timesteps(self, groups: tuple[int, ...]) -> None:
        """Raise UserError unless the timesteps and the split suit a student of these groups."""
        last = len(groups) - 1
        for t in self.timesteps:
            _require(0 <= t <= last, "timesteps", t, f"is no group of this teacher; use 0 to {last}")
        rising = all(b > a for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        listed = ",".join(map(str, self.timesteps))
        _require(self.timesteps[:1] == (0,) and rising, "timesteps", listed, "must begin at 0 and rise")
        split = self.split_of(groups)
        _require(0 <= split <= last + 1, "split", split, f"must lie between 0 and {last + 1} groups")
        for head, weight, unread in (("ce", self.ce_weight, 0), ("distance", self.distance_weight, last + 1)):
            if not weight and split != unread:
                raise UserError(f"split {split} samples from a head that {head}-weight 0 does not train; use {unread}")

    def split_of(self, groups: tuple[int, ...]) -> int:
        """The split of a student of these groups."""
        return len(groups) if self.split is None else self.split

    @property
    def peak_lr(self) -> float:
        """Of this batch."""
        return self.lr * self.batch / LR_BATCH

    def rate(self, step: int) -> float:
        """The learning rate of step 0..steps-1."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.peak_lr * warm
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        share = 0.5 * (1 + math.cos(math.pi * done))
        return self.peak_lr * warm * (self.final_lr_ratio + (1 - self.final_lr_ratio) * share)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def _require(fine: bool, name: str, value: object, rule: str) -> None:
    if not fine:
        raise UserError(f"{name.replace('_', '-')} {value} {rule}")


@dataclass(frozen=True)
class Run:
    """How a student is trained: decides rounding, speed and what is written, not what is learnt.

    Attributes:
        precision: of the matrix products, by autocast; weights, sums and optimiser are float32.
        micro_batch: pairs in one forward pass of a rank; None for the rank's whole share of a batch.
        parallel: "ddp" or "fsdp", with several ranks.
        compile: torch.compile every block.
        activation_checkpointing: forget the blocks' activations and compute them again for the gradient.
        log_every, eval_every, save_every: steps between lines, measurements on the holdout, and checkpoints.
        keep: newest checkpoints that stay.
        samples: pictures in a grid, made at each measurement.
    """

    precision: str = "float32"
    micro_batch: int | None = None
    parallel: str = "ddp"
    compile: bool = False
    activation_checkpointing: bool = False
    log_every: int = 50
    eval_every: int = 5000
    save_every: int = 5000
    keep: int = 2
    samples: int = 16

    def __post_init__(self) -> None:
        for name in ("micro_batch", "log_every", "eval_every", "save_every", "keep", "samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if self.parallel not in WAYS:
            raise UserError(f"parallel is {self.parallel!r}; use one of {', '.join(WAYS)}")

    def pieces(self, batch: int, world: int) -> tuple[int, int]:
        """(micro-batch, micro-batches a step) of every rank; UserError where they do not fill the batch evenly."""
        if batch % world:
            raise UserError(f"batch {batch} cannot be shared by {world} ranks; use a multiple of {world}")
        share = batch // world
        micro = self.micro_batch or share
        if share % micro:
            raise UserError(
                f"micro-batch {micro} does not divide the {share} pairs of a rank; use a divisor of {share}"
            )
        return micro, share // micro


PAPER = TrainConfig(
    steps=300_000,
    batch=512,
    timesteps=(0,),
    lr=1e-4,
    warmup=2000,
    weight_decay=0.05,
    clip_grad_norm=2.0,
)
"""Loss, its weights and betas as in the paper. Steps, batch, rate, decay and clipping are common settings for training
such teachers, not the authors', whose training was not released."""

RECIPES = {
    "paper-var": PAPER,
    "paper-llamagen": replace(PAPER, batch=256, clip_grad_norm=1.0),
    "digits": TrainConfig(
        steps=1500,
        batch=128,
        timesteps=(0,),
        lr=16e-3,
        schedule="cosine",
        warmup=50,
        weight_decay=0.01,
        ema=0.998,
        distance="l2",
        ce_weight=0.2,
        holdout=1000,
    ),
}
DIGITS: dict[str, dict[str, Any]] = {
    "digits-var": {"timesteps": (0, 2), "steps": 1300},
    "digits-llamagen": {"timesteps": (0, 5), "steps": 2000},
}
"""What the recipe leaves to the bundled teacher. The released students are in the zoo."""


def recipe(name: str, timesteps: tuple[int, ...], **changes: Any) -> TrainConfig:
    """A recipe's settings, with ``changes`` in place of its own; a short run has a tenth of its steps as warm-up.

    Raises UserError for an unknown name, listing those there are.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    unknown = set(changes) - {f.name for f in fields(TrainConfig)}
    assert not unknown, unknown
    base = RECIPES[name]
    changes = {"warmup": min(base.warmup, changes.get("steps", base.steps) // 10)} | changes
    return replace(base, timesteps=timesteps, **changes)
