"""``ddfast run``: images by an exported folder."""

from __future__ import annotations

import argparse

from ..export.build import open_engine
from ..export.images import engine_images
from ..launcher import torchrun
from ..models.classes import parse_classes
from .models import check_counts
from .progress import console
from .shared import engine_device
from .written import check_images, check_written, write_images


def run(args: argparse.Namespace) -> int:
    check_counts(args)
    check_written(args)
    engine = open_engine(args.engine, engine_device(args.device), args.trust)
    shapes = engine.manifest.shapes
    classes = None if args.classes is None else parse_classes(args.classes, shapes.num_classes)
    images = engine_images(engine, classes, args.num or (20 if classes is None else len(classes)), args.seed)
    check_images(args.out, images, args.columns)
    batch = args.batch or engine.manifest.batch.best
    precision = ", ".join(dict.fromkeys(engine.manifest.precision.values()))
    console(quiet=torchrun().rank != 0).print(
        f"{images.num:,} images of {images.name} to {args.out}: {engine.runtime}, {precision}, {batch} at a time",
        soft_wrap=True,
    )
    write_images(args.out, images, batch, args.columns)
    print(f"by {engine.runtime}")
    return 0
