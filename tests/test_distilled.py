"""Students with their tokenizers: by name, as a file, in a run's folder; and what does not fit together."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import FAMILIES
from tiny import CHANNELS, VOCAB, random_weights, student_part

import ddfast.models.distilled
import ddfast.models.zoo
from ddfast.errors import UserError
from ddfast.models import STUDENTS, Distilled, load_student, save_student
from ddfast.models.checkpoints import Part, load_bundle, make_part, read_extra, save_bundle
from ddfast.models.llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from ddfast.models.zoo import TOKENIZERS, ZooStudent, read_part
from ddfast.sampling import few_step

Parts = tuple[Part, Part]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def parts(family: str, bundles: dict[str, Path]) -> Parts:
    """A student of each family and its teacher's tokenizer."""
    return student_part(family), load_bundle(bundles[family])[1]["tokenizer"]


def sampled(distilled: Distilled) -> torch.Tensor:
    """Images of two labels in the student's own steps."""
    student, generator = distilled.student, torch.Generator().manual_seed(4)
    noise = torch.randn(2, student.num_tokens, student.channels, generator=generator)
    labels = torch.tensor([0, 4])
    x = few_step(student, labels, noise, distilled.codebook, distilled.timesteps, distilled.split)
    return distilled.images(x)


def test_a_saved_student_comes_back(tmp_path: Path, parts: Parts) -> None:
    path = tmp_path / "run" / "student.safetensors"
    save_student(path, "tiny-dd", *parts, timesteps=(0, 2), split=1, teacher="tiny")
    assert read_extra(path) == {"timesteps": [0, 2], "split": 1, "teacher": "tiny"}
    for source in (path, path.parent):
        got = load_student(source)
        assert (got.name, got.timesteps, got.split, got.device.type) == ("tiny-dd", (0, 2), 1, "cpu")
        assert got.codebook.shape == (VOCAB, CHANNELS) and not got.student.training
        state = got.student.state_dict()
        assert all(torch.equal(state[k], t) for k, t in parts[0].tensors.items())
    images = sampled(load_student(str(path)))
    side = 4 * 3
    assert images.shape == (2, 3, side, side) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images, sampled(load_student(path.parent)))


def test_a_students_dtype_leaves_its_tokenizer_alone(tmp_path: Path, parts: Parts) -> None:
    path = tmp_path / "student.safetensors"
    save_student(path, "tiny-dd", *parts, timesteps=(0,), split=0, teacher="tiny")
    got = load_student(path, dtype=torch.bfloat16)
    assert {p.dtype for p in got.student.parameters()} == {torch.bfloat16}
    assert got.codebook.dtype == torch.float32 and sampled(got).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 20}, "its codebook entries are 24, not 20"),
        ({"codebook_dim": 3}, "its channels are 4, not 3"),
        ({"codebook_dim": 3, "vocab_size": 20}, "entries are 24, not 20; its channels are 4, not 3"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    tmp_path: Path, parts: Parts, family: str, changes: dict[str, int], message: str
) -> None:
    student, path = student_part(family, **changes), tmp_path / "student.safetensors"
    with pytest.raises(UserError, match=f"does not fit tiny-dd: .*{message}"):
        save_student(path, "tiny-dd", student, parts[1], (0, 2), 1, "tiny")
    assert not path.exists()
    extra = {"timesteps": [0, 2], "split": 1, "teacher": "tiny"}
    save_bundle(path, "tiny-dd", {"student": student, "tokenizer": parts[1]}, extra)
    with pytest.raises(UserError, match=f"does not fit tiny-dd: .*{message}"):
        load_student(path)


