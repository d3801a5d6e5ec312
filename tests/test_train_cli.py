"""``ddfast train`` as its users meet it: killed, on several ranks, given bad input, and what comes of it."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_bundle
from train_helpers import Launcher, checkpoints, curve, outcome, share_modulation, tree, weights

from ddfast.cli import main
from ddfast.files import locked
from ddfast.models import load_student
from ddfast.models.checkpoints import load_bundle, make_part, read_safetensors, save_bundle
from ddfast.models.distilled import save_student
from ddfast.training import Trainer

PLAIN = (
    "--precision float32 --recipe digits --steps 6 --batch 16 --warmup 2 --holdout 17 --log-every 1 --eval-every 4 "
    "--samples 4"
)
INPUTS = ("var", "llamagen", "shared")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of a tiny teacher of each family, and of one whose blocks share their modulation: --teacher and --pairs."""
    folder, options = tmp_path_factory.mktemp("inputs"), {}
    for name in INPUTS:
        bundle = folder / f"{name}.safetensors"
        tiny_bundle(bundle, "var" if name == "shared" else name)
        if name == "shared":
            share_modulation(bundle)
        pairs = folder / f"{name}-pairs"
        assert main(["pairs", "--teacher", str(bundle), "--num", "150", "--shard-size", "64", "--out", str(pairs)]) == 0
        options[name] = ["--teacher", str(bundle), "--pairs", str(pairs)]
    return options


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


def train(out: Path, options: list[str], *more: str) -> list[str]:
    return ["train", *options, "--out", str(out), *PLAIN.split(), *more]


# Killed


def test_killed_at_random_moments(tmp_path: Path, launch: Launcher, inputs: dict[str, list[str]]) -> None:
    """kill -9 again and again: the same curve, student, checkpoint and picture as undisturbed, and nothing else."""
    more = ("--steps", "60", "--save-every", "7", "--log-every", "3", "--keep", "3")
    whole, killed = (train(tmp_path / name, inputs["llamagen"], *more) for name in ("whole", "killed"))
    assert launch(*whole) == [0], launch.said()
    rng, kills = random.Random(0), 0
    for _ in range(8):
        kills += launch(*killed, kill_after=rng.uniform(0.2, 1.0)) == [-signal.SIGKILL]
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

    def second_time(*args: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "student.safetensors")
        plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(last, second_time)
        assert main(commands["ended"]) == 1
    assert main(commands["ended"]) == 0
    assert outcome(tmp_path / "ended") == outcome(tmp_path / "whole")


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path, inputs: dict[str, list[str]]) -> None:
    """Even by one that finds its steps done: temporary files, and checkpoints that were to be deleted."""
    command = train(tmp_path, inputs["var"], "--save-every", "2")
    assert main(command) == 0
    before, last = outcome(tmp_path), checkpoints(tmp_path)[-1]
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "samples"):
        (folder / f".{last.name}.01234567.tmp").write_bytes(b"half")
    shutil.copy(last, last.with_name("step-00000002.safetensors"))
    assert main(command) == 0
    assert outcome(tmp_path) == before and len(checkpoints(tmp_path)) == 2


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
        ("var", "ddp", ""),
        ("llamagen", "ddp", "--micro-batch 4"),
        ("llamagen", "ddp", "--distance-weight 0"),
        ("var", "fsdp", "--micro-batch 4"),
        ("llamagen", "fsdp", ""),
        ("shared", "fsdp", "--activation-checkpointing --distance-weight 0"),
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


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
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


