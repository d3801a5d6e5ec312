"""What several commands do with their options: devices, types, sampling, and the line that says what begins."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from rich.console import Console

from ..errors import UserError
from ..hardware import kernels, missing_kernels
from ..launcher import torchrun
from ..models import Sampling, Teacher
from .options.common import DTYPES


def choose_device(name: str) -> torch.device:
    """``auto`` is the local rank's GPU, or the CPU where there is none."""
    if name in ("auto", "cuda"):
        if torch.cuda.is_available():
            return torch.device("cuda", torchrun().local_rank % torch.cuda.device_count())
        if name == "auto":
            return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu or auto")
    return device


def engine_device(name: str) -> str:
    """The same for an exported folder, to which ``auto`` is left."""
    return name if name == "auto" else str(choose_device(name))


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype; ``auto`` is bfloat16 on a GPU, else float32."""
    chosen = ("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name
    assert chosen in DTYPES
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def chosen_sampling(args: argparse.Namespace, teacher: Teacher) -> Sampling:
    """The preset, with the values given on the command line in place of its own."""
    names = ("guidance", "guidance_interval", "top_k", "top_p", "temperature")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(teacher.preset(args.preset), **given)


def parse_timesteps(text: str) -> tuple[int, ...]:
    """``0,5``"""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--timesteps {text!r} is no list of groups like 0,5")
    return tuple(int(part) for part in parts)


def announce(shown: Console, what: str, device: torch.device, dtype: torch.dtype | str, batch: int | None) -> None:
    """Say before work begins what will be done and how, and what a slow path lacks."""
    how = [str(device), str(dtype).removeprefix("torch."), *([] if batch is None else [f"{batch} at a time"])]
    shown.print(f"{what}: {', '.join(how)}; kernels: {kernels(device)}", soft_wrap=True)
    if lack := missing_kernels(device):
        shown.print(f"note: {lack}", soft_wrap=True)
