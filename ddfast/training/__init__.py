"""Training a student on noise-token pairs."""

from __future__ import annotations

from .config import RECIPES, TrainConfig, recipe
from .trainer import Run, Trainer

__all__ = ["RECIPES", "Run", "TrainConfig", "Trainer", "recipe"]
