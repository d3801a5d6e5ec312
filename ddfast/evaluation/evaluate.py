"""From samples and a reference to figures, and from figures to files and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import __version__
from ..digits.metrics import accuracy
from ..errors import UserError
from ..files import remove_abandoned, write_atomic
from ..pictures import grid
from .features import FeatureExtractor, Measured, measure
from .images import ImageSource
from .metrics import NEIGHBOURS, SPLIT, inception_score, precision_recall
from .names import JSON_FILE, PICTURE_FILE, TABLE_FILE
from .reference import Progress, Reference, quiet
from .statistics import frechet_distance

FEW = 2  # times the number of features: fewer samples are called few
NAMED_CLASSES = 20  # up to here a result counts every class
PICTURES, COLUMNS = 60, 10


def evaluate(
    source: ImageSource,
    reference: Reference,
    extractor: FeatureExtractor,
    batch: int = 64,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Measure the images of ``source`` against ``reference``.

    Returns:
        A JSON-able record. Figures: ``samples`` (their number), ``frechet_distance`` and ``spatial_frechet_distance``
        (FID and sFID for Inception, FD for digits), ``inception_score``, ``precision``, ``recall``, ``accuracy`` (the
        share whose largest logit is at the label: digits with labels alone), None where one cannot be had. What they
        are of: ``class_mix``, ``source``, ``reference``, ``extractor``, ``settings``, ``versions``. ``warnings`` are
        sentences.

    Raises:
        UserError: fewer than two samples, or images that the network does not take.
    """
    if len(source) < 2:
        raise UserError("a Frechet distance needs at least two samples; there is one")
    measured = measure(source.batches(batch), extractor, 1, lambda done: progress("samples", done, len(source)))
    labels = source.labels
    found = judge(measured, labels, reference, extractor)
    alike = ["all samples have the same features: they are alike"] * bool(
        (measured.features == measured.features[0]).all()
    )
    return found | {
        "samples": len(source),
        "class_mix": None if labels is None else class_mix(labels),
        "source": source.facts(),
        "reference": reference.facts,
        "extractor": extractor.facts(),
        "settings": {"neighbours": NEIGHBOURS, "inception_score_split": SPLIT},
        "versions": {"ddfast": __version__, "torch": torch.__version__},
        "warnings": alike + warnings(source, reference, extractor),
    }


def judge(
    measured: Measured, labels_N: Tensor | None, reference: Reference, extractor: FeatureExtractor
) -> dict[str, float | None]:
    """The figures of :func:`evaluate` from features that are there."""
    spatial, precision, recall, right = None, None, None, None
    if measured.spatial is not None and reference.spatial is not None:
        spatial = frechet_distance(measured.spatial, reference.spatial)
    if reference.features is not None and enough(len(measured.features), reference):
        device = extractor.device
        precision, recall = precision_recall(measured.features.to(device), reference.features.to(device))
    if labels_N is not None and extractor.names_labels and int(labels_N.max()) < extractor.num_classes:
        right = accuracy(measured.logits, labels_N)
    found = {
        "frechet_distance": frechet_distance(measured.pool, reference.pool),
        "spatial_frechet_distance": spatial,
        "inception_score": inception_score(measured.logits),
        "precision": precision,
        "recall": recall,
        "accuracy": right,
    }
    for name, value in found.items():
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"{name} comes out as {value}: the reference's statistics or the features are out of all range"
            )
    return found


def enough(samples: int, reference: Reference) -> bool:
    """Whether there are neighbours for precision and recall."""
    return reference.features is not None and min(samples, len(reference.features)) > NEIGHBOURS


def class_mix(labels_N: Tensor) -> dict[str, Any]:
    """How many ``classes`` occur, the ``fewest`` and the ``most`` images of one of them, and ``counts`` by class where
    these are not many."""
    found, counts = labels_N.unique(return_counts=True)
    mix: dict[str, Any] = {"classes": len(found), "fewest": int(counts.min()), "most": int(counts.max())}
    if len(found) <= NAMED_CLASSES:
        mix["counts"] = {str(label): count for label, count in zip(found.tolist(), counts.tolist(), strict=True)}
    return mix


