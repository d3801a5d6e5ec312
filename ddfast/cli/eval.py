"""``ddfast eval``: FID, sFID, Inception Score, precision and recall of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..digits.data import IMAGE_SIZE
from ..errors import UserError
from ..evaluation.evaluate import evaluate, first_pictures, print_result
from ..evaluation.evaluate import write_result as write_files
from ..evaluation.features import FeatureExtractor, load_digits_features, load_inception
from ..evaluation.images import ImageSource, open_images
from ..evaluation.names import DIGITS, INCEPTION_FILE, JSON_FILE, PICTURE_FILE, TABLE_FILE
from ..evaluation.reference import check_saved, load_reference, save_reference
from ..export.build import open_engine
from ..export.images import engine_images
from ..export.manifest import is_exported
from ..files import check_folder
from ..models.classes import parse_classes
from ..pairs.memory import free_bytes
from ..records import read_object
from .models import (
    check_plan_options,
    check_used,
    default_batch,
    open_model,
    wanted,
)
from .progress import console, progress_bar
from .shared import announce, choose_device, engine_device


def run(args: argparse.Namespace) -> int:
    check_options(args)
    device, source, batch = choose_device(args.device), *opened(args)
    check_source(source, args)
    extractor = chosen_extractor(args, device)
    check_memory(len(source), extractor)
    name = args.samples or args.student or args.teacher
    announce(console(), f"{len(source):,} images of {name} by the {extractor.name}", device, "float32", batch)
    with progress_bar(console()) as bar:
        stages = Stages(bar)
        reference = load_reference(args.reference, extractor, batch, stages)
        if args.save_reference is not None:
            save_reference(args.save_reference, reference, extractor)
        result = evaluate(source, reference, extractor, batch, stages)
    print_result(result)
    if args.out is not None:
        write_files(args.out, result, *first_pictures(source))
        print(f"{args.out}: {JSON_FILE}, {TABLE_FILE}, {PICTURE_FILE}")
    return 0


def opened(args: argparse.Namespace) -> tuple[ImageSource, int]:
    """The images to measure, and how many at a time."""
    if args.samples is not None and is_exported(args.samples):
        engine = open_engine(args.samples, engine_device(args.device), args.trust)
        classes = None if args.classes is None else parse_classes(args.classes, engine.manifest.shapes.num_classes)
        return engine_images(engine, classes, args.num or 5000, args.seed), args.batch or engine.manifest.batch.best
    if args.samples is not None:
        return open_images(args.samples), args.batch or 64
    images = open_model(args, default_num=5000)
    return images, args.batch or default_batch(images.sampler, images.plan)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what can be seen to fail."""
    if wanted(args) == (args.samples is not None):
        raise UserError("`ddfast eval` measures either images, a folder or an .npz, or a model: --student or --teacher")
    check_plan_options(args)
    if args.samples is not None:
        check_used(args, ())
    check_reference(args)
    if args.save_reference is not None:
        if args.save_reference.suffix.lower() != ".npz":
            raise UserError(f"--save-reference {args.save_reference} must end in .npz")
        check_saved(args.save_reference)
    if args.out is not None:
        check_folder(
            args.out, "evaluation", lambda out: "ddfast" in ((read_object(out / JSON_FILE) or {}).get("versions") or {})
        )
        folders = [p for p in (args.samples, Path(args.reference)) if p is not None and p.is_dir()]
        if any(p.resolve() == args.out.resolve() for p in folders):
            raise UserError(
                f"--out {args.out} holds the images; {PICTURE_FILE} would become one: choose another folder"
            )


def check_reference(args: argparse.Namespace) -> None:
    """Refuse a reference or network that cannot be, and let --digits and the reference digits imply each other."""
    args.digits = args.digits or (args.reference == DIGITS and args.inception is None)
    if args.reference is None:
        if not args.digits:
            raise UserError("`ddfast eval` needs --reference, a folder or an .npz; or --digits for the real digits")
        args.reference = DIGITS
    if args.reference == DIGITS and not args.digits:
        raise UserError(f"--reference {DIGITS} goes with --digits; Inception is not for them")
    if not args.digits and args.inception is None:
        raise UserError(f"`ddfast eval` needs --inception {INCEPTION_FILE}; or --digits for 16x16 digits")
    for path in (None if args.reference == DIGITS else Path(args.reference), args.inception):
        if path is not None and not path.exists():
            raise UserError(f"{path} does not exist")
    if args.reference != DIGITS and not Path(args.reference).is_dir() and Path(args.reference).suffix.lower() != ".npz":
        raise UserError(f"--reference {args.reference} is neither a folder of pictures nor an .npz")


def check_source(source: ImageSource, args: argparse.Namespace) -> None:
    what = args.student or args.teacher if args.samples is None else args.samples
    size = f"{what} has images of {source.size}x{source.size} pixels"
    if source.size == IMAGE_SIZE and not args.digits:
        raise UserError(f"{size}, which are digits: use --digits")
    if source.size != IMAGE_SIZE and args.digits:
        raise UserError(f"{size}, digits have {IMAGE_SIZE}x{IMAGE_SIZE}: use --inception FILE")
    if len(source) < 2:
        raise UserError(f"{what} has one image; a Frechet distance needs at least two")


def check_memory(count: int, extractor: FeatureExtractor) -> None:
    """Raise UserError where the features of so many samples do not fit in memory."""
    need, free = 4 * count * (extractor.num_features + extractor.num_classes), free_bytes(torch.device("cpu"))
    if need > free:
        raise UserError(
            f"the features of {count:,} samples need {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            "measure fewer with --num"
        )


def chosen_extractor(args: argparse.Namespace, device: torch.device) -> FeatureExtractor:
    return load_digits_features() if args.digits else load_inception(args.inception, device)


class Stages:
    """A progress bar a stage."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total)
        self.bar.update(self.tasks[stage], completed=done)
