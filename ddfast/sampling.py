"""Few-step sampling (Alg. 3 of arXiv 2412.17153).

Axes: B images, L tokens of an image, V codebook size, C codebook channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import UserError
from .models.student import Student


def check_timesteps(student: Student, timesteps: Sequence[int]) -> None:
    """Raise UserError unless ``timesteps`` are groups, rising, and begin at 0."""
    for t in timesteps:
        student.check_timestep(t)
    if not timesteps or timesteps[0] != 0 or any(b <= a for a, b in zip(timesteps, timesteps[1:], strict=False)):
        listed = ",".join(map(str, timesteps))
        raise UserError(f"timesteps {listed or '(none)'} must begin at 0 and rise, e.g. 0,{len(student.groups) // 2}")


@torch.inference_mode()
def few_step(
    student: Student, labels: Tensor, noise: Tensor, codebook: Tensor, timesteps: Sequence[int], split: int
) -> Tensor:
    """One forward pass a timestep; between them, groups from the next timestep on become their own noise again.

    Args:
        labels: int64 [B].
        noise: float32 [B, L, C], standard normal.
        codebook: [V, C].
        timesteps: begin at 0 and rise; (0,) is one step.
        split: see :meth:`Student.predict`.

    Returns:
        float32 [B, L, C], to be decoded.
    """
    check_timesteps(student, timesteps)
    x, starts = noise, student.starts()
    for t in timesteps:
        x = torch.cat([x[:, : starts[t]], noise[:, starts[t] :]], dim=1)
        x = student.predict(labels, x, t, codebook, split)
    return x
