"""``ddfast sample``: images of a student, a teacher, both together, or a baseline."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from ..errors import UserError
from ..pictures import grid
from ..sampling import Plan, Sampler, few_step_plan, teacher_plan
from .models import (
    PLANS,
    add_model_arguments,
    add_sample_arguments,
    check_plan_options,
    default_batch,
    open_model,
    open_student,
    open_teacher,
    plan_of,
    sampled,
    teacher_at_hand,
    wanted,
)
from .pairs import choose_device
from .progress import progress_bar
from .written import add_written, captions, check_written, watched, write_images

DESCRIPTION = """\
Draw images with a student in one or a few forward passes (Distilled Decoding, Alg. 3), with its teacher in between
(Alg. 4), with the teacher alone, or by one of the paper's baselines. Sample i starts from the noise of pair i of the
seed, whoever draws it: so the same command with another plan shows what becomes of the same noise, and --compare puts
the teacher's, the few-step and the one-step images of it above one another.

--out decides the form by its ending: a labelled grid (.png, .jpg, .webp), an .npz as `ddfast eval` and OpenAI's ADM
evaluator read it, or else a folder of single PNGs. A folder can be interrupted: the same command finishes it, and under
torchrun the ranks share it."""

EPILOG = """\
examples:
  ddfast sample --student runs/digits-var --out grid.png
  ddfast sample --student runs/digits-var --compare --classes 0-9 --out compare.png
  ddfast sample --student runs/digits-var --steps 2 --classes 3,seven --num 10 --out two-steps.png
  ddfast sample --student runs/digits-var --teacher-groups 1:3 --out with-teacher.png
  ddfast sample --teacher digits-var --skip 1 --out skip-1.png
  ddfast sample --student runs/digits-var --onestep pairs/ --out onestep.png
  ddfast sample --student var-dd-d16 --weights var-d16.pth --tokenizer vae_ch160v4096z32.pth \\
    --classes "golden retriever,goldfish,88" --num 12 --out images.png
  torchrun --nproc-per-node 8 -m ddfast sample --student var-dd-d16 --steps 2 -n 50000 --out samples/
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw images with a student, its teacher, both, or a baseline",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--compare", action="store_true", help="rows of the same noise: the teacher if it is at hand, few steps, one"
    )
    add_sample_arguments(
        parser,
        "one a class named, else 20",
        "images drawn together (default: 500 small ones, 24 of 680 tokens on a CPU)",
    )
    add_written(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    if not wanted(args):
        raise UserError("`ddfast sample` needs --student or --teacher; see `ddfast sample --help` for examples")
    check_written(args)
    if args.compare:
        return compare(args)
    images = open_model(args)
    batch = args.batch or default_batch(images.sampler, images.plan)
    write_images(args.out, images, batch, args.columns)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Ways of drawing the same noise, a row each: the teacher if it is at hand, few steps, one step."""
    given = [name for name in PLANS if getattr(args, name) is not None and name != "teacher_groups"]
    if args.student is None or given or args.out.suffix in ("", ".npz"):
        raise UserError(
            "--compare shows a student's plans above one another in a picture: give --student, --out FILE.png, and no "
            "other plan than --teacher-groups"
        )
    check_plan_options(args)
    device = choose_device(args.device)
    student = open_student(args, device)
    assert student is not None
    name = teacher_at_hand(args, student)
    if name is None and args.teacher_groups is not None:
        raise UserError(f"--teacher-groups needs the teacher, {student.teacher}: name it with --teacher")
    drawing = None if name is None else open_teacher(args, name, device, student)
    sampler = Sampler(student, drawing)
    rows = [sampled(args, sampler, plan) for plan in plans_to_compare(args, sampler)]
    batch = args.batch or min(default_batch(sampler, row.plan) for row in rows)
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("drawing", total=sum(map(len, rows)))
        drawn = [torch.cat(list(watched(row.batches(batch), lambda n: bar.advance(task, n)))) for row in rows]
    count, columns = len(rows[0]), min(args.columns, len(rows[0]))
    tiles, texts, names = [], [], []
    for first in range(0, count, columns):
        part = slice(first, first + columns)
        for row, images in zip(rows, drawn, strict=True):
            lack = columns - len(images[part])
            tiles.append(torch.cat([images[part], images.new_full((lack, *images.shape[1:]), 255)]))
            texts += captions(row)[part] + [""] * lack
            names.append(str(row.how["way"]))
    grid(torch.cat(tiles).float() / 255, texts, columns, args.out, names)
    absent = f"; {student.teacher} is not at hand, so its row is missing" if drawing is None else ""
    print(f"{args.out}: {count} samples, {' above '.join(str(row.how['way']) for row in rows)}{absent}")
    return 0


def plans_to_compare(args: argparse.Namespace, sampler: Sampler) -> list[Plan]:
    groups, student = len(sampler.groups), sampler.student
    assert student is not None
    plans = [] if sampler.drawing is None else [teacher_plan(groups)]
    if args.teacher_groups is not None:
        plans.append(plan_of(args, student, groups))
    return plans + [few_step_plan(student.timesteps[:n], groups) for n in range(len(student.timesteps), 0, -1)]
