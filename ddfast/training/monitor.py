"""What a run says while it goes: metrics.jsonl, TensorBoard, pictures, and how near the hardware's peak it is."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, reason
from ..files import require_file, write_atomic
from ..models.student import Student
from ..records import parse_json

log = logging.getLogger("ddfast")
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
        if os.path.lexists(self.path):
            require_file(self.path)
        lines, damaged = read_lines(self.path)
        if damaged:
            log.warning(f"{self.path}: {damaged} lines that are no figures are dropped")
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
        write_atomic(self.path, "".join(kept).encode())
        self._board: Any = board(folder / "tensorboard", step + 1)

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


def board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, from ``step`` on; None where it is not installed or cannot write there, which is told."""
    if not tensorboard_installed():
        return None
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(folder, purge_step=step)
    except (OSError, ValueError) as error:  # a path that is no text for it, or a folder it may not write to
        log.warning(f"TensorBoard cannot write to {folder}, so its curves are left out ({reason(error)})")
        return None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics.jsonl, and how many of the others there are: damaged, but for a last one cut short."""
    lines, damaged = [], 0
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    for i, text in enumerate(texts):
        text = text.strip(b"\0 \t\r")  # zeros are what a file server that went down leaves
        try:
            if text:
                line = parse_json(text.decode(), path)
                if type(line["step"]) is not int:
                    raise TypeError("step")
                lines.append(line)
        except (UserError, UnicodeDecodeError, TypeError, KeyError, IndexError):
            damaged += i < len(texts) - 1  # one without an end was cut short, and is of a step to come
    return lines, damaged


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl that are whole."""
    return read_lines(folder / METRICS)[0]
