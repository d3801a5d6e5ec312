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
from .pairs import DTYPES, add_teacher_sampling, choose_device, chosen_sampling
from .train import parse_timesteps

PLANS = ("steps", "timesteps", "teacher_groups", "skip", "onestep")
SEED = 1  # pairs have 0: a student is not shown the noise that it was trained on
SEED_HELP = "of the noise: sample i starts from that of pair i of this seed (default: 1; that of pairs is 0)"
TOKENS_CPU, TOKENS_GPU, IMAGES = 1 << 14, 1 << 16, 500  # drawn together


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Who draws, by which plan, and how the teacher is sampled."""
    who = parser.add_argument_group("who draws")
    who.add_argument(
        "--student", metavar="NAME|DIR|FILE", help="a student of `ddfast info`, a run of `ddfast train`, or a file"
    )
    who.add_argument("--weights", type=Path, metavar="FILE", help="its released checkpoint, if not in a weight folder")
    who.add_argument(
        "--copy", choices=["ema", "raw"], default="ema", help="its moving average (default) or raw weights"
    )
    who.add_argument(
        "--teacher",
        metavar="NAME|PATH",
        help="the teacher alone, or with --student the one of --teacher-groups (default: the student's own)",
    )
    who.add_argument("--teacher-weights", type=Path, metavar="FILE", help="the teacher's released checkpoint")
    who.add_argument("--tokenizer", type=Path, metavar="FILE", help="the tokenizer's checkpoint, for both")
    plan = parser.add_argument_group("by which plan (one of these; default: --steps 1, and the whole teacher)")
    plan.add_argument("--steps", type=int, metavar="N", help="the student's first N timesteps (Alg. 3)")
    plan.add_argument("--timesteps", metavar="LIST", help="these groups as timesteps, e.g. 0,5 (Alg. 3)")
    plan.add_argument(
        "--teacher-groups",
        metavar="A:B",
        help="student, teacher in groups A to B - 1, student (Alg. 4); 3:5 is the paper's pre-trained-4-6",
    )
    plan.add_argument("--skip", type=int, metavar="N", help="the teacher without its last N groups (baseline skip-n)")
    plan.add_argument(
        "--onestep",
        type=Path,
        metavar="PAIRS",
        help="every token by its frequency in this folder of pairs of the class (baseline onestep*, Prop. 3.1)",
    )
    plan.add_argument(
        "--split", type=int, metavar="N", help="groups before it from logits, the others embeddings (the student's)"
    )
    how = add_teacher_sampling(parser)
    how.add_argument(
        "--ordinary", action="store_true", help="draw the teacher's tokens by their probabilities, without the flow"
    )
    how.add_argument(
        "--released-prefix",
        action="store_true",
        help="VAR: run the teacher's prefix without a mask, as the released code does",
    )


def add_sample_arguments(parser: argparse.ArgumentParser, num: str, batch: str) -> None:
    """Which samples, and how they are computed; ``num`` and ``batch`` tell the defaults."""
    what = parser.add_argument_group("which samples")
    what.add_argument(
        "--classes", metavar="LIST", help="in turn: numbers, ranges or names, e.g. 207,3-5,goldfish (default: all)"
    )
    what.add_argument("-n", "--num", type=int, metavar="N", help=f"number of samples (default: {num})")
    what.add_argument("--seed", type=int, default=SEED, help=SEED_HELP)
    run = parser.add_argument_group("how it runs (decides only rounding)")
    run.add_argument("--batch", type=int, metavar="B", help=batch)
    run.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on a GPU, else float32")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


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
    for name in ("num", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; it must lie in [0, 2^63)")


def parse_groups(text: str) -> tuple[int, int]:
    """``A:B``"""
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal()):
        raise UserError(f"--teacher-groups {text!r} is no range of groups like 3:5")
    return int(first), int(stop)


def chosen_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    return DTYPES["bfloat16" if device.type == "cuda" else "float32"] if args.dtype == "auto" else DTYPES[args.dtype]


def open_student(args: argparse.Namespace, device: torch.device) -> Distilled | None:
    if args.student is None:
        return None
    dtype = chosen_dtype(args, device)
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
        teacher = load_teacher(name, args.teacher_weights, tokenizer, chosen_dtype(args, device), device)
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
    facts["dtype"] = str(chosen_dtype(args, sampler.device)).removeprefix("torch.")
    return facts