def warnings(source: ImageSource, reference: Reference, extractor: FeatureExtractor) -> list[str]:
    """What makes the figures less than they seem."""
    name, lines = extractor.distance, []
    for count, what in ((len(source), "samples"), (reference.pool.count, "reference images")):
        if count is not None and count < FEW * extractor.num_features:
            lines.append(f"{name} of few images is biased upwards: {count} {what}, {extractor.num_features} features")
    if not enough(len(source), reference):
        why = reference.missing or f"they need more than {NEIGHBOURS} images of each side"
        lines.append(f"precision and recall are left out: {why}")
    labels = source.labels
    if labels is not None and extractor.names_labels and int(labels.max()) >= extractor.num_classes:
        lines.append(
            f"accuracy is left out: label {int(labels.max())} is no class of the {extractor.name}, which has 0 to "
            f"{extractor.num_classes - 1}"
        )
    side = reference.facts.get("size", source.size)
    if side != source.size:
        lines.append(f"the samples are {source.size} pixels wide, the reference's images {side}")
    if not extractor.facts().get("released_weights", True):
        lines.append(f"the weights are not the released ones: this {name} compares with no published one")
    return lines


def figures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures that could be had: (name, value) as people write them."""
    name = result["extractor"]["distance"]
    shown = (
        ("frechet_distance", name, ".3f"),
        ("spatial_frechet_distance", f"s{name}", ".3f"),
        ("inception_score", "IS", ".2f"),
        ("precision", "precision", ".4f"),
        ("recall", "recall", ".4f"),
        ("accuracy", "accuracy", ".4f"),
    )
    return [(label, format(result[key], spec)) for key, label, spec in shown if result[key] is not None]


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the figures are of, a line each."""
    lines = [(key, _said(result[key])) for key in ("source", "reference", "extractor")]
    if result["class_mix"] is not None:
        lines.append(("class mix", _said(result["class_mix"])))
    return [*lines, ("settings", _said(result["settings"])), ("versions", _said(result["versions"]))]


def _said(record: Mapping[str, Any]) -> str:
    """A record as text; nested ones in braces."""
    return ", ".join(
        f"{key.replace('_', ' ')} " + ("{" + _said(value) + "}" if isinstance(value, Mapping) else str(value))
        for key, value in record.items()
    )


def print_result(result: Mapping[str, Any], console: Console | None = None) -> None:
    """The figures as a table, warnings below it."""
    rows, console = figures(result), console or Console(markup=False, highlight=False, emoji=False)
    table = Table("samples", *(label for label, _ in rows), title=f"{result['extractor']['network']}")
    table.add_row(str(result["samples"]), *(value for _, value in rows))
    console.print(table)
    for line in result["warnings"]:
        console.print(f"note: {line}", soft_wrap=True)


def markdown(result: Mapping[str, Any]) -> str:
    """The same for a page, with a picture and what the figures are of."""
    rows = [("samples", str(result["samples"])), *figures(result)]
    table = ["|" + "|".join(f" {cell[i]} " for cell in rows) + "|" for i in (0, 1)]
    lines = ["# Evaluation", "", table[0], "|" + "---:|" * len(rows), table[1], ""]
    lines += [f"> {line}\n" for line in result["warnings"]]
    lines += [f"![the first samples]({PICTURE_FILE})", ""]
    return "\n".join([*lines, *(f"- {key}: {text}" for key, text in facts(result))]) + "\n"


def write_result(folder: Path, result: Mapping[str, Any], pictures_B3HW: Tensor, captions: Sequence[str]) -> None:
    """Write eval.json, eval.md and samples.png into ``folder``, each whole or not at all.

    Args:
        pictures_B3HW: uint8, the first samples.
        captions: one each.
    """
    remove_abandoned(folder, JSON_FILE, TABLE_FILE, PICTURE_FILE)
    write_atomic(folder / JSON_FILE, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / TABLE_FILE, markdown(result).encode(errors="backslashreplace"))
    grid(pictures_B3HW.float() / 255, captions, COLUMNS, folder / PICTURE_FILE)


def first_pictures(source: ImageSource) -> tuple[Tensor, list[str]]:
    """The first samples, uint8 [B, 3, H, W], and their labels or else numbers, for :func:`write_result`."""
    images = next(source.batches(min(PICTURES, len(source))))
    names = range(len(images)) if source.labels is None else source.labels[: len(images)].tolist()
    return images, [str(name) for name in names]
