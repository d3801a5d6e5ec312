"""The command line as its users meet it: what it writes, what it says, what it refuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_helpers import contents
from PIL import Image
from test_checkpoints import BY_FILE
from tiny import random_weights, tiny_bundle

from ddfast.cli import build_parser, main
from ddfast.flow import make_solver
from ddfast.models import STUDENTS, TEACHERS
from ddfast.models.checkpoints import expected_shapes, load_bundle, read_extra
from ddfast.models.llamagen import LlamaGenConfig, LlamaGenTransformer
from ddfast.models.llamagen_student import LlamaGenStudentConfig
from ddfast.models.zoo import TOKENIZERS
from ddfast.pairs import PairDataset


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny.safetensors", "var"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must be refused with exit code 2; returns what it said."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_pairs_of_the_bundled_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    folder = tmp_path / "pairs"
    assert main(["pairs", "--teacher", name, "--num", "96", "--shard-size", "40", "--out", str(folder)]) == 0
    assert main(["pairs", "verify", str(folder)]) == 0
    assert "96 pairs of " + name in capsys.readouterr().out
    dataset = PairDataset(folder)
    assert len(dataset) == 96 and dataset[range(10)].labels.tolist() == list(range(10))
    picture = tmp_path / "grid.png"
    assert main(["pairs", "show", str(folder), "--out", str(picture), "--count", "24", "--columns", "8"]) == 0
    with Image.open(picture) as image:
        assert image.size == (8 * 68 + 4, 3 * 84 + 4)


def test_a_rerun_finishes_and_says_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle: str
) -> None:
    command = ["pairs", "--teacher", bundle, "--num", "30", "--shard-size", "10", "--out", str(tmp_path / "a")]
    assert main([*command, "--batch", "5"]) == 0
    before = contents(tmp_path / "a")
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    capsys.readouterr()
    assert main(command) == 0  # takes over the batch of the shards that are there
    assert "note:" not in capsys.readouterr().err and contents(tmp_path / "a") == before
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    assert main([*command, "--batch", "3"]) == 0
    assert "batch=5" in capsys.readouterr().err
    assert refused(capsys, *command, "--seed", "3", "--num", "31").count("is ") >= 2


def test_options_reach_the_manifest(tmp_path: Path, bundle: str) -> None:
    options = "--labels 4,0-2 --seed 9 --guidance 1.25 --top-k 7 --top-p 0.9 --temperature 0.8 --solver euler --nfe 6"
    command = ["pairs", "--teacher", bundle, "--num", "9", "--out", str(tmp_path), "--store-noise", *options.split()]
    assert main([*command, "--dtype", "bfloat16", "--device", "cpu", "--batch", "2"]) == 0
    dataset = PairDataset(tmp_path)
    m = dataset.manifest
    assert dataset[range(9)].labels.tolist() == [4, 0, 1, 2, 4, 0, 1, 2, 4]
    assert m.sampling == {"guidance": 1.25, "guidance_interval": -1, "temperature": 0.8, "top_k": 7, "top_p": 0.9}
    assert (m.seed, m.store_noise, m.solver) == (9, True, make_solver("euler", 6).to_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "needs --teacher"),
        ("--teacher BUNDLE --out OUT", "needs --num"),
        ("--teacher digits-vra --num 5 --out OUT", "did you mean digits-var"),
        ("--teacher nowhere.safetensors --num 5 --out OUT", "nowhere.safetensors does not exist"),
        ("--teacher BUNDLE --num 0 --out OUT", "num is 0"),
        ("--teacher BUNDLE --num 5 --out OUT --top-p 1.2", "top_p .*1.2"),
        ("--teacher BUNDLE --num 5 --out OUT --top-k 1000", "top-k is 1000"),
        ("--teacher BUNDLE --num 5 --out OUT --temperature 0", "temperature .*0"),
        ("--teacher BUNDLE --num 5 --out OUT --labels 5", "--labels '5': '5' is no class"),
        ("--teacher BUNDLE --num 5 --out OUT --labels cat", "--labels 'cat'"),
        ("--teacher BUNDLE --num 5 --out OUT --nfe 0", "0"),
        ("--teacher BUNDLE --num 5 --out OUT --batch 0", "--batch is 0"),
        ("--teacher BUNDLE --num 5 --out OUT --device cuda:7", "torch sees . CUDA devices"),
        ("--teacher BUNDLE --num 5 --out OUT --device tpuu", "--device tpuu is not a device"),
        ("--teacher BUNDLE --num 5 --out OUT --device mps", "--device mps is not supported"),
        ("--teacher BUNDLE --num 5 --out OUT --preset paper", "no preset 'paper'; it has plain"),
        ("--teacher BUNDLE --num 5 --out OUT --guidance-interval 3", "guidance_interval 3 has no meaning"),
        ("--teacher BUNDLE --num 5 --out BUNDLE", "is not a folder"),
        ("--teacher BUNDLE --num 5 --out OUT --weights x.pth", "holds its own weights"),
        ("--teacher digits-var --num 5 --out OUT --weights x.pth", "ships with its weights"),
    ],
)
def test_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle: str, options: str, message: str
) -> None:
    out = tmp_path / "out"
    argv = options.replace("BUNDLE", bundle).replace("OUT", str(out)).split()
    said = refused(capsys, "pairs", *argv)
    assert re.search(message, said), said
    assert "Traceback" not in said and not out.exists()


def test_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28), "shard-00000.safetensors")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["pairs", "--teacher", bundle, "--num", "5", "--out", str(tmp_path)]) == 1
    assert "No space left on device (shard-00000.safetensors)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_show_refuses_what_it_cannot_show(tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    folder, other = str(tmp_path / "pairs"), str(tiny_bundle(tmp_path / "other.safetensors", "var", seed=5))
    assert main(["pairs", "--teacher", bundle, "--num", "5", "--out", folder]) == 0
    capsys.readouterr()
    assert "another tokenizer" in refused(capsys, "pairs", "show", folder, "--out", "x.png", "--teacher", other)
    assert "must end in .png" in refused(capsys, "pairs", "show", folder, "--out", "x.txt", "--teacher", bundle)
    assert "--teacher" in refused(capsys, "pairs", "show", folder, "--out", "x.png")
    assert "holds no pairs" in refused(capsys, "pairs", "show", str(tmp_path), "--out", "x.png")


def test_verify_names_every_bad_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    assert main(["pairs", "--teacher", bundle, "--num", "30", "--shard-size", "10", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "shard-00000.safetensors").unlink()
    path = tmp_path / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    said = refused(capsys, "pairs", "verify", str(tmp_path))
    assert "2 of 3 shards" in said and "shards 0:1 are missing" in said and "00002.safetensors is damaged" in said


def test_two_ranks_and_one_process_write_the_same_folder(tmp_path: Path) -> None:
    options = ["pairs", "--teacher", "digits-var", "-n", "300", "--shard-size", "50", "--batch", "50", "--out"]
    assert main([*options, str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ddfast"]
    done = subprocess.run(
        [*launch, *options, str(tmp_path / "two")], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_ctrl_c_keeps_whole_shards_and_exits_130(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    options = ["pairs", "--teacher", "digits-llamagen", "--num", "100000", "--shard-size", "64", "--out", str(folder)]
    process = subprocess.Popen([sys.executable, "-m", "ddfast", *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while len(list(folder.glob("shard-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on from there" in said and "Traceback" not in said
    assert len(PairDataset(folder, partial=True)) >= 128
    assert all(p.name == "manifest.json" or p.name.startswith("shard-") for p in folder.iterdir())


def test_convert_recognises_a_released_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = TOKENIZERS["llamagen-vq-16"]
    shapes = expected_shapes(entry.kind, entry.config)
    source, out = tmp_path / entry.file, tmp_path / "vq.safetensors"
    torch.save({"model": {k: torch.zeros(1).expand(s) for k, s in shapes.items()}}, source)
    assert main(["convert", str(source), "--out", str(out)]) == 0
    name, parts = load_bundle(out)
    assert name == "llamagen-vq-16" and parts["tokenizer"].config == entry.config
    assert set(parts["tokenizer"].tensors) == set(shapes)
    capsys.readouterr()
    assert "exists" in refused(capsys, "convert", str(source), "--out", str(out))
    assert "is a ddfast file already" in refused(capsys, "convert", str(out), "--out", str(tmp_path / "b.safetensors"))
    assert "must end in .safetensors" in refused(capsys, "convert", str(source), "--out", str(tmp_path / "b.pt"))
    wrong = refused(capsys, "convert", str(source), "--model", "var-vqvae", "--out", str(tmp_path / "b.safetensors"))
    assert "unexpected" in wrong and "missing" in wrong


@pytest.mark.parametrize(("options", "copy"), [([], "ema"), (["--copy", "raw"], "raw")])
def test_convert_takes_the_copy_of_a_student_that_is_asked_for(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    copy: str,
) -> None:
    config = LlamaGenStudentConfig(1, 1, 8, 9, 24, 5, multiple_of=8, codebook_dim=4)
    entry = replace(STUDENTS["llamagen-dd-b"], name="tiny-dd", config=config)
    monkeypatch.setitem(STUDENTS, entry.name, entry)
    shapes = expected_shapes(entry.kind, config)
    source, out = tmp_path / "weights.pt", tmp_path / "student.safetensors"
    held = {key: {k: torch.full(s, value) for k, s in shapes.items()} for key, value in (("ema", 1.0), ("model", 2.0))}
    torch.save(held, source)
    assert main(["convert", str(source), "--out", str(out), *options]) == 0
    name, parts = load_bundle(out)
    assert (name, list(parts), parts["student"].config) == ("tiny-dd", ["student"], config)
    assert parts["student"].tensors["norm.weight"].unique().item() == {"ema": 1.0, "raw": 2.0}[copy]
    assert read_extra(out) == {"copy": copy}
    other, key = ("raw", "ema") if copy == "ema" else ("ema", "model")
    torch.save({key: held[key]}, source)
    capsys.readouterr()
    said = refused(capsys, "convert", str(source), "--copy", other, "--out", str(tmp_path / "b.safetensors"))
    assert f"holds no {other} copy of the weights, only {copy}" in said and f"--copy {copy}" in said


def test_convert_refuses_a_copy_of_what_has_but_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = TOKENIZERS["llamagen-vq-16"]
    source = tmp_path / entry.file
    shapes = expected_shapes(entry.kind, entry.config)
    torch.save({"model": {k: torch.zeros(1).expand(s) for k, s in shapes.items()}}, source)
    said = refused(capsys, "convert", str(source), "--copy", "ema", "--out", str(tmp_path / "b.safetensors"))
    assert "--copy ema is for students, and this is llamagen-vq-16" in said


def test_convert_asks_where_two_models_share_their_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = BY_FILE["c2i_B_256.pt"]
    assert entry.kind is not None
    source = tmp_path / "weights.pt"
    torch.save(
        {"model": {k: torch.zeros(1).expand(s) for k, s in expected_shapes(entry.kind, entry.config).items()}}, source
    )
    said = refused(capsys, "convert", str(source), "--out", str(tmp_path / "b.safetensors"))
    assert "llamagen-b-256 and llamagen-b-384" in said and "--model" in said
    strange = tmp_path / "strange.pt"
    torch.save(random_weights(LlamaGenTransformer(LlamaGenConfig(1, 1, 8, multiple_of=8)), 0), strange)
    assert "none of the released models" in refused(
        capsys, "convert", str(strange), "--out", str(tmp_path / "b.safetensors")
    )


def test_info_lists_the_zoo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("DDFAST_WEIGHTS", str(tmp_path))
    (tmp_path / "var_d16.pth").touch()
    (tmp_path / "var-d20.pth").touch()
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in (*TEACHERS, *TOKENIZERS, *STUDENTS):
        assert name in out
    assert re.search(r"var-dd-d16 +var-d16 +328.2 M +680 in 10 +0,5 +5 *\n", out)
    assert re.search(r"llamagen-dd-l +llamagen-l-256 +326.2 M +256 in 256 +0,80 +130 *\n", out)
    assert re.search(rf"var-dd-d20 +var-d20.pth +{tmp_path}", out) and "microsoft/distilled_decoding on" in out
    assert str(tmp_path) in out and "FoundationVision/var on" in out
    assert "680 in 10" in out and "2240 in 10" in out and "576 in 576" in out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--help"], ["pairs", "--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(command)
        assert "ddfast pairs --teacher" in (text := capsys.readouterr().out) or "ddfast convert var_d16.pth" in text
    assert main([]) == 2
    assert build_parser().prog == "ddfast"