def test_a_tokenizer_of_another_grid_is_refused(tmp_path: Path, bundles: dict[str, Path]) -> None:
    vqs = {name: load_bundle(path)[1]["tokenizer"] for name, path in bundles.items()}
    config = LlamaGenTokenizerConfig(VOCAB, CHANNELS, 32, (1, 1), z_channels=4, grid=4)
    raster = make_part("llamagen-tokenizer", config, random_weights(LlamaGenTokenizer(config), 0), "test")
    for family, vq, have, need in (
        ("var", vqs["llamagen"], "(3,)", "(1, 2, 3)"),
        ("llamagen", vqs["var"], "(1, 2, 3)", "(3,)"),
        ("llamagen", raster, "(4,)", "(3,)"),
    ):
        with pytest.raises(UserError) as error:
            save_student(tmp_path / "s.safetensors", "tiny-dd", student_part(family), vq, (0, 1), 1, "tiny")
        assert f"its token grids are {have}, not {need}" in str(error.value)
    save_student(tmp_path / "s.safetensors", "x", student_part("llamagen", block_size=16), raster, (0, 1), 1, "tiny")
    assert sampled(load_student(tmp_path / "s.safetensors")).shape == (2, 3, 8, 8)


def test_parts_in_each_others_place_are_refused(tmp_path: Path, parts: Parts) -> None:
    student, tokenizer = parts
    with pytest.raises(UserError, match="digits-tokenizer cannot be a student"):
        save_student(tmp_path / "s.safetensors", "x", tokenizer, tokenizer, (0,), 0, "tiny")
    with pytest.raises(UserError, match="-student cannot be a tokenizer"):
        save_student(tmp_path / "s.safetensors", "x", student, student, (0,), 0, "tiny")


