"""What ``make gpu`` times of sampling: images from noise to pixels, of students and teachers with random weights.

Transformers in bfloat16, the tokenizer in float32, as ``ddfast sample`` has them on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from _common import free
from full_size import random_teacher
from gpu_cases import Ceilings

from ddfast.models import STUDENTS, Distilled, load_teacher
from ddfast.report.run import time_plan
from ddfast.sampling import Drawing, Plan, Sampler, few_step_plan, involved_plan, plan_name, teacher_plan
from ddfast.training.monitor import flops_a_pair

Figures = dict[str, Any]
TIMESTEPS = {s.teacher: s.timesteps for s in STUDENTS.values()} | {"digits-var": (0, 2)}


@dataclass(frozen=True)
class SampleCase:
    """One line of the report: a teacher and its student at one batch."""

    teacher: str
    batch: int

    @property
    def name(self) -> str:
        return f"sample {self.teacher} batch {self.batch}"


def sample_cases() -> list[SampleCase]:
    """A small one, and then the most telling first."""
    sizes = [("var-d16", 1), ("var-d16", 64), ("llamagen-b-256", 1), ("llamagen-b-256", 64)]
    return [SampleCase("digits-var", 64), *(SampleCase(*size) for size in sizes)]


def make_sampler(name: str, device: torch.device) -> Sampler:
    """A teacher, and its student as it starts from it."""
    teacher = (
        load_teacher(name, device=device) if name.startswith("digits") else random_teacher(name, torch.float32, device)
    )
    student = teacher.new_student(torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_(False).eval()
    teacher.transformer.to(torch.bfloat16)
    made = Distilled("random", student, teacher.tokenizer, name, TIMESTEPS[name], TIMESTEPS[name][-1], "", "")
    return Sampler(made, Drawing(teacher, teacher.preset()))


def ways(sampler: Sampler) -> list[Plan]:
    """One step, all steps, the teacher just before the last of these, and the teacher alone."""
    assert sampler.student is not None
    timesteps, groups = sampler.student.timesteps, len(sampler.groups)
    switch = timesteps[-1]
    few = few_step_plan((0,), groups), few_step_plan(timesteps, groups)
    return [*few, involved_plan(3 * switch // 4, switch, groups), teacher_plan(groups)]


def measure_case(case: SampleCase, ceilings: Ceilings, device: torch.device) -> Figures:
    """Milliseconds an image by each plan, decoding alone, and the one-step student's share of the matmul peak."""
    sampler = make_sampler(case.teacher, device)
    student = cast(Distilled, sampler.student)
    free(device)
    ms = {
        plan_name(p, len(sampler.groups)): 1e3 * time_plan(sampler, p, case.batch) / case.batch for p in ways(sampler)
    }
    decoding = 1e3 * time_plan(Decoding(sampler), few_step_plan((0,), len(sampler.groups)), case.batch) / case.batch
    gflop = flops_a_pair(student.student) / 3e9
    trunk = max(ms["1 step"] - decoding, 1e-9)
    return {
        "name": case.name,
        "teacher": case.teacher,
        "batch": case.batch,
        "dtype": "bfloat16, tokenizer float32",
        "ms_per_image": ms,
        "decoding_ms_per_image": decoding,
        "times_teacher": {way: ms["teacher"] / own for way, own in ms.items()},
        "student_gflop": gflop,
        "share_of_matmul_peak": gflop * 1e9 / (trunk / 1e3) / ceilings.bf16_flop_per_s,
        "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


class Decoding(Sampler):
    """Decodes the noise itself."""

    def __init__(self, like: Sampler) -> None:
        super().__init__(like.student)

    def embeddings(self, labels: torch.Tensor, noise: torch.Tensor, plan: Plan) -> torch.Tensor:
        return noise


def line(row: Figures) -> str:
    """A case as a line of the table."""
    if "ms_per_image" not in row:
        return f"{row['name']:42} {row.get('problem', '').partition(chr(10))[0][:80]}"
    told = "   ".join(
        f"{way} {ms:.3g} ms ({row['times_teacher'][way]:.1f}x)" for way, ms in row["ms_per_image"].items()
    )
    share = f"{row['share_of_matmul_peak']:.1%} of the matmul peak"
    return f"{row['name']:42} {told}   decoding {row['decoding_ms_per_image']:.3g} ms, {share}"


def bars(rows: Sequence[Figures]) -> list[Figures]:
    """Nothing is asked."""
    return []
