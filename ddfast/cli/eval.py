"""``ddfast eval``: FID, sFID, Inception Score, precision and recall of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ..digits.data import IMAGE_SIZE
from ..errors import UserError
from ..evaluation.evaluate import JSON_FILE, PICTURE_FILE, TABLE_FILE, evaluate, first_pictures, print_result
from ..evaluation.evaluate import write_result as write_files
from ..evaluation.features import INCEPTION_FILE, FeatureExtractor, load_digits_features, load_inception
from ..evaluation.images import ImageSource, open_images
from ..evaluation.reference import DIGITS, load_reference, save_reference
from ..export.build import open_engine
from ..export.images import engine_images, is_exported
from ..files import check_writable
from ..models.classes import parse_classes
from .models import (
    add_model_arguments,
    add_sample_arguments,
    check_plan_options,
    check_used,
    default_batch,
    open_model,
    wanted,
)
from .pairs import choose_device
from .progress import progress_bar
from .run import engine_device

DESCRIPTION = f"""\
Measure images against a reference: FID, sFID, Inception Score, precision and recall, as OpenAI's ADM evaluator takes
them. Samples are a folder of pictures or an .npz in that evaluator's format (arr_0 uint8 [N, H, W, 3], arr_1 labels).
The reference is a folder or such an .npz, too, or statistics: VIRTUAL_imagenet256_labeled.npz, or mu and sigma of
pytorch-fid. So two folders can be compared. Or the samples are drawn for it from a model, with the options of `ddfast
sample`.

The features are those of FID's InceptionV3, from {INCEPTION_FILE} of torch-fidelity:
bring it and name it with --inception; nothing is downloaded. Needs pip install 'ddfast[eval]'. For digits, the
classifier that ships with ddfast takes Inception's place and the distance is called FD.

Published FIDs are of 50,000 samples, ImageNet's against VIRTUAL_imagenet256_labeled.npz; fewer samples give a larger
FID. Precision and recall need the reference's images, not only its statistics."""

EPILOG = f"""\
examples:
  ddfast eval samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception {INCEPTION_FILE}
  ddfast eval samples/ --reference imagenet/ --inception {INCEPTION_FILE} --out eval/
  ddfast eval samples/ --reference imagenet/ --inception {INCEPTION_FILE} \\
    --save-reference imagenet.npz    # later: --reference imagenet.npz, without precision and recall
  ddfast eval --student var-dd-d16 --steps 2 --num 50000 --inception {INCEPTION_FILE} \\
    --reference VIRTUAL_imagenet256_labeled.npz
  ddfast eval digits.npz --digits    # against the real digits
  ddfast eval --student runs/digits-var --digits
  ddfast eval --teacher digits-var --ordinary --digits
  ddfast eval student/ --reference teacher/ --digits
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="FID, sFID, Inception Score, precision and recall of images",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "samples", type=Path, nargs="?", metavar="SAMPLES", help="a folder of pictures, or an .npz; or else a model"
    )
    add_reference_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {JSON_FILE}, {TABLE_FILE}, {PICTURE_FILE}")
    parser.add_argument(
        "--save-reference", type=Path, metavar="FILE", help="write the reference's statistics, an .npz for --reference"
    )
    add_model_arguments(parser)
    add_sample_arguments(parser, "5000", "images drawn and measured together (default: 64; of a model, what suits it)")
    parser.set_defaults(func=run)


def add_reference_arguments(parser: Any) -> None:
    """What samples are compared with, and by which network. For a parser or a group of one."""
    parser.add_argument(
        "--reference", metavar="REF", help=f"a folder, an .npz, or {DIGITS}: the real digits (with --digits: default)"
    )
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--inception", type=Path, metavar="FILE", help=f"{INCEPTION_FILE}")
    network.add_argument("--digits", action="store_true", help="16x16 digits: the bundled classifier, no Inception")


def run(args: argparse.Namespace) -> int:
    check_options(args)
    device, source, batch = choose_device(args.device), *opened(args)
    check_source(source, args)
    extractor = chosen_extractor(args, device)
    with progress_bar(Console(stderr=True)) as bar:
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
        engine = open_engine(args.samples, engine_device(args.device))
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
        if args.save_reference.suffix != ".npz":
            raise UserError(f"--save-reference {args.save_reference} must end in .npz")
        check_writable(args.save_reference.parent)
    if args.out is not None:
        check_writable(args.out)
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
    if args.reference != DIGITS and not Path(args.reference).is_dir() and Path(args.reference).suffix != ".npz":
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
