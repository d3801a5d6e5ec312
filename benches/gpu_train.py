"""What ``make gpu`` times of training: whole steps of students whose teachers have random weights (see bench_train).

In bfloat16 by autocast, as ``ddfast train`` does on a GPU. A first step, which does not count, compiles the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from _common import free
from bench_train import timed_steps
from full_size import random_teacher
from gpu_cases import Ceilings

from ddfast.models import Teacher, load_teacher
from ddfast.training import Run

Figures = dict[str, Any]
MFU = 0.45  # asked of VAR-d16 at batch 64
ROUNDS, STEPS = 3, 4  # timed: the median of 3 times 4 steps


@dataclass(frozen=True)
class TrainCase:
    """One line of the report. compile, checkpointing (of activations): as in ``Run``."""

    teacher: str
    batch: int
    compile: bool = True
    checkpointing: bool = False

    @property
    def name(self) -> str:
        how = [word for word, on in (("eager", not self.compile), ("checkpointed", self.checkpointing)) if on]
        return " ".join(["train", self.teacher, "batch", str(self.batch), *how])


def train_cases() -> list[TrainCase]:
    """A small one, which nothing but attention is compiled for, and then the most telling first."""
    small = TrainCase("digits-var", 128, compile=False)
    return [
        small,
        TrainCase("var-d16", 64),
        TrainCase("llamagen-b-256", 64),
        TrainCase("var-d16", 64, checkpointing=True),
    ]


def make_teacher(name: str, device: torch.device) -> Teacher:
    """In float32, from which a student starts."""
    if name.startswith("digits"):
        return load_teacher(name, device=device)
    return random_teacher(name, torch.float32, device)


def measure_case(case: TrainCase, ceilings: Ceilings, device: torch.device) -> Figures:
    """A case's figures; in micro-batches, which a ``note`` tells, where the whole batch does not fit into memory."""
    teacher = make_teacher(case.teacher, device)
    run = Run(
        precision="bfloat16",
        micro_batch=case.batch,
        compile=case.compile,
        activation_checkpointing=case.checkpointing,
    )
    while (figures := steps_that_fit(teacher, case.batch, run)) is None:
        assert run.micro_batch is not None
        if run.micro_batch == 1:
            raise torch.OutOfMemoryError("a step does not fit into memory, not even of one pair at a time")
        run = replace(run, micro_batch=run.micro_batch // 2)
    done = {"name": case.name} | figures
    done["share_of_matmul_peak"] = done["pairs_per_s"] * 1e9 * done["model_gflop_per_pair"] / ceilings.bf16_flop_per_s
    done["ceilings"] = {"bf16_tflop_per_s": ceilings.bf16_flop_per_s / 1e12}
    if run.micro_batch != case.batch:
        done["note"] = f"out of memory at batch {case.batch}: in micro-batches of {run.micro_batch}"
    return done


def steps_that_fit(teacher: Teacher, batch: int, run: Run) -> Figures | None:
    """The figures of ``timed_steps``, or None where memory does not suffice. Memory is counted from here on."""
    free(teacher.device)
    try:
        return timed_steps(teacher, batch, run, ROUNDS, STEPS)
    except torch.OutOfMemoryError:
        return None


def line(row: Figures) -> str:
    """A case as a line of the table."""
    told = row.get("problem", row.get("note", "")).partition("\n")[0][:80]
    if "share_of_matmul_peak" not in row:
        return f"{row['name']:42} {told}"
    return (
        f"{row['name']:42} {row['s_per_step']:8.4f} s a step {row['pairs_per_s']:8.4g} pairs/s   MFU {row['mfu']:.1%} "
        f"({row['peak_source']}), {row['share_of_matmul_peak']:.1%} of the matmul peak   "
        f"{row['time_over_products']:.2f} x bare products {row['memory_gib']:6.1f} GiB  {told}"
    ).rstrip()


def bars(rows: Sequence[Figures]) -> list[Figures]:
    """What is asked of VAR-d16 at batch 64, and whether it holds. A miss is no failure."""
    asked = [r for r in rows if r.get("teacher") == "var-d16" and "mfu" in r and not r["activation_checkpointing"]]
    return [{"name": f"{r['name']}: mfu", "value": r["mfu"], "at least": MFU, "held": r["mfu"] >= MFU} for r in asked]
