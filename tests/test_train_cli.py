"""``ddfast train`` as its users meet it: killed, on several ranks, given bad input, and what comes of it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_helpers import Launcher, checkpoints, curve, outcome, refused, train, tree, weights

from ddfast.cli import main
from ddfast.files import locked
from ddfast.models import load_student
from ddfast.models.checkpoints import read_safetensors
from ddfast.training import Trainer

# Killed


@pytest.mark.slow  # the next kills at chosen moments
def test_killed_at_random_moments(tmp_path: Path, launch: Launcher, inputs: dict[str, list[str]]) -> None:
    """kill -9 again and again: the same curve, student, checkpoint and picture as undisturbed, and nothing else."""
    more = ("--steps", "120", "--save-every", "7", "--log-every", "3", "--keep", "3")
    whole, killed = (train(tmp_path / name, inputs["llamagen"], *more) for name in ("whole", "killed"))
    start = time.monotonic()
    assert launch(*whole) == [0], launch.said()
    took, rng, kills = time.monotonic() - start, random.Random(0), 0
    for _ in range(8):
        kills += launch(*killed, kill_after=rng.uniform(0.1, 0.35) * took) == [-signal.SIGKILL]
    assert kills >= 4
    assert launch(*killed) == [0], launch.said()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert len(checkpoints(tmp_path / "killed")) == 3


def test_killed_while_writing(tmp_path: Path, launch: Launcher, inputs: dict[str, list[str]]) -> None:
    """Within the student's and the checkpoint's file, before and after either has its name, while old ones go.

    What is there is whole each time, and beside a checkpoint there is a student.
    """
    more = ("--steps", "4", "--save-every", "1", "--eval-every", "2")
    whole, killed = (train(tmp_path / name, inputs["var"], *more) for name in ("whole", "killed"))
    assert launch(*whole) == [0], launch.said()
    folder, events = tmp_path / "killed", 0
    rng = random.Random(1)
    while True:
        events += rng.randrange(20, 130)
        code = launch(*killed, kill_at=events)
        if code == [0]:
            break
        assert code == [-signal.SIGKILL], launch.said()
        for path in (folder / "checkpoints").glob("step-*"):
            step = json.loads(read_safetensors(path)[0]["ddfast"])["step"]
            assert path.name == f"step-{step:08d}.safetensors"
            load_student(folder)
    assert outcome(folder) == outcome(tmp_path / "whole")
    assert [p.name for p in checkpoints(folder)] == ["step-00000003.safetensors", "step-00000004.safetensors"]
    for theirs, ours in zip(checkpoints(tmp_path / "whole"), checkpoints(folder), strict=True):
        assert theirs.read_bytes() == ours.read_bytes()


@pytest.mark.parametrize("last", ["ddfast.cli.train.save_student", "ddfast.training.trainer.save_checkpoint"])
def test_ended_within_the_last_save(
    tmp_path: Path, inputs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """By whatever is written second, too: no finished run keeps an old student."""
    commands = {name: train(tmp_path / name, inputs["var"], "--save-every", "3") for name in ("whole", "ended")}
    assert main(commands["whole"]) == 0
    calls: list[None] = []
    plain = getattr(sys.modules[last.rpartition(".")[0]], last.rpartition(".")[2])

    def second_time(*args: Any, **options: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "student.safetensors")
        plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(last, second_time)
        assert main(commands["ended"]) == 1
    assert main(commands["ended"]) == 0
    assert outcome(tmp_path / "ended") == outcome(tmp_path / "whole")


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path, inputs: dict[str, list[str]]) -> None:
    """Even by one that finds its steps done: temporary files of its own, and checkpoints that were to be deleted."""
    command = train(tmp_path / "run", inputs["var"], "--save-every", "2")
    assert main(command) == 0
    run = tmp_path / "run"
    before, last = outcome(run), checkpoints(run)[-1]
    for name in ("student.safetensors", f"checkpoints/{last.name}", "samples/step-00000004.png", "metrics.jsonl"):
        (run / name).with_name(f".{Path(name).name}.01234567.tmp").write_bytes(b"half")
    shutil.copy(last, last.with_name("step-00000002.safetensors"))
    kept = [run / ".notes.tmp", run / ".notes.01234567.tmp", run / "checkpoints" / ".x.tmp"]
    for path in kept:
        path.write_bytes(b"mine")
    assert main(command) == 0
    for path in kept:
        assert path.read_bytes() == b"mine"
        path.unlink()
    assert outcome(run) == before and len(checkpoints(run)) == 2


def test_a_folder_in_use_is_left_alone(
    tmp_path: Path, inputs: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the second of two same commands, which keeps fewer checkpoints."""
    command = train(tmp_path / "run", inputs["var"], "--save-every", "2")
    assert main(command) == 0
    before = tree(tmp_path)
    with locked(tmp_path / "run"):
        assert "another process is writing to" in refused(capsys, [*command, "--keep", "1"])
    assert tree(tmp_path) == before


