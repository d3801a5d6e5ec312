"""What people meet, from public reports: each ends in the right answer or in a sentence, never in a wrong answer."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from said import Free, Said, bundle, done, refused, student
from tiny import student_part, tiny_bundle
from train_helpers import train

from ddfast import files
from ddfast.cli import main
from ddfast.errors import UserError
from ddfast.models import load_student, load_teacher, save_student, zoo
from ddfast.models.checkpoints import Part, expected_shapes, load_bundle, make_part, save_bundle
from ddfast.models.classes import parse_classes
from ddfast.models.zoo import TEACHERS

__all__ = ["bundle", "done", "refused", "student"]  # fixtures


def spoiled(part: Part, value: float) -> Part:
    """The part with one weight that is no number: what an overflow in training, or a damaged copy, leaves."""
    tensors = {key: t.clone() for key, t in part.tensors.items()}
    key = next(name for name, t in tensors.items() if "blocks" in name and t.ndim == 2)
    tensors[key].view(-1)[5] = value
    return make_part(part.kind, part.config, tensors, "test")


# --- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_wherever_a_model_is_used(
    tmp_path: Path, bundle: Path, refused: Said, value: float
) -> None:
    parts = load_bundle(bundle)[1]
    student, teacher, out = tmp_path / "s.safetensors", tmp_path / "t.safetensors", tmp_path / "out"
    save_student(student, "tiny-dd", spoiled(student_part("var"), value), parts["tokenizer"], (0, 2), 2, "tiny-var")
    save_bundle(teacher, "tiny-var", parts | {"transformer": spoiled(parts["transformer"], value)})
    for words in (
        ["sample", "--student", student, "--out", out],
        ["eval", "--student", student, "--digits"],
        ["export", "--student", student, "--to", "onnx", "--out", out],
        ["sample", "--teacher", teacher, "--out", out],
        ["pairs", "--teacher", teacher, "--num", "4", "--out", out],
    ):
        said = refused(*words)
        assert re.search(
            r"part (student|transformer) of .* holds weights that are not finite: 1 of the \d+ in blocks", said
        )
        assert not out.exists()


def test_a_student_that_overflows_in_a_narrow_type_is_told(tmp_path: Path, bundle: Path, refused: Said) -> None:
    """Its weights are finite; what it computes of them in float16 is not."""
    part, tokenizer = student_part("var"), load_bundle(bundle)[1]["tokenizer"]
    large = {k: 60_000 * t.clamp(-1, 1) if k.endswith("ffn.fc2.weight") else t for k, t in part.tensors.items()}
    part = make_part(part.kind, part.config, large, "test")
    path = tmp_path / "s.safetensors"
    save_student(path, "tiny-dd", part, tokenizer, (0, 2), 3, "tiny-var")
    words = ["sample", "--student", path, "--out", tmp_path / "x.npz"]
    assert "the outputs of tiny-dd are not finite" in refused(*words, "--dtype", "float16")
    assert not (tmp_path / "x.npz").exists()
    assert main([*map(str, words), "--dtype", "float32"]) == 0
    beyond = {k: 2 * t for k, t in large.items()}
    save_student(path, "tiny-dd", make_part(part.kind, part.config, beyond, ""), tokenizer, (0, 2), 3, "tiny-var")
    assert "in float16, holds weights that are not finite" in refused(*words, "--dtype", "float16")


@pytest.mark.parametrize("text", ["error code: 1015", "<html>404</html>", "Repository not found"])
def test_a_failed_download_is_told_from_weights(tmp_path: Path, refused: Said, text: str) -> None:
    path = tmp_path / "var_d16.pth"
    path.write_text(text)
    for words in (["convert", path, "--out", tmp_path / "o.safetensors"], weights_of("var-d16", path, tmp_path)):
        said = refused(*words)
        assert "in place of weights" in said and "download it again" in said and str(path) in said


def weights_of(teacher: str, path: Path, folder: Path) -> list[str | Path]:
    return ["pairs", "--teacher", teacher, "--weights", path, "--tokenizer", path, "--num", "2", "--out", folder / "p"]


def test_a_checkpoint_in_the_place_of_a_name_says_where_it_belongs(tmp_path: Path, refused: Said) -> None:
    path = tmp_path / "var_d16.pth"
    path.write_bytes(b"x")
    for option, words in (
        ("--weights", ["pairs", "--num", "2", "--out", tmp_path / "p"]),
        ("--teacher-weights", ["sample", "--out", tmp_path / "x.png"]),
    ):
        assert f"--teacher var-d16 {option} {path}" in refused(*words, "--teacher", path)
    assert "is a teacher, not a student" in refused("sample", "--student", "digits-var", "--out", tmp_path / "x.png")


def test_a_file_of_equal_shapes_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"n_layer": 1, "n_head": 1, "dim": 16, "vocab_size": 8, "num_classes": 3, "multiple_of": 16}
    for name in ("llamagen-b-256", "llamagen-b-384"):
        entry = TEACHERS[name]
        monkeypatch.setitem(zoo.TEACHERS, name, replace(entry, config=replace(entry.config, **small)))
    kind, config = zoo.models()["llamagen-b-256"]
    assert zoo.alike("llamagen-b-256") == ["llamagen-b-256", "llamagen-b-384"]
    weights = {key: torch.zeros(shape) for key, shape in expected_shapes(kind, config).items()}
    files.say_once.cache_clear()
    for file, asked, message in (
        ("c2i_B_256.pt", "llamagen-b-256", None),
        ("c2i_B_256.pt", "llamagen-b-384", "is by its name the file of llamagen-b-256, .*name llamagen-b-256"),
        ("mine.pt", "llamagen-b-384", None),
    ):
        torch.save(weights, tmp_path / file)
        kind, config = zoo.models()[asked]
        if message is None:
            assert zoo.read_part(tmp_path / file, "transformer", kind, config, asked=asked).config == config
        else:
            with pytest.raises(UserError, match=message):
                zoo.read_part(tmp_path / file, "transformer", kind, config, asked=asked)
    assert (
        "mine.pt has the shapes of llamagen-b-256 and of llamagen-b-384; it is taken for llamagen-b-384" in caplog.text
    )
    assert "c2i_B_256" not in caplog.text
    converted = tmp_path / "converted.safetensors"
    assert main(["convert", str(tmp_path / "c2i_B_256.pt"), "--out", str(converted)]) == 0
    with pytest.raises(UserError, match="converted.safetensors holds llamagen-b-256, which has the shapes"):
        zoo.read_part(converted, "transformer", kind, config, asked="llamagen-b-384")


def test_pairs_of_another_teacher_are_refused(tmp_path: Path, bundle: Path, student: Path, refused: Said) -> None:
    """Of equal groups: another seed's weights, and another codebook."""
    other = tiny_bundle(tmp_path / "other.safetensors", "var", seed=7)
    parts = load_bundle(bundle)[1]
    vq = parts["tokenizer"]
    moved = {k: t.flip(0) if k == "quantize.embedding.weight" else t for k, t in vq.tensors.items()}
    save_bundle(
        tmp_path / "moved.safetensors", "tiny-var", parts | {"tokenizer": make_part(vq.kind, vq.config, moved, "")}
    )
    for name, teacher in (("other", other), ("moved", tmp_path / "moved.safetensors")):
        assert main(["pairs", "--teacher", str(teacher), "--num", "20", "--out", str(tmp_path / name)]) == 0
        said = refused("sample", "--student", student, "--onestep", tmp_path / name, "--out", tmp_path / "x.png")
        assert f"pairs in {tmp_path / name} were made by tiny-var, another teacher than tiny-var" in said
        assert "their codebook and tokenizer has the hash" in said and not (tmp_path / "x.png").exists()
        said = refused("sample", "--teacher", bundle, "--onestep", tmp_path / name, "--out", tmp_path / "x.png")
        assert "another teacher than tiny-var" in said


