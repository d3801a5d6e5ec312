"""A thousand damaged files of every kind that ddfast reads: none is taken for another, none ends in a traceback.

What cannot be noticed is said elsewhere: JPEG and the like carry no checksums, and a log of figures decides nothing.
"""

from __future__ import annotations

import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import pixels, save_npz, save_pictures
from tiny import tiny_student
from train_helpers import checkpoints, train

from ddfast.cli import main
from ddfast.cli.report import pairs_of
from ddfast.digits.classifier import load_classifier
from ddfast.errors import UserError
from ddfast.evaluation.features import load_digits_features
from ddfast.evaluation.images import open_images
from ddfast.evaluation.reference import load_reference, save_reference
from ddfast.export.build import Job, export_student, open_engine
from ddfast.export.manifest import read_manifest as read_engine
from ddfast.models import load_student
from ddfast.models.checkpoints import load_bundle, read_copies, read_extra
from ddfast.models.zoo import BUNDLED
from ddfast.pairs import PairDataset, read_manifest
from ddfast.tensors import content_hash, file_sha256
from ddfast.training.checkpoint import read_checked
from ddfast.training.distance import load_program
from ddfast.training.monitor import read_lines

SECONDS, BYTES = 20, 2 << 30
Read = Callable[[], Any]


def weights(path: Path) -> Any:
    return {copy: content_hash(found) for copy, found in read_copies(path).items()}


def bundle(path: Path) -> Any:
    name, parts = load_bundle(path)
    return name, read_extra(path), {k: (p.kind, asdict(p.config), p.sha256) for k, p in parts.items()}


def student(path: Path) -> Any:
    m = load_student(path)
    return m.name, m.teacher, m.timesteps, m.split, m.sha256, m.tokenizer_sha256, m.teacher_sha256


def pairs(folder: Path) -> Any:
    dataset = PairDataset(folder)
    return read_manifest(folder), dataset.labels().tolist(), dataset.rows(torch.arange(len(dataset)))[1].tolist()


def images(path: Path) -> Any:
    source = open_images(path)
    labels = None if source.labels is None else source.labels.tolist()
    return labels, source.facts(), content_hash({"x": torch.cat(list(source.batches(5)))})


def reference(path: Path) -> Any:
    found = load_reference(path, load_digits_features())
    return found.pool.count, content_hash({"mean": found.pool.mean, "covariance": found.pool.covariance})


def classifier(path: Path) -> Any:
    model, real = load_classifier(path)
    return content_hash(dict(model.state_dict())), real.count, content_hash({"m": real.mean, "c": real.covariance})


def program(path: Path) -> Any:
    return load_program(path, "cpu")(torch.ones(1, 3, 16, 16)).tolist()


