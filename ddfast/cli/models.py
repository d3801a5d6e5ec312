"""What `ddfast sample` and `ddfast eval` ask about a model: who draws, by which plan, which classes, how."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..evaluation.sampled import SampledImages
from ..flow import make_solver
from ..models import TEACHERS, Distilled, load_student, load_teacher
from ..models.classes import parse_classes
from ..models.zoo import find_weights
from ..pairs import PairDataset
from ..pairs.memory import free_bytes
from ..sampling import (
    STUDENT,
    TEACHER,
    Drawing,
    Marginals,
    Plan,
    Sampler,
    few_step_plan,
    involved_plan,
    onestep_plan,
    plan_name,
    teacher_plan,
)
from .shared import choose_device, chosen_dtype, chosen_sampling, parse_timesteps

PLANS = ("steps", "timesteps", "teacher_groups", "skip", "onestep")
TOKENS_CPU, TOKENS_GPU, IMAGES = 1 << 14, 1 << 16, 500  # drawn together
MOST = 10**9  # samples


def wanted(args: argparse.Namespace) -> bool:
    """Whether a model is named; UserError where only what belongs to one is."""
    if args.student is None and args.weights is not None:
        raise UserError("--weights are a student's: name it with --student, or the teacher's with --teacher-weights")
    return args.student is not None or args.teacher is not None


def check_plan_options(args: argparse.Namespace) -> None:
    """Raise UserError for plans that exclude one another, before anything is loaded."""
    given = [name for name in PLANS if getattr(args, name) is not None]
    options = ["--" + name.replace("_", "-") for name in given]
    if len(given) > 1:
        raise UserError(f"{' and '.join(options)} are different plans; choose one")
    if args.student is None and given and given[0] in ("steps", "timesteps", "teacher_groups"):
        raise UserError(f"{options[0]} is a plan of a student; name it with --student")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1")
    check_counts(args)
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; it must lie in [0, 2^63)")


def check_counts(args: argparse.Namespace) -> None:
    """Raise UserError for a --num or --batch that cannot be."""
    for name in ("num", "batch"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"--{name} is {value}; it must be at least 1, and at most {MOST:,}")


def parse_groups(text: str) -> tuple[int, int]:
    """``A:B``"""
    first, colon, stop = text.partition(":")
    if not (colon and all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (first, stop))):
        raise UserError(f"--teacher-groups {text!r} is no range of groups like 3:5")
    return int(first), int(stop)


def open_student(args: argparse.Namespace, device: torch.device) -> Distilled | None:
    if args.student is None:
        return None
    dtype = chosen_dtype(args.dtype, device)
    model = load_student(args.student, args.weights, args.tokenizer, copy=args.copy, dtype=dtype, device=device)
    if args.split is not None:
        if not 0 <= args.split <= len(model.student.groups):
            raise UserError(f"--split {args.split} is no group of {model.name}; use 0 to {len(model.student.groups)}")
        model = replace(model, split=args.split)
    return model


def open_teacher(
    args: argparse.Namespace, name: str, device: torch.device, student: Distilled | None = None
) -> Drawing:
    """The teacher ``name``, as the command line has it sampled; it shares the tokenizer of its student."""
    own_tokenizer = name in TEACHERS and TEACHERS[name].bundled or Path(name).suffix == ".safetensors"
    tokenizer = None if own_tokenizer else args.tokenizer
    try:
        teacher = load_teacher(name, args.teacher_weights, tokenizer, chosen_dtype(args.dtype, device), device)
    except UserError as error:
        raise UserError(str(error).replace("--weights", "--teacher-weights")) from None
    sampling = chosen_sampling(args, teacher)
    teacher.check_sampling(sampling)
    if student is not None and torch.equal(teacher.codebook, student.codebook):
        teacher.tokenizer = student.tokenizer
    teacher.prepare(release=True)
    solver = make_solver(args.solver, args.nfe)
    return Drawing(teacher, sampling, solver, args.ordinary, args.released_prefix)


def teacher_at_hand(args: argparse.Namespace, student: Distilled | None) -> str | None:
    """The teacher to use: the one named, else the student's own if the zoo knows it and its weights are found."""
    if args.teacher is not None:
        return str(args.teacher)
    if student is None or student.teacher not in TEACHERS:
        return None
    found = args.teacher_weights is not None or find_weights(TEACHERS[student.teacher]) is not None
    return student.teacher if found else None


def plan_of(args: argparse.Namespace, student: Distilled | None, groups: int) -> Plan:
    """The plan that the command line names."""
    if args.onestep is not None:
        return onestep_plan(groups)
    if args.skip is not None or student is None:
        return teacher_plan(groups, args.skip or 0)
    if args.teacher_groups is not None:
        return involved_plan(*parse_groups(args.teacher_groups), groups)
    timesteps = student.timesteps if args.timesteps is None else parse_timesteps(args.timesteps)
    if args.timesteps is None:
        steps = args.steps or 1
        if steps > len(timesteps):
            trained = ",".join(map(str, timesteps))
            raise UserError(
                f"{student.name} was trained on the timesteps {trained}: --steps can be 1 to {len(timesteps)}; "
                "--timesteps takes any"
            )
        timesteps = timesteps[:steps]
    student.student.check_timesteps(timesteps)
    return few_step_plan(timesteps, groups)