# Refused


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run a command that must be refused with exit code 2; returns what it said."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def places(inputs: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the names in capitals below stand for."""
    folder = tmp_path_factory.mktemp("places")
    var, llamagen = (inputs[name] for name in ("var", "llamagen"))
    _, parts = load_bundle(var[1])
    tokenizer = parts["tokenizer"]
    moved = {k: t + 0.1 * (k == "quantize.embedding.weight") for k, t in tokenizer.tensors.items()}
    other = make_part(tokenizer.kind, tokenizer.config, moved, "test")
    save_bundle(folder / "moved.safetensors", "moved", parts | {"tokenizer": other})
    shutil.copytree(var[3], folder / "unfinished")
    (folder / "unfinished" / "shard-00001.safetensors").unlink()
    (folder / "empty").mkdir()
    named = {"VAR": var[1], "PAIRS": var[3], "LLAMAGEN": llamagen[1], "THEIRS": llamagen[3]}
    files = {"MOVED": "moved.safetensors", "UNFINISHED": "unfinished", "EMPTY": "empty", "NOWHERE": "nowhere"}
    return named | {name: str(folder / file) for name, file in files.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--teacher VAR", "needs either --pairs DIR or --online"),
        ("--teacher VAR --pairs PAIRS --online", "needs either --pairs DIR or --online"),
        (
            "--teacher VAR --pairs THEIRS",
            "made by tiny-llamagen, another teacher than tiny-var: their .* their transformer has",
        ),
        ("--teacher VAR --pairs THEIRS", "9 groups, not 3"),
        ("--teacher MOVED --pairs PAIRS", "another teacher than moved: their codebook and tokenizer has the hash"),
        ("--teacher nowhere.safetensors --pairs PAIRS", "nowhere.safetensors does not exist"),
        ("--teacher VAR --pairs NOWHERE", "nowhere"),
        ("--teacher VAR --pairs EMPTY", "empty"),
        ("--teacher VAR --pairs UNFINISHED", "shard 1 of 3 is missing"),
        ("--teacher VAR --pairs PAIRS --timesteps 0,3", "timesteps 3 is no group of this teacher; use 0 to 2"),
        ("--teacher VAR --pairs PAIRS --timesteps 1,2", "timesteps 1,2 must begin at 0 and rise"),
        ("--teacher VAR --pairs PAIRS --timesteps 0,2,1", "timesteps 0,2,1 must begin at 0 and rise"),
        ("--teacher VAR --pairs PAIRS --timesteps 0,-1", "'0,-1' is no list of groups"),
        ("--teacher VAR --pairs PAIRS --split 4", "split 4 must lie between 0 and 3"),
        ("--teacher VAR --pairs PAIRS --holdout 150", "has 150 pairs, and holdout 150 leaves none"),
        ("--teacher VAR --pairs PAIRS --micro-batch 5", "micro-batch 5 does not divide the 16 pairs"),
        ("--teacher VAR --pairs PAIRS --micro-batch 0", "micro-batch is 0"),
        ("--teacher VAR --pairs PAIRS --parallel fsdp", "fsdp needs several ranks"),
        ("--teacher VAR --pairs PAIRS --distance lpips", "bring vgg16-397923af.pth"),
        ("--teacher VAR --pairs PAIRS --distance features", "--features"),
        ("--teacher VAR --pairs PAIRS --features digits-classifier", "not for the distance l2"),
        ("--teacher VAR --pairs PAIRS --ce-weight 0 --distance-weight 0", "are both 0"),
        ("--teacher VAR --pairs PAIRS --lr nan", "lr nan must be"),
        ("--teacher VAR --pairs PAIRS --steps 1", "warmup 2 must lie between 0 and --steps 1"),
        ("--teacher VAR --pairs PAIRS --log-every 0", "log-every is 0"),
        ("--teacher VAR --pairs PAIRS --device cuda:7", "torch sees"),
    ],
)
def test_refused_before_any_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], places: dict[str, str], options: str, message: str
) -> None:
    given = [places.get(word, word) for word in options.split()]
    said = refused(capsys, ["train", "--out", str(tmp_path / "out"), *PLAIN.split(), *given])
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("start", "more", "message"),
    [
        ("llamagen", (), "it is a llamagen-student, not a var-student"),
        ("var", ("--no-layerwise",), "layerwise is True, not False"),
        ("absent", (), "no student is called"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    tmp_path: Path,
    inputs: dict[str, list[str]],
    capsys: pytest.CaptureFixture[str],
    start: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    if start in inputs:
        assert main(train(tmp_path / start, inputs[start], "--steps", "2")) == 0
    argv = train(tmp_path / "new", inputs["var"], "--start", str(tmp_path / start), *more)
    assert message in refused(capsys, argv)
    assert not (tmp_path / "new").exists()


def test_a_start_with_another_codebook_is_refused(
    tmp_path: Path, inputs: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train(tmp_path / "first", inputs["var"], "--steps", "2")) == 0
    model = load_student(tmp_path / "first")
    parts = load_bundle(tmp_path / "first" / "student.safetensors")[1]
    vq = parts["tokenizer"]
    key = next(k for k, t in vq.tensors.items() if t.shape == model.codebook.shape)
    other = make_part(vq.kind, vq.config, vq.tensors | {key: vq.tensors[key] + 1}, "test")
    save_student(tmp_path / "other.safetensors", "other", parts["student"], other, (0, 2), 3, "tiny-var")
    argv = train(tmp_path / "new", inputs["var"], "--start", str(tmp_path / "other.safetensors"))
    assert "its codebook is another" in refused(capsys, argv)


def test_a_teacher_of_no_zoo_needs_a_recipe_and_out_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inputs: dict[str, list[str]]
) -> None:
    said = refused(capsys, ["train", *inputs["var"], "--out", str(tmp_path / "out")])
    assert "is not in the zoo: say which --recipe of paper-var, paper-llamagen, digits" in said
    (tmp_path / "file").write_text("kept")
    assert "is not a folder" in refused(capsys, train(tmp_path / "file", inputs["var"]))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "kept")]