@pytest.fixture(scope="module")
def kinds(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, list[str]], bundles: dict[str, Path]
) -> dict[str, tuple[Path, Read]]:
    """Of each kind: the file, and how it is read, to something that can be compared."""
    root = tmp_path_factory.mktemp("kinds")
    run, folder, samples, engine = (root / name for name in ("run", "pairs", "samples", "engine"))
    assert main(train(run, inputs["var"], "--steps", "3")) == 0
    assert main(["pairs", "--teacher", str(bundles["var"]), "--num", "12", "--out", str(folder)]) == 0
    assert main(["sample", "--teacher", str(bundles["var"]), "--num", "6", "--out", str(samples)]) == 0
    small = load_student(tiny_student(root / "tiny.safetensors", str(bundles["llamagen"]), "llamagen"))
    export_student(Job(small, "onnx", "fp32", (0,), single_file=0, progress=lambda what: None), engine)
    zipped, old = root / "w.pth", root / "old.pth"
    tensors = {"model": {f"layer{i}.weight": torch.randn(3, 5) for i in range(4)}, "epoch": np.int64(3)}
    torch.save(tensors, zipped)
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    old = old.rename(root / f"old-{file_sha256(old)[:8]}.pth")
    (root / "classifier.safetensors").write_bytes((BUNDLED / "digits-classifier.safetensors").read_bytes())
    save_npz(root / "s.npz", pixels(9), torch.arange(9) % 3)
    save_pictures(root / "pictures", pixels(3))
    save_reference(root / "r.npz", load_reference(root / "s.npz", load_digits_features()), load_digits_features())
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten())
    torch.export.save(torch.export.export(network, (torch.ones(1, 3, 16, 16),)), root / "f.pt2")
    last = checkpoints(run)[-1]
    return {
        "bundle": (bundles["var"], lambda: bundle(bundles["var"])),
        "student": (run / "student.safetensors", lambda: student(run)),
        "checkpoint of PyTorch": (zipped, lambda: weights(zipped)),
        "old checkpoint": (old, lambda: weights(old)),
        "checkpoint of a run": (last, lambda: [asdict(read_checked(run, 3)[0]), content_hash(read_checked(run, 3)[1])]),
        "configuration of a run": (run / "config.json", lambda: pairs_of(run)),
        "log": (run / "metrics.jsonl", lambda: None if read_lines(run / "metrics.jsonl") else None),
        "manifest of pairs": (folder / "manifest.json", lambda: pairs(folder)),
        "shard": (folder / "shard-00000.safetensors", lambda: pairs(folder)),
        "manifest of samples": (samples / "sampling.json", lambda: images(samples)),
        "sample": (samples / "000003.png", lambda: images(samples)),
        "picture": (root / "pictures" / "1.png", lambda: images(root / "pictures")),
        "npz": (root / "s.npz", lambda: images(root / "s.npz")),
        "reference": (root / "r.npz", lambda: reference(root / "r.npz")),
        "classifier": (root / "classifier.safetensors", lambda: classifier(root / "classifier.safetensors")),
        "manifest of an engine": (engine / "manifest.json", lambda: read_engine(engine)),
        "graph": (engine / "model.onnx", lambda: open_engine(engine).manifest),
        "weights of a graph": (engine / "model.onnx.data", lambda: open_engine(engine).manifest),
        "program": (root / "f.pt2", lambda: program(root / "f.pt2")),
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One accident: bits, bytes, pages, ends; or an edit of a text."""
    out, at = bytearray(data), rng.randrange(len(data))
    size = min(rng.choice([1, 2, 8, 64, 512, 4096]), len(data) - at)
    match rng.randrange(10):
        case 0 | 1 | 2:
            out[at] ^= 1 << rng.randrange(8)
        case 3:
            out[at : at + size] = bytes(size)
        case 4:
            out[at : at + size] = rng.randbytes(size)
        case 5:
            del out[at : at + size]
        case 6:
            out[at:at] = rng.choice([rng.randbytes(size), out[:size], bytes(size)])
        case 7:
            del out[at:]
        case 8:
            other = rng.randrange(len(data))
            out[at : at + size] = data[other : other + size]
        case 9:
            digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
            at = rng.choice(digits or [0])
            out[at : at + 1] = rng.choice([b"9", b"-1", b"1e999", b"null", b'"x"', b"[[", b"10000000000", b"0.5"])
    return bytes(out)


@contextmanager
def limited() -> Iterator[None]:
    """A scope that may not take long, nor much memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before, most = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < BYTES >> 10, "more memory than that"


@pytest.mark.slow
def test_no_damaged_file_is_taken_for_another(
    kinds: dict[str, tuple[Path, Read]], caplog: pytest.LogCaptureFixture, each: int = 56, seed: int = 0
) -> None:
    assert each * len(kinds) > 1000
    for kind, (path, read) in kinds.items():
        data, want, rng, refused = path.read_bytes(), read(), random.Random(f"{seed} {kind}"), 0
        for number in range(each):
            path.write_bytes(mutated(data, rng))
            caplog.clear()
            try:
                with limited():
                    got = read()
            except UserError as error:
                refused += 1
                assert len(str(error)) < 4000, f"{kind} {number}"
            except Exception as error:
                raise AssertionError(f"{kind}, damage {number}: {error!r}") from error
            else:
                told = "it is damaged: its SHA-256" in caplog.text
                assert json.dumps(got, default=str) == json.dumps(want, default=str) or told, f"{kind}, damage {number}"
        path.write_bytes(data)
        assert json.dumps(read(), default=str) == json.dumps(want, default=str)
        assert refused > each // 3 or kind in ("log", "old checkpoint", "picture", "npz"), f"{kind}: {refused} refused"
