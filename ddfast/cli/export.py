"""``ddfast export``: a student as ONNX, an engine, or a package for another runtime."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..export.build import Job, check, check_out, export_student, layouts_of, target_module
from ..export.manifest import Batch, Manifest
from ..models import load_student
from .options.export import OPTIONS
from .progress import console
from .shared import choose_device, parse_timesteps


def run(args: argparse.Namespace) -> int:
    shown = console()
    check_out(args.out)
    module = target_module(args.to)
    job = Job(
        load_student(args.student, args.weights, args.tokenizer, copy=args.copy, device=choose_device(args.device)),
        args.to,
        args.precision or module.PRECISIONS[0],
        (),
        batch=Batch() if args.batches is None else parse_batches(args.batches),
        layout=args.layout or layouts_of(args.to)[0],
        seeded=args.noise_in_graph,
        options=chosen_options(args),
        progress=lambda what: shown.print(f"{args.student}: {what}", soft_wrap=True),
    )
    job.timesteps = chosen_timesteps(args, job.model.timesteps, job.model.name)
    if args.min_agreement is not None and not 0 <= args.min_agreement <= 1:
        raise UserError(f"--min-agreement is {args.min_agreement}; it must lie in [0, 1]")
    check(job)
    print_manifest(args.out, export_student(job, args.out, args.min_agreement, args.parity_images, args.seed))
    return 0


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """The target's own. Raises UserError for one that it does not read."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name in given:
        if args.to not in OPTIONS[name] and getattr(args, "backend", None) not in OPTIONS[name]:
            raise UserError(f"--{name.replace('_', '-')} is for --to {' or '.join(OPTIONS[name])}, not for {args.to}")
    if "compute_capabilities" in given:
        given["compute_capabilities"] = tuple(part.strip() for part in args.compute_capabilities.split(","))
    return given


def chosen_timesteps(args: argparse.Namespace, trained: tuple[int, ...], name: str) -> tuple[int, ...]:
    if args.timesteps is not None:
        return parse_timesteps(args.timesteps)
    steps = 1 if args.steps is None else args.steps
    if not 1 <= steps <= len(trained):
        listed = ",".join(map(str, trained))
        raise UserError(f"--steps is {steps}; {name} was trained on the timesteps {listed}: use 1 to {len(trained)}")
    return trained[:steps]


def parse_batches(text: str) -> Batch:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--batches {text!r} is neither a number of images nor three like 1,8,64")
    numbers = [int(part) for part in parts]
    return Batch(*numbers) if len(numbers) == 3 else Batch(numbers[0], numbers[0], numbers[0])


def print_manifest(out: Path, manifest: Manifest) -> None:
    size = sum(facts["bytes"] for facts in manifest.files.values())
    precision = ", ".join(f"{stage} {p}" for stage, p in manifest.precision.items())
    print(f"{out}: {manifest.target}, {precision}, {size / 1e6:,.1f} MB")
    p = manifest.parity
    if p:
        alike = f"images with equal tokens within {p['image_error'] or 0:.1e}"
        print(
            f"against torch, {p['num']} images by {p['runtime']}: {p['token_agreement']:.2%} of tokens equal, decoder "
            f"{p['decoder_psnr']:.1f} dB, {alike if p['images_alike'] else 'no image has all tokens equal'}"
        )
