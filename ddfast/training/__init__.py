"""Training a student on noise-token pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import front

if TYPE_CHECKING:
    from .config import RECIPES as RECIPES
    from .config import Run as Run
    from .config import TrainConfig as TrainConfig
    from .config import recipe as recipe
    from .trainer import Trainer as Trainer

__getattr__, __all__ = front(
    __name__,
    {
        "RECIPES": "config",
        "TrainConfig": "config",
        "recipe": "config",
        "Run": "config",
        "Trainer": "trainer",
    },
)