def test_ranks_must_share_the_batch_evenly(tmp_path: Path, launch: Launcher, inputs: dict[str, list[str]]) -> None:
    for options, message in (
        ("--batch 15", "batch 15 cannot be shared by 2 ranks"),
        ("--micro-batch 16", "the 8 pairs"),
    ):
        assert launch(*train(tmp_path / "out", inputs["var"], *options.split()), world=2) == [2, 2]
        assert message in launch.said()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--lr 1e-3", ["config.lr is 0.016, not 0.001"]),
        ("--seed 3 --steps 9", ["config.seed is 0, not 3", "config.steps is 6, not 9"]),
        ("--timesteps 0,1", ["config.timesteps is [0], not [0, 1]"]),
        ("--online", ["pairs is"]),
        ("llamagen", ["teacher is tiny-var, not tiny-llamagen", "weights.transformer is", "pairs is"]),
    ],
)
def test_a_run_of_another_configuration_is_refused_and_left_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    inputs: dict[str, list[str]],
    options: str,
    names: list[str],
) -> None:
    assert main(train(tmp_path, inputs["var"])) == 0
    before = tree(tmp_path)
    if options == "llamagen":
        argv = train(tmp_path, inputs["llamagen"])
    elif options == "--online":
        argv = train(tmp_path, inputs["var"][:2], "--online")
    else:
        argv = train(tmp_path, inputs["var"], *options.split())
    said = refused(capsys, argv)
    assert "holds a run of another configuration" in said and all(name in said for name in names), said
    assert tree(tmp_path) == before


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_note(data: bytes) -> bytes:
    return data.replace(b'"ddfast":', b'"nothin":', 1)


def of_another_format(data: bytes) -> bytes:
    return data.replace(rb"\"format\": 1", rb"\"format\": 7", 1)


@pytest.mark.parametrize("damage", [cut, without_note, of_another_format, lambda data: b""])
def test_a_damaged_checkpoint_is_named_with_the_fix(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    inputs: dict[str, list[str]],
    damage: Callable[[bytes], bytes],
) -> None:
    command = train(tmp_path, inputs["var"], "--save-every", "3")
    assert main(command) == 0
    want = outcome(tmp_path)
    path = checkpoints(tmp_path)[-1]
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    before = tree(tmp_path)
    said = refused(capsys, command)
    assert str(path) in said and "delete it to go on from the one before" in said
    assert tree(tmp_path) == before
    path.unlink()
    assert main(command) == 0
    assert outcome(tmp_path) == want


def test_numbers_that_are_not_finite_exit_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inputs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer.step

    def step(self: Trainer, n: int) -> None:
        if n == 3:
            with torch.no_grad():
                next(iter(self.parameters.values())).fill_(torch.nan)
        plain(self, n)

    monkeypatch.setattr(Trainer, "step", step)
    assert main(train(tmp_path, inputs["var"], "--save-every", "2", "--log-every", "9")) == 1
    said = capsys.readouterr().err
    assert "not finite at step 4; the checkpoint of step 2 is sound" in said and "Traceback" not in said
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002.safetensors"]


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
