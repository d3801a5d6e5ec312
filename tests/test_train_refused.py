"""What ``ddfast train`` refuses before any step, naming what differs and the fix; and runs that cannot go on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_helpers import PLAIN, Launcher, checkpoints, outcome, refused, train, tree

from ddfast.cli import main
from ddfast.models import load_student
from ddfast.models.checkpoints import load_bundle, make_part, save_bundle
from ddfast.models.distilled import save_student
from ddfast.training import Trainer


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
    return data.replace(rb"\"format\": 2", rb"\"format\": 7", 1)


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