def test_a_students_teacher_is_known_by_its_hash(tmp_path: Path, inputs: dict[str, list[str]], refused: Said) -> None:
    assert main(train(tmp_path / "run", inputs["var"], "--steps", "2")) == 0
    model = load_student(tmp_path / "run")
    assert model.teacher_sha256 == load_teacher(inputs["var"][1]).weights_sha256["transformer"]
    parts = load_bundle(Path(inputs["var"][1]))[1]
    other = load_bundle(tiny_bundle(tmp_path / "o.safetensors", "var", seed=5))[1]
    save_bundle(tmp_path / "mixed.safetensors", "tiny-var", parts | {"transformer": other["transformer"]})
    words = ["sample", "--student", tmp_path / "run", "--teacher-groups", "1:2", "--out", tmp_path / "x.png"]
    assert "is not the teacher of tiny-var-student, which is tiny-var: its weights are others" in refused(
        *words, "--teacher", tmp_path / "mixed.safetensors"
    )
    assert main([*map(str, words), "--teacher", inputs["var"][1]]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0"], "top-p is 0, which for tiny-llamagen keeps one token whatever the noise; use 1 for all"),
        (["--top-k", "1"], "top-k is 1: every pair of a class would have the same tokens"),
        (["--temperature", "1e-5"], "pairs of shard 0 have the tokens of their class, whatever their noise"),
    ],
)
def test_settings_that_make_every_pair_the_same_are_refused(
    tmp_path: Path, bundles: dict[str, Path], refused: Said, options: list[str], message: str
) -> None:
    words = ["pairs", "--teacher", bundles["llamagen"], "--num", "40", "--out", tmp_path / "p", *options]
    said = refused(*words)
    assert message in said and not list(tmp_path.rglob("shard-*"))