def test_interrupted_from_the_keyboard(
    tmp_path: Path, inputs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train(tmp_path / "whole", inputs["var"])) == 0
    plain = Trainer.step

    def step(self: Trainer, n: int) -> None:
        plain(self, n)
        if n == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert main(train(tmp_path / "stopped", inputs["var"])) == 130
    assert checkpoints(tmp_path / "stopped")[-1].name == "step-00000003.safetensors"
    capsys.readouterr()
    assert main(train(tmp_path / "stopped", inputs["var"])) == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


# Several ranks


def assert_same_run(got: Path, want: Path) -> None:
    """The same weights, averages and optimiser state within rounding, the same curve, the same names of files.

    Gradients are summed in another order, an error of about 1e-7 of the largest. Adam divides by a root of their
    squares, so where a gradient is itself that small its share of a step, lr at most, is up to chance: weights are
    within 2% of the largest possible step, and all but a few far closer.
    """
    theirs, ours = weights(want), weights(got)
    assert set(theirs) == set(ours)
    far = count = 0
    for name, t in theirs.items():
        step = 4e-3 * 16 / 256
        torch.testing.assert_close(ours[name], t, rtol=1e-4, atol=0.02 * step, msg=name)
        far += int(((ours[name] - t).abs() > 1e-4 * t.abs() + 1e-6).sum())
        count += t.numel()
    assert far < 1e-3 * count
    for one, other in zip(curve(got), curve(want), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert {p.relative_to(got) for p in got.rglob("*.[jps]*")} == {p.relative_to(want) for p in want.rglob("*.[jps]*")}


@pytest.mark.parametrize(
    ("name", "way", "more"),
    [
        ("llamagen", "ddp", "--micro-batch 4"),
        pytest.param("var", "ddp", "", marks=pytest.mark.slow),
        pytest.param("llamagen", "ddp", "--distance-weight 0", marks=pytest.mark.slow),
        pytest.param("var", "fsdp", "--micro-batch 4", marks=pytest.mark.slow),
        pytest.param("llamagen", "fsdp", "", marks=pytest.mark.slow),
        pytest.param("shared", "fsdp", "--activation-checkpointing --distance-weight 0", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(
    tmp_path: Path, launch: Launcher, inputs: dict[str, list[str]], name: str, way: str, more: str
) -> None:
    """The same global batch. Their shares of the holdout, 8 and 9 pairs, take another number of passes of 4 or 8."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(*train(one, inputs[name], *more.split())) == [0], launch.said()
    assert launch(*train(two, inputs[name], "--parallel", way, *more.split()), world=2) == [0, 0], launch.said()
    assert_same_run(two, one)


def test_a_sharded_run_goes_on_by_itself_or_on_one_rank(
    tmp_path: Path, launch: Launcher, inputs: dict[str, list[str]]
) -> None:
    sharded = ("--parallel", "fsdp")
    whole = train(tmp_path / "whole", inputs["var"], "--save-every", "3")
    assert launch(*whole, *sharded, world=2) == [0, 0], launch.said()
    for name, (more, world) in {"two": (sharded, 2), "one": ((), 1)}.items():
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        checkpoints(tmp_path / name)[-1].unlink()  # that of step 3 is left
        again = train(tmp_path / name, inputs["var"], "--save-every", "3", *more)
        assert launch(*again, world=world) == [0] * world, launch.said()
        assert "going on from step 3" in launch.said()
        assert_same_run(tmp_path / name, tmp_path / "whole")
    assert outcome(tmp_path / "two") == outcome(tmp_path / "whole")  # to the bit, as gloo adds two numbers


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_rank_that_is_asked_to_stop_stops_all(
    tmp_path: Path, launch: Launcher, inputs: dict[str, list[str]], way: str
) -> None:
    """They save one checkpoint together, and go on from there to the same end."""
    whole, stopped = (train(tmp_path / name, inputs["var"], "--parallel", way) for name in ("whole", "stopped"))
    assert launch(*whole, world=2) == [0, 0], launch.said()
    assert launch(*stopped, world=2, ask_at=1) == [130, 130], launch.said()
    assert checkpoints(tmp_path / "stopped")[-1].name == "step-00000003.safetensors"
    assert launch(*stopped, world=2) == [0, 0] and "going on from step 3" in launch.said()
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


# Pairs as they are needed


def test_online_goes_on_too(tmp_path: Path, launch: Launcher, inputs: dict[str, list[str]]) -> None:
    teacher = [*inputs["llamagen"][:2], "--online"]
    whole, killed = (train(tmp_path / name, teacher, "--save-every", "1") for name in ("whole", "killed"))
    assert launch(*whole) == [0], launch.said()
    for events in (150, 400):
        assert launch(*killed, kill_at=events) == [-signal.SIGKILL]
    assert launch(*killed) == [0] and "going on from step" in launch.said()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


# What comes of it


def test_a_student_starts_from_another(tmp_path: Path, inputs: dict[str, list[str]]) -> None:
    """With no rate to speak of it stays what the other was, and it is another run than one from the teacher."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(train(first, inputs["var"], "--ema", "0")) == 0
    assert main(train(second, inputs["var"], "--start", str(first), "--lr", "1e-12", "--ema", "0")) == 0
    want, got = load_student(first), load_student(second)
    for (name, t), other in zip(want.student.state_dict().items(), got.student.state_dict().values(), strict=True):
        assert torch.allclose(t, other, atol=1e-9), name
    assert want.sha256 in (second / "config.json").read_text()
    assert main(train(second, inputs["var"], "--lr", "1e-12", "--ema", "0")) != 0


@pytest.mark.parametrize("name", ["var", "llamagen"])
def test_a_student_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inputs: dict[str, list[str]], name: str
) -> None:
    """96 pairs nearly by heart, and its teacher well enough for half of the holdout's tokens; by chance 1 in 24."""
    more = "--steps 80 --batch 48 --holdout 54 --lr 0.1 --timesteps 0,2 --log-every 10 --eval-every 40 --ema 0.9"
    assert main(train(tmp_path, inputs[name], *more.split())) == 0
    lines = curve(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]
    final = lines[-1]
    assert final["step"] == 80 and final["holdout/agreement_t0"] > 0.4 < final["holdout/agreement_t2"]
    said = capsys.readouterr().out
    assert f"80 steps; holdout from 0: {final['holdout/agreement_t0']:.1%} of tokens agree, from 2:" in said
    distilled = load_student(tmp_path)
    assert (distilled.name, distilled.timesteps) == (f"tiny-{name}-student", (0, 2))
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [p.name for p in pictures] == ["step-00000040.png", "step-00000080.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.width > picture.height > 64  # a row of the teacher's above one of the student's, of four each


def test_curves_and_pictures_in_tensorboard(tmp_path: Path, inputs: dict[str, list[str]]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(train(tmp_path, inputs["var"])) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 7))
    assert [e.step for e in events.Scalars("holdout/agreement_t0")] == [4, 6]
    assert events.Scalars("loss")[2].value == pytest.approx(curve(tmp_path)[2]["loss"])
    assert [e.step for e in events.Images("teacher above student")] == [4, 6]


def test_without_tensorboard_a_line_says_so(
    tmp_path: Path, inputs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("ddfast.cli.train", "ddfast.training.monitor"):
        monkeypatch.setattr(f"{module}.tensorboard_installed", lambda: False)
    assert main(train(tmp_path, inputs["var"])) == 0
    assert "tensorboard is not installed, so its curves are left out" in capsys.readouterr().err
    assert not (tmp_path / "tensorboard").exists() and len(curve(tmp_path)) == 8