@pytest.mark.parametrize(
    ("timesteps", "split", "message"),
    [((1, 2), 1, "must begin at 0"), ((0, 99), 1, "timestep 99"), ((0, 2), 99, "split 99"), ((0, 2), -1, "split -1")],
)
def test_sampling_that_the_student_cannot_do_is_refused(
    tmp_path: Path, parts: Parts, timesteps: tuple[int, ...], split: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        save_student(tmp_path / "s.safetensors", "x", *parts, timesteps, split, "tiny")


@pytest.mark.parametrize("extra", [None, {"split": 1}, {"timesteps": [0, "2"], "split": 1}, {"timesteps": [0, 2]}])
def test_a_student_that_does_not_say_its_timesteps_is_refused(
    tmp_path: Path, parts: Parts, extra: dict[str, Any] | None
) -> None:
    path = tmp_path / "s.safetensors"
    save_bundle(path, "x", {"student": parts[0], "tokenizer": parts[1]}, extra)
    with pytest.raises(UserError, match=r"s.safetensors does not say its teacher, timesteps and split"):
        load_student(path)


def test_what_is_no_student_says_what_to_do(tmp_path: Path, bundles: dict[str, Path], parts: Parts) -> None:
    with pytest.raises(UserError, match=r"holds no student.safetensors; `ddfast train --out .*` makes one"):
        load_student(tmp_path)
    with pytest.raises(UserError, match="no student is called 'var-dd-d15' .*did you mean var-dd-d16"):
        load_student("var-dd-d15")
    with pytest.raises(UserError, match="nowhere.safetensors does not exist"):
        load_student(tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match="holds no student, only tokenizer, transformer"):
        load_student(bundles["var"])
    (tmp_path / "var-d16.pth").touch()
    with pytest.raises(UserError, match="give the student's name, and this file with --weights"):
        load_student(tmp_path / "var-d16.pth")
    path = tmp_path / "student.safetensors"
    save_bundle(path, "x", {"student": parts[0]})
    with pytest.raises(UserError, match="holds no tokenizer, and x is no released student"):
        load_student(path)
    save_student(path, "x", *parts, (0,), 0, "tiny")
    with pytest.raises(UserError, match="drop --weights"):
        load_student(path, weights=path)
    with pytest.raises(UserError, match="drop --tokenizer"):
        load_student(tmp_path, tokenizer=path)
    with pytest.raises(UserError, match="holds no raw copy of the weights, only ema"):
        load_student(path, copy="raw")


def test_released_weights_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DDFAST_WEIGHTS", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"bring var-d20.pth \(microsoft/distilled_decoding .*--weights"):
        load_student("var-dd-d20")


@pytest.fixture
def released(
    tmp_path: Path, family: str, parts: Parts, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[ZooStudent, Path, dict[str, Part]]:
    """A tiny student in the zoo whose teacher is the tiny one; its file; its copies."""
    raw = student_part(family, seed=8)
    held: dict[str, Any] = {"ema": parts[0].tensors, "model": raw.tensors, "args": argparse.Namespace()}
    if family == "var":
        held = {"trainer": {"ema_parameters": parts[0].tensors, "var_wo_ddp": raw.tensors}, "iter": 5}
    path = tmp_path / "tiny.pth"
    torch.save(held, path)
    entry = ZooStudent("tiny-dd", raw.kind, raw.config, str(bundles[family]), path.name, "nobody", (0, 2), 1)
    monkeypatch.setitem(STUDENTS, entry.name, entry)
    monkeypatch.setenv("DDFAST_WEIGHTS", str(tmp_path))
    return entry, path, {"ema": parts[0], "raw": raw}


def same_weights(distilled: Distilled, part: Part) -> bool:
    state = distilled.student.state_dict()
    return all(torch.equal(state[k], t) for k, t in part.tensors.items())


def test_a_released_student_is_read_by_its_name(released: tuple[ZooStudent, Path, dict[str, Part]]) -> None:
    entry, path, copies = released
    for copy, part in copies.items():
        got = load_student(entry.name, copy=copy)
        assert same_weights(got, part)
        assert (got.name, got.timesteps, got.split) == (entry.name, (0, 2), 1)
        assert same_weights(load_student(entry.name, weights=path, copy=copy), part)
    assert same_weights(load_student(entry.name), copies["ema"])
    assert sampled(load_student(entry.name)).shape == (2, 3, 12, 12)


def test_a_converted_student_keeps_its_copy_and_finds_its_tokenizer(
    tmp_path: Path, released: tuple[ZooStudent, Path, dict[str, Part]]
) -> None:
    entry, _, copies = released
    path = tmp_path / "tiny-dd.safetensors"  # found before the released file
    save_bundle(path, entry.name, {"student": copies["raw"]}, {"copy": "raw"})
    for source in (entry.name, path):
        got = load_student(source, copy="raw")
        assert same_weights(got, copies["raw"]) and (got.timesteps, got.split) == ((0, 2), 1)
        with pytest.raises(UserError, match="holds no ema copy of the weights, only raw; .*--copy raw"):
            load_student(source)
    part = read_part(path, "student", entry.kind, entry.config, "raw")
    assert part.sha256 == copies["raw"].sha256


def test_another_model_in_a_released_students_place_is_refused(
    tmp_path: Path, released: tuple[ZooStudent, Path, dict[str, Part]], bundles: dict[str, Path], family: str
) -> None:
    entry, path, _ = released
    with pytest.raises(UserError, match="holds no student, only tokenizer, transformer"):
        load_student(entry.name, weights=bundles[family])
    other = student_part("llamagen" if family == "var" else "var")
    torch.save({"ema": other.tensors}, path)
    with pytest.raises(UserError, match=f"is not a {entry.kind} of this configuration"):
        load_student(entry.name)


def test_every_released_students_tokenizer_and_sampling_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights: everything on the meta device, as the released shapes have it."""

    def described(path: Path, label: str, kind: str, config: Any, copy: str = "raw", asked: str = "") -> Part:
        return Part(kind, config, {}, "")

    for module in (ddfast.models.zoo, ddfast.models.distilled):
        monkeypatch.setattr(module, "read_part", described)
        monkeypatch.setattr(module, "located", lambda *a: Path("x"))
    built: list[str] = []
    monkeypatch.setattr(Part, "build", lambda self, *a: built.append(self.kind))
    for name, entry in STUDENTS.items():
        got = load_student(name)
        assert (got.name, got.timesteps, got.split) == (name, entry.timesteps, entry.split)
    assert built == ["var-student", "var-tokenizer"] * 3 + ["llamagen-student", "llamagen-tokenizer"] * 2
    wrong = replace(TOKENIZERS["var-vqvae"].config, patch_nums=(1, 2, 3))
    monkeypatch.setattr(ddfast.models.distilled, "load_tokenizer", lambda *a: Part("var-tokenizer", wrong, {}, ""))
    with pytest.raises(UserError, match="does not fit var-dd-d16: its token grids are"):
        load_student("var-dd-d16")
