"""The one optimisation loop behind every digits stage: AdamW, warm-up, cosine decay, clipped gradients, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Progress = Callable[[str, int, int, float], None]
"""Called as ``progress(stage, step, steps, loss)`` after each step, with step in 1..steps."""


@dataclass(frozen=True)
class Schedule:
    """Steps, batch and optimiser settings of one stage; the learning rate warms up linearly and decays as a cosine."""

    steps: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 50
    clip: float = 1.0

    def scaled(self, factor: float) -> Schedule:
        """The same schedule with ``factor`` times the steps and warm-up (at least two steps)."""
        steps = max(2, round(self.steps * factor))
        return replace(self, steps=steps, warmup=max(1, round(self.warmup * factor)))

    def rate(self, step: int) -> float:
        """Learning rate of step 0..steps-1."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def fit(
    stage: str,
    module: nn.Module,
    schedule: Schedule,
    loss_at: Callable[[int], Tensor],
    progress: Progress,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Minimise ``loss_at(step)`` over the parameters of ``module``; ``after_step(step)`` runs without gradients."""
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, schedule.lr, betas=(0.9, 0.99), weight_decay=schedule.weight_decay)
    module.train()
    for step in range(schedule.steps):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        if after_step is not None:
            with torch.no_grad():
                after_step(step)
        progress(stage, step + 1, schedule.steps, loss.item())
    module.eval()


class Ema:
    """Exponential moving average of a module's parameters, without the bias towards their initial values."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.weight = module, decay, 0.0
        self.average = {name: torch.zeros_like(p) for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current parameters."""
        self.weight = self.decay * self.weight + (1 - self.decay)
        share = (1 - self.decay) / self.weight
        for name, p in self.module.named_parameters():
            self.average[name].lerp_(p, share)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Replace the module's parameters by their average."""
        for name, p in self.module.named_parameters():
            p.copy_(self.average[name])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A scope in which torch's global CPU generator starts at ``seed``; its state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
