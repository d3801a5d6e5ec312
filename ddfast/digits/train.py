"""``ddfast digits train`` and ``eval``: every stage in order, the files they leave, and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddfast.digits.classifier import FILE as CLASSIFIER_FILE
from ddfast.digits.classifier import (
    DigitsClassifier,
    extract,
    load_classifier,
    normalise_features,
    save_classifier,
    train_classifier,
)
from ddfast.digits.data import Digits, enlarge, load_digits
from ddfast.digits.evaluate import SAMPLES, measure_teacher
from ddfast.digits.loop import Progress
from ddfast.digits.metrics import accuracy
from ddfast.digits.teachers import RECIPES, train_teacher
from ddfast.digits.tokenizer import round_trip_psnr
from ddfast.errors import UserError
from ddfast.evaluation.statistics import FeatureStatistics
from ddfast.files import is_file, replacing
from ddfast.models.checkpoints import Part, load_bundle, make_part, save_bundle
from ddfast.models.digits import DigitsTokenizer
from ddfast.models.distilled import Distilled, load_student
from ddfast.models.zoo import BUNDLED, TEACHERS, assemble, load_teacher

REPORT_FILE = "digits-report.json"
CLASSIFIER = "classifier"
NAMES = (CLASSIFIER, *RECIPES)
Report = dict[str, Any]


def train_digits(out: Path, names: tuple[str, ...], seed: int, steps_scale: float, progress: Progress) -> None:
    """Train what ``names`` (of ``NAMES``) says and write each file into ``out`` as soon as it is whole.

    Args:
        out: folder, made if absent; files already there are replaced.
        seed: of all random choices: the same seed, machine and number of threads give the same weights.
        steps_scale: multiplies the steps of every stage.
        progress: told of each step.

    Raises:
        UserError: scikit-learn is absent, ``seed`` or ``steps_scale`` is out of range, or ``out`` is a file.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must lie in [0, 2^32)")
    if not 0 < steps_scale <= 100:
        raise UserError(f"steps scale is {steps_scale}; it must lie in (0, 100], 1 being the recipe")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder; choose another --out")
    train, _ = load_digits()
    for name in names:
        if name == CLASSIFIER:
            classifier = train_classifier(train, seed, progress, steps_scale)
            normalise_features(classifier, train)
            save_classifier(out / CLASSIFIER_FILE, classifier, train)
        else:
            transformer, tokenizer = train_teacher(name, train, seed, progress, steps_scale)
            parts = {
                "transformer": half_part(RECIPES[name].kind, transformer, name),
                "tokenizer": half_part("digits-tokenizer", tokenizer, name),
            }
            save_bundle(out / f"{name}.safetensors", name, parts)


def half_part(kind: str, module: Any, source: str) -> Part:
    """A trained module as a bundle's part, its weights rounded to float16."""
    return make_part(kind, module.config, {key: t.detach().half() for key, t in module.state_dict().items()}, source)


def measure_files(folder: Path, names: tuple[str, ...]) -> Report:
    """Measure the files of ``names`` in ``folder`` as they are read back: a JSON-able report, one entry a name.

    The classifier comes from ``folder`` or, where it has none, from ddfast's own weights.
    """
    path = folder / CLASSIFIER_FILE
    classifier, reference = load_classifier(path if is_file(path) else BUNDLED / CLASSIFIER_FILE)
    _, test = load_digits()
    report: Report = {}
    for name in names:
        if name == CLASSIFIER:
            report[name] = {"test_accuracy": classifier_accuracy(classifier, test)}
        else:
            report[name] = measure_bundle(folder / f"{name}.safetensors", classifier, reference, test)
    return report


def measure_students(folders: Sequence[Path]) -> Report:
    """Students of a digits teacher, such as the folders of training runs, beside that teacher: one entry a teacher.

    Raises UserError for a student of another teacher.
    """
    classifier, reference = load_classifier(BUNDLED / CLASSIFIER_FILE)
    students: dict[str, dict[str, Distilled]] = {}
    for folder in folders:
        model = load_student(folder)
        if model.teacher not in RECIPES:
            raise UserError(f"{folder} is a student of {model.teacher}, not of {' or '.join(RECIPES)}")
        students.setdefault(model.teacher, {})[str(folder)] = model
    report: Report = {}
    for name, models in students.items():
        teacher = load_teacher(name)
        for path, model in models.items():
            if model.teacher_sha256 not in (None, teacher.weights_sha256["transformer"]):
                raise UserError(f"{path} is a student of another {name} than the one that ships with ddfast")
        found = measure_teacher(teacher, classifier, reference, models)
        report[name] = {"samples": SAMPLES} | {way: quality.to_dict() for way, quality in found.items()}
    return report


def measure_bundle(path: Path, classifier: DigitsClassifier, reference: FeatureStatistics, test: Digits) -> Report:
    """Tokenizer PSNR on the test digits; accuracy and FD of 5,000 samples by ordinary sampling and by the flow."""
    name, parts = load_bundle(path)
    if name not in RECIPES:
        raise UserError(f"{path} holds {name}, no digits teacher; name a folder that `ddfast digits train` filled")
    teacher = assemble(name, parts, TEACHERS[name].presets)
    tokenizer = parts["tokenizer"].build(torch.float32, "cpu")
    assert isinstance(tokenizer, DigitsTokenizer)
    report: Report = {"tokenizer_test_psnr_db": round_trip_psnr(tokenizer, test), "samples": SAMPLES}
    for way, quality in measure_teacher(teacher, classifier, reference).items():
        report[way] = quality.to_dict()
    return report


def classifier_accuracy(classifier: DigitsClassifier, test: Digits) -> float:
    """Accuracy on the test digits, enlarged, without augmentation."""
    return accuracy(extract(classifier, enlarge(test.images))[1], test.labels)


def write_report(folder: Path, report: Report, seconds: float | None = None) -> Path:
    """Write ``digits-report.json`` beside the weights; returns its path."""
    threads = torch.get_num_threads()
    header: Report = {"torch": torch.__version__, "threads": threads, "written": time.strftime("%Y-%m-%d")}
    if seconds is not None:
        header["training_seconds"] = round(seconds)
    path = folder / REPORT_FILE
    with replacing(path) as file:
        file.write((json.dumps(header | report, indent=2) + "\n").encode())
    return path
