"""``ddfast sample``: images of a student, a teacher, both together, or a baseline."""

from __future__ import annotations

import argparse

import torch

from ..errors import UserError
from ..launcher import torchrun
from ..pictures import check_grid, grid
from ..sampling import Plan, Sampler, few_step_plan, teacher_plan
from .models import (
    PLANS,
    check_counts,
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
from .progress import console, progress_bar
from .shared import announce, choose_device, chosen_dtype
from .written import captions, check_images, check_written, watched, write_images


def run(args: argparse.Namespace) -> int:
    if not wanted(args):
        raise UserError("`ddfast sample` needs --student or --teacher; see `ddfast sample --help` for examples")
    check_written(args)
    if args.compare:
        return compare(args)
    check_counts(args)
    images = open_model(args)
    check_images(args.out, images, args.columns)
    batch = args.batch or default_batch(images.sampler, images.plan)
    device, rank = images.sampler.device, torchrun().rank
    what = f"{images.num:,} images of {images.name}, {images.how['way']}, to {args.out}"
    announce(console(quiet=rank != 0), what, device, chosen_dtype(args.dtype, device), batch)
    write_images(args.out, images, batch, args.columns)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Ways of drawing the same noise, a row each: the teacher if it is at hand, few steps, one step."""
    given = [name for name in PLANS if getattr(args, name) is not None and name != "teacher_groups"]
    if args.student is None or given or args.out.suffix.lower() in ("", ".npz"):
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
    count, columns = len(rows[0]), min(args.columns, len(rows[0]))
    blocks, names = -(-count // columns), [str(row.how["way"]) for row in rows]
    check_grid(args.out, blocks * columns * len(rows), rows[0].size, columns, names)
    what = f"{count:,} samples of {student.name}, {' above '.join(names)}, to {args.out}"
    announce(console(), what, device, chosen_dtype(args.dtype, device), batch)
    with progress_bar(console()) as bar:
        task = bar.add_task("drawing", total=sum(map(len, rows)))
        drawn = [torch.cat(list(watched(row.batches(batch), lambda n: bar.advance(task, n)))) for row in rows]
    tiles, texts = [], []
    for first in range(0, count, columns):
        part = slice(first, first + columns)
        for row, images in zip(rows, drawn, strict=True):
            lack = columns - len(images[part])
            tiles.append(torch.cat([images[part], images.new_full((lack, *images.shape[1:]), 255)]))
            texts += captions(row)[part] + [""] * lack
    grid(torch.cat(tiles).float() / 255, texts, columns, args.out, names * blocks)
    absent = f"; {student.teacher} is not at hand, so its row is missing" if drawing is None else ""
    print(f"{args.out}: {count} samples, {' above '.join(names)}{absent}")
    return 0


def plans_to_compare(args: argparse.Namespace, sampler: Sampler) -> list[Plan]:
    groups, student = len(sampler.groups), sampler.student
    assert student is not None
    plans = [] if sampler.drawing is None else [teacher_plan(groups)]
    if args.teacher_groups is not None:
        plans.append(plan_of(args, student, groups))
    return plans + [few_step_plan(student.timesteps[:n], groups) for n in range(len(student.timesteps), 0, -1)]
