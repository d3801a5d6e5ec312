"""Where people write and from what: paths, folders, disks, logs, and what is there already."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import digit_images, pixels, save_npz, save_pictures
from PIL import Image
from safetensors.torch import save_file
from said import Free, Said, bundle, done, refused, student
from tiny import tiny_student
from train_helpers import train, tree

from ddfast.cli import main
from ddfast.pairs import PairDataset, read_manifest
from ddfast.training.monitor import Monitor, read_metrics

__all__ = ["bundle", "done", "refused", "student"]  # fixtures


# --- paths


def test_folders_named_by_their_settings_are_folders(tmp_path: Path, bundle: Path, done: Said, refused: Said) -> None:
    for name in ("samples-cfg1.5", "GPT-B-size-256-topp-1.0-cfg-2.0-seed-0"):
        done("sample", "--teacher", bundle, "--num", "2", "--out", tmp_path / name)
        assert len(list((tmp_path / name).glob("*.png"))) == 2
        assert "2 were there" in done("sample", "--teacher", bundle, "--num", "2", "--out", tmp_path / name)
    done("sample", "--teacher", bundle, "--num", "2", "--out", tmp_path / "X.NPZ")
    assert np.load(tmp_path / "X.NPZ")["arr_0"].shape[0] == 2
    for name in ("x.pgn", "x.gif", "x.txt", "x.pth"):
        said = refused("sample", "--teacher", bundle, "--num", "2", "--out", tmp_path / name)
        assert "must end in .png, .jpg, .jpeg, .webp, .npz; for a folder of that name, make it first" in said


@pytest.mark.parametrize("name", ["pairs v1 [cfg]", "a[/b]c", "[red]", "x\ny", ":smile:"])
def test_a_path_is_printed_as_it_is(tmp_path: Path, bundle: Path, done: Said, name: str) -> None:
    folder = tmp_path / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    assert f"{folder}: 4 pairs in 1 shard" in done("pairs", "--teacher", bundle, "--num", "4", "--out", folder)


def test_a_path_that_is_not_utf8_is_a_path(tmp_path: Path, done: Said) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd6\xd0\xce\xc4"))
    save_pictures(folder, pixels(8))
    done("eval", folder, "--digits", "--out", tmp_path / "ev")
    assert {p.name for p in (tmp_path / "ev").iterdir()} == {"eval.json", "eval.md", "samples.png"}
    done("pairs", "--teacher", "digits-var", "--num", "4", "--out", folder / "pairs")


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Said, refused: Said) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.chdir(tmp_path)
    assert "Looked for in weights" in done("info")
    assert "are not in weights" in refused("pairs", "--teacher", "var-d16", "--num", "1", "--out", "p")


@pytest.mark.parametrize("command", ["pairs", "train"])
def test_variables_of_another_launcher(
    tmp_path: Path, inputs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, refused: Said, command: str
) -> None:
    words = train(tmp_path / "a", inputs["var"])
    if command == "pairs":
        words = ["pairs", "--teacher", inputs["var"][1], "--num", "4", "--out", str(tmp_path / "a")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is 2, but RANK is not set" in refused(*words)
    monkeypatch.setenv("RANK", "0")
    if command == "train":
        said = refused(*words)
        assert "MASTER_ADDR and MASTER_PORT are not set" in said and "(rank 0)" not in said.replace(
            "ddfast (rank 0):", ""
        )
    monkeypatch.setenv("RANK", "7")
    assert "RANK is 7 and WORLD_SIZE is 2" in refused(*words)
    assert not (tmp_path / "a").exists()


# --- what is there already


def test_a_finished_student_without_checkpoints_is_not_written_over(
    tmp_path: Path, inputs: dict[str, list[str]], bundle: Path, refused: Said
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tiny_student(run / "student.safetensors", str(bundle), "var")
    (run / "metrics.jsonl").write_text('{"step": 1000, "loss": 0.3}\n')
    before = tree(run)
    said = refused(*train(run, inputs["var"]))
    assert "holds a student but none of its checkpoints" in said and f"--start {run} begins there" in said
    assert tree(run) == before
    own = tmp_path / "own"
    assert main(train(own, inputs["var"], "--save-every", "2")) == 0
    for path in (own / "checkpoints").iterdir():
        path.unlink()
    before = tree(own)
    assert "none of its checkpoints" in refused(*train(own, inputs["var"], "--save-every", "2"))
    assert tree(own) == before


def test_a_reference_is_not_written_over(tmp_path: Path, refused: Said, done: Said) -> None:
    reference, samples = tmp_path / "ref.npz", tmp_path / "s.npz"
    save_npz(reference, pixels(40))
    save_npz(samples, pixels(20, seed=1))
    before = tree(tmp_path)
    words = ["eval", samples, "--digits"]
    for path in (reference, samples):
        said = refused(*words, "--reference", reference, "--save-reference", path)
        assert "exists and is not a reference of --save-reference" in said
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "is no reference of --save-reference" in refused(*words, "--save-reference", tmp_path / "theirs.npz")
    (tmp_path / "theirs.npz").unlink()
    assert tree(tmp_path) == before
    for _ in range(2):  # its own is replaced
        done(*words, "--reference", reference, "--save-reference", tmp_path / "own.npz")
    said = refused("sample", "--teacher", "digits-var", "--num", "2", "--out", tmp_path / "own.npz")
    assert "own.npz exists and is not an .npz of images" in said


@pytest.mark.parametrize("command", ["pairs", "sample", "train", "eval", "digits", "report", "export", "run"])
def test_a_folder_that_holds_something_else_is_refused_by_all(
    tmp_path: Path, inputs: dict[str, list[str]], student: Path, refused: Said, command: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    save_npz(tmp_path / "s.npz", pixels(4))
    words: dict[str, list[Any]] = {
        "pairs": ["pairs", "--teacher", "digits-var", "--num", "4"],
        "sample": ["sample", "--teacher", "digits-var", "--num", "2"],
        "train": train(out, inputs["var"])[:-2],
        "eval": ["eval", tmp_path / "s.npz", "--digits"],
        "digits": ["digits", "train"],
        "report": ["report", "digits"],
        "export": ["export", "--student", student, "--to", "onnx"],
        "run": ["run", tmp_path],
    }
    given = [word for word in words[command] if word not in ("--out", str(out))]
    said = refused(*given, "--out", out)
    assert f"{out} holds 'thesis.tex', but no" in said
    assert tree(out) == {out / "thesis.tex": b"mine"}


def test_an_output_is_not_written_through_a_link_or_to_a_device(
    tmp_path: Path, bundle: Path, refused: Said, done: Said
) -> None:
    precious = tmp_path / "precious.png"
    Image.new("RGB", (2, 2)).save(precious)
    (tmp_path / "link.png").symlink_to(precious)
    words = ["sample", "--teacher", bundle, "--num", "2", "--out"]
    assert "is a link, and links are not written through" in refused(*words, tmp_path / "link.png")
    (tmp_path / "diary.png").write_text("dear diary")
    assert "exists and is not a picture" in refused(*words, tmp_path / "diary.png")
    done(*words, precious)
    done(*words, precious)
    assert "/dev/null is not a regular file" in refused("digits", "eval", "--json", "/dev/null")


# --- logs, compilers, captions beside pictures


def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for data, kept, dropped in (
        (b'{"step": 1}\n{"step": 2, "lo', [1], 0),
        (b'{"step": 1}\n' + bytes(50), [1], 0),
        (bytes(50) + b'{"step": 1}\n', [1], 0),
        (b'{"step": 1}{"step": 2}\n{"step": 1}\n', [1], 1),
        (b"\xff}\n[1]\n{}\n{junk}\n" + b'{"step": "x"}\n{"step": true}\n{"step": 1}\n', [1], 6),
        (b'{"step": 1}\n{"step": 9}\n', [1], 0),
    ):
        caplog.clear()
        (tmp_path / "metrics.jsonl").write_bytes(data)
        Monitor(tmp_path, 1).close()
        assert [line["step"] for line in read_metrics(tmp_path)] == kept
        assert (f"{dropped} lines that are no figures are dropped" in caplog.text) == bool(dropped)


def test_tensorboard_that_cannot_write_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def writer(*_: object, **__: object) -> None:
        raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range")

    monkeypatch.setattr(tensorboard, "SummaryWriter", writer)
    monitor = Monitor(tmp_path, 0)
    monitor.scalars(1, loss=0.5)
    monitor.close()
    assert "its curves are left out" in caplog.text and read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_no_compiler_is_told_before_work(
    tmp_path: Path, inputs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, refused: Said
) -> None:
    monkeypatch.setattr("ddfast.hardware.shutil.which", lambda name: None)
    said = refused(*train(tmp_path / "a", inputs["var"], "--compile", "on"))
    assert "--compile on: torch.compile needs a C++ compiler and finds none: apt install g++" in said
    assert not (tmp_path / "a").exists()


def test_a_batch_beyond_memory_or_pairs_is_told(
    tmp_path: Path, inputs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, refused: Said, done: Said
) -> None:
    words = train(tmp_path / "a", inputs["var"], "--steps", "2", "--batch", "256")
    assert "a batch of 256 is more than the 133 pairs there are to train on" in done(*words)
    monkeypatch.setattr("ddfast.training.memory.free_bytes", lambda device: 4 << 20)
    said = refused(*train(tmp_path / "b", inputs["var"], "--steps", "2", "--batch", "4096"))
    found = re.search(
        r"a step needs about .* GiB are free on cpu\. Use --micro-batch (\d+), which learns the same", said
    )
    assert found and 4096 % int(found[1]) == 0 and not (tmp_path / "b").exists()
    done(*train(tmp_path / "b", inputs["var"], "--steps", "2", "--batch", "4096", "--micro-batch", found[1]))
    monkeypatch.setattr("ddfast.files.shutil.disk_usage", lambda path: Free(1000))
    assert "checkpoints and the student need about" in refused(*train(tmp_path / "c", inputs["var"]))


def test_pictures_with_somebody_elses_list_beside_them(tmp_path: Path, done: Said, refused: Said) -> None:
    for name, file, text in (
        ("a", "manifest.json", {"images": ["0.png"]}),
        ("b", "manifest.json", ["0.png"]),
        ("c", "sampling.json", {"sampler": "ddim"}),
        ("d", "manifest.json", "{"),
    ):
        folder = save_pictures(tmp_path / name, pixels(8))
        (folder / file).write_text(text if text == "{" else json.dumps(text))
        said = done("eval", folder, "--digits")
        assert ("is not of `ddfast sample`, so the pictures have no labels" in said) == (name == "c")
    (tmp_path / "c" / "sampling.json").write_text("{")
    assert "sampling.json is damaged" in refused("eval", tmp_path / "c", "--digits")


def test_silence_is_for_nothing(tmp_path: Path, bundle: Path, done: Said) -> None:
    said = done("pairs", "--teacher", bundle, "--num", "4", "--out", tmp_path / "p")
    assert re.search(r"4 of 4 pairs of tiny-var to .*: cpu, float32, \d+ at a time; kernels: ", said)
    assert "nothing to make" in done("pairs", "--teacher", bundle, "--num", "4", "--out", tmp_path / "p")
    said = done("sample", "--teacher", bundle, "--num", "2", "--out", tmp_path / "x.png")
    assert "2 images of tiny-var, teacher, to" in said and "kernels: " in said
    images, _ = digit_images()
    save_npz(tmp_path / "d.npz", images[:20])
    assert "20 images of" in done("eval", tmp_path / "d.npz", "--digits")


def test_half_a_folder_of_pairs_is_listed_in_ranges(tmp_path: Path, bundle: Path, done: Said, refused: Said) -> None:
    folder = tmp_path / "p"
    done("pairs", "--teacher", bundle, "--num", "60", "--shard-size", "10", "--out", folder)
    for shard in (1, 2, 5):
        (folder / f"shard-0000{shard}.safetensors").unlink()
    save_file({"x": torch.zeros(1)}, folder / "shard-00009.safetensors")
    said = refused("pairs", "verify", folder)
    assert (
        "4 of 6 shards are not sound" in said and "shards 1:3 are missing" in said and "shards 5:6 are missing" in said
    )
    assert "shard-00009.safetensors is none of these pairs'" in said
    assert len(PairDataset(folder, partial=True)) == 10


def test_a_signed_manifest_of_a_billion_shards_is_verified_in_no_time(
    tmp_path: Path, bundle: Path, done: Said, refused: Said
) -> None:
    folder = tmp_path / "p"
    done("pairs", "--teacher", bundle, "--num", "4", "--out", folder)
    huge = replace(read_manifest(folder), num=10**9, shard_size=1)
    (folder / "manifest.json").write_text(huge.to_json())
    (folder / "shard-00000.safetensors").unlink()
    assert "shards 0:1000000000 are missing" in refused("pairs", "verify", folder)


def test_reading_runs_nothing_that_is_imported_late() -> None:
    """A guard of this file's own: what it monkeypatches is where the code looks."""
    for name in ("ddfast.training.memory", "ddfast.cli.eval", "ddfast.files", "ddfast.hardware"):
        assert name in sys.modules