def open_model(args: argparse.Namespace, default_num: int | None = None) -> SampledImages:
    """The images that the command line describes; nothing is drawn yet.

    ``default_num`` of them without --num; by default one a class named, or 20.

    Raises:
        UserError: options that exclude one another, models that do not fit or are not found.
    """
    check_plan_options(args)
    device = choose_device(args.device)
    student = open_student(args, device)
    drawing = None
    if student is None or args.teacher_groups is not None or args.skip is not None:
        drawing = open_teacher(args, teacher_for(args, student), device, student)
    marginals = None if args.onestep is None else Marginals(PairDataset(args.onestep))
    sampler = Sampler(student, drawing, marginals)
    plan = plan_of(args, student, len(sampler.groups))
    sampler.check(plan)
    check_used(args, plan)
    return sampled(args, sampler, plan, default_num)


def check_used(args: argparse.Namespace, plan: Plan) -> None:
    """Raise UserError for options about somebody who draws nothing in ``plan``."""
    options = ("preset", "guidance", "guidance_interval", "top_k", "top_p", "temperature", "nfe")
    given = [name for name in options if getattr(args, name) is not None]
    given += [name for name in ("ordinary", "released_prefix") if getattr(args, name)]
    given += ["teacher"] if args.teacher is not None and args.student is not None else []
    drawing = {leg.who for leg in plan}
    if given and TEACHER not in drawing:
        option = "--" + given[0].replace("_", "-")
        raise UserError(f"{option} is about a teacher, which draws nothing here; add --teacher-groups, or drop it")
    if args.split is not None and STUDENT not in drawing:
        raise UserError("--split is about a student, which draws nothing here; drop it")


def teacher_for(args: argparse.Namespace, student: Distilled | None) -> str:
    """The teacher that a plan needs; where it is not at hand, the error says what to bring."""
    if args.teacher is not None:
        return str(args.teacher)
    assert student is not None
    if student.teacher not in TEACHERS:
        raise UserError(f"the teacher of {student.name}, {student.teacher}, is not in the zoo; name it with --teacher")
    return student.teacher


def sampled(args: argparse.Namespace, sampler: Sampler, plan: Plan, default_num: int | None = None) -> SampledImages:
    """Images of ``plan`` for the classes, number and seed of the command line."""
    everything = range(sampler.num_classes)
    classes = tuple(everything) if args.classes is None else parse_classes(args.classes, sampler.num_classes)
    num = args.num or default_num or (20 if args.classes is None else len(classes))
    return SampledImages(classes, num, args.seed, facts_of(args, sampler, plan), sampler, plan)


def default_batch(sampler: Sampler, plan: Plan) -> int:
    """As many images as keep the processor busy, and whose KV cache takes no more than a quarter of the free memory."""
    most = min(IMAGES, (TOKENS_GPU if sampler.device.type == "cuda" else TOKENS_CPU) // sampler.starts[-1])
    for leg in plan:
        if leg.who == TEACHER:
            assert sampler.drawing is not None
            whole = sampler.drawing.teacher.cache_bytes(guided=True)
            image = whole * sampler.starts[leg.stop] // sampler.starts[-1]
            most = min(most, free_bytes(sampler.device) // 4 // image)
    return max(1, most)


def facts_of(args: argparse.Namespace, sampler: Sampler, plan: Plan) -> dict[str, Any]:
    """JSON-able: everything that decides the images, as far as their plan reads it."""
    who = {leg.who for leg in plan}
    facts: dict[str, Any] = {"way": plan_name(plan, len(sampler.groups))}
    facts["plan"] = [f"{leg.who} {leg.first}:{leg.stop}" for leg in plan]
    if sampler.student is not None and STUDENT in who:
        s = sampler.student
        facts["student"] = {"name": s.name, "sha256": s.sha256, "tokenizer": s.tokenizer_sha256, "split": s.split}
    if sampler.drawing is not None and TEACHER in who:
        d = sampler.drawing
        facts["teacher"] = {"name": d.teacher.name, "sha256": d.teacher.weights_sha256} | asdict(d.sampling)
        facts["teacher"]["tokens"] = "ordinary" if d.ordinary else d.solver.to_dict()
        if d.released_prefix:
            facts["teacher"]["released_prefix"] = True
    if sampler.marginals is not None and not who & {STUDENT, TEACHER}:
        manifest = sampler.marginals.dataset.manifest
        facts["pairs"] = {"teacher": manifest.teacher, "num": manifest.num, "checksum": manifest.checksum}
    facts["dtype"] = str(chosen_dtype(args.dtype, sampler.device)).removeprefix("torch.")
    return facts