# --- classes


def test_names_of_classes_mean_what_they_say() -> None:
    assert parse_classes("Cardigan,cardigan,n02099601,Golden_Retriever, golden  retriever ,3-5", 1000) == (
        *(264, 474, 207, 207, 207),
        *(3, 4, 5),
    )
    for text, message in (
        ("CARDIGAN", r"may be Cardigan \(264\) and cardigan \(474\); write one of these"),
        ("cat", "did you mean tiger cat or Persian cat"),
        ("n99999999", "none of the 1000 names is like it"),
        ("golden retriver", "did you mean golden retriever"),
        ("0-99999999999", "numbers or ranges from 0 to 999"),
        ("²", "is no class"),
        ("", "is no class"),
    ):
        with pytest.raises(UserError, match=message) as error:
            parse_classes(text, 1000)
        assert len(str(error.value)) < 300


# --- numbers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pairs --num 1000000000000 --out OUT", "the missing shards need about .* TiB"),
        ("pairs --num 100000000000000000000 --out OUT", "num is 100000000000000000000; it must be at most 2.48"),
        ("pairs --num 8 --shard-size 100000000000000000000 --out OUT", "shard-size is 100000000000000000000"),
        ("pairs --num 8 --labels 0-99999999999 --out OUT", "use numbers or ranges from 0 to 4"),
        ("sample --num 100000000000000000000 --out OUT", "--num is 100000000000000000000; .* at most 1,000,000,000"),
        ("sample --num 900000000 --out OUT.npz", "900000000 images need about .* free; .*name fewer with --num"),
        ("sample --num 900000000 --out OUT", "900000000 pictures need about"),
        ("sample --num 20000000 --out OUT.png", "more than a picture is good for"),
        ("sample --num 20 --batch 100000000000 --out OUT.png", "--batch is 100000000000"),
        ("eval --num 900000000 --digits", "the features of 900,000,000 samples need"),
    ],
)
def test_numbers_with_some_zeros_too_many(
    tmp_path: Path, bundle: Path, refused: Said, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.setattr("ddfast.files.shutil.disk_usage", lambda path: Free(10 << 30))
    monkeypatch.setattr("ddfast.cli.eval.free_bytes", lambda device: 10 << 30)
    teacher = "digits-var" if words.startswith("eval") else str(bundle)
    command, *options = words.replace("OUT", str(tmp_path / "out")).split()
    assert re.search(message, refused(command, "--teacher", teacher, *options))
    assert not list(tmp_path.iterdir())


def test_grids_beyond_their_format_are_refused_before_work(tmp_path: Path, bundle: Path, refused: Said) -> None:
    words = ["sample", "--teacher", bundle, "--ordinary", "--num"]
    said = refused(*words, "2000", "--out", tmp_path / "a.webp")
    assert "make a grid of 764x18404 pixels, and WEBP ends at 16383: use more --columns" in said
    assert "JPEG ends at 65500" in refused(*words, "8000", "--out", tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())
