"""What a run says while it goes: metrics.jsonl, TensorBoard, pictures, and how near the hardware's peak it is."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomic
from ..models.student import Student

METRICS = "metrics.jsonl"
DATASHEET = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "B200": 2250e12,
}
"""Dense bfloat16 FLOP/s of GPUs (SXM where there are several), by a part of torch's name for them."""


def flops_a_pair(student: Student) -> float:
    """Floating-point operations of one pair's forward and backward pass, those of all matrix products of the student.

    Attention counts as the forward pass computes it: by groups where that is its form, else with every key, causal too.
    What is computed again (attention's scores, checkpointed activations) and the loss's decoder do not count.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    with torch.device("meta"):
        twin = type(student)(student.settings).to("meta")  # tables that no file holds are made on the CPU
        labels, x = torch.zeros(1, dtype=torch.long), torch.zeros(1, student.num_tokens, student.channels)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        cond = twin.cond(labels)
        h = twin.hidden(x, torch.zeros(1, 1 + student.num_tokens, dtype=torch.long, device="meta"), cond)
        twin.embeddings(h, cond)
        twin.logits(h, cond)
    return 3.0 * counter.get_total_flops()


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of matrix products in ``dtype``, and whether that is the GPU's datasheet or measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in DATASHEET.items() if part in name.replace("-", " ").split()]
        if known:
            return known[0], "datasheet"
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        out = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    assert out.shape == a.shape
    return 2 * size**3 / best, "measured"


class Monitor:
    """Writes a run's scalars and pictures; lines of a run that goes on at a step replace those after it.

    Args:
        folder: of the run.
        step: first step to come.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / METRICS
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                if line.endswith("}") and json.loads(line)["step"] <= step:  # a line cut short is of a step to come
                    kept.append(line + "\n")
        write_atomic(self.path, "".join(kept).encode())
        self._board: Any = None
        if tensorboard_installed():
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def scalars(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, and a curve each in TensorBoard."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image_3HW: Tensor) -> None:
        """An image in [0, 1] for TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image_3HW, step)

    def sync(self) -> None:
        """Make the lines so far survive a power cut, and the curves a kill."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def tensorboard_installed() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
