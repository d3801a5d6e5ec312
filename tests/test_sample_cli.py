"""``ddfast sample``: what it writes, what it goes on from, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddfast.cli import main
from ddfast.errors import UserError
from ddfast.files import check_writable
from ddfast.models import Distilled, Teacher, load_student
from ddfast.models.classes import class_names, name_of, parse_classes
from ddfast.sampling import Drawing, Sampler, few_step_plan, involved_plan, teacher_plan


@pytest.fixture
def student(student_file: Path) -> Path:
    return student_file


def expected(model: Distilled, drawing: Drawing | None, plan: object, labels: list[int], seed: int = 1) -> np.ndarray:
    """Pixels uint8 [N, H, W, 3] by the library."""
    sampler = Sampler(model, drawing)
    images = sampler.images(torch.tensor(labels), sampler.noise(seed, torch.arange(len(labels))), plan)  # type: ignore[arg-type]
    return images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()


def test_plans_of_the_command_line(student: Path, bundle: str, teacher: Teacher, tmp_path: Path) -> None:
    model, groups = load_student(student), len(teacher.groups)
    drawing, out = Drawing(teacher, teacher.preset()), tmp_path / "x.npz"
    ways = {
        "": few_step_plan((0,), groups),
        "--steps 2": few_step_plan((0, 2), groups),
        "--timesteps 0,1,2": few_step_plan((0, 1, 2), groups),
        f"--teacher {bundle} --teacher-groups 1:2": involved_plan(1, 2, groups),
        f"--teacher {bundle} --skip 1": teacher_plan(groups, 1),
    }
    seen = []
    for options, plan in ways.items():
        words = [
            "sample",
            "--student",
            str(student),
            "--num",
            "7",
            "--seed",
            "3",
            "--batch",
            "3",
            "--out",
            str(out),
        ]
        assert main([*words, *options.split()]) == 0
        data = np.load(out)
        assert data["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1]
        difference = data["arr_0"].astype(int) - expected(model, drawing, plan, data["arr_1"].tolist(), 3)
        assert abs(difference).max() <= 1  # rounding of batches
        seen.append(data["arr_0"])
    assert all((a != b).any() for i, a in enumerate(seen) for b in seen[:i])


def test_a_teacher_alone(bundle: str, teacher: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    assert main(["sample", "--teacher", bundle, "--classes", "4,1-2", "--out", str(out)]) == 0
    data, plan = np.load(out), teacher_plan(len(teacher.groups))
    assert data["arr_1"].tolist() == [4, 1, 2]
    sampler = Sampler(drawing=Drawing(teacher, teacher.preset()))
    want = sampler.images(torch.tensor([4, 1, 2]), sampler.noise(1, torch.arange(3)), plan)
    assert (data["arr_0"] == want.mul(255).round().byte().permute(0, 2, 3, 1).numpy()).all()


def test_ordinary_and_guided_sampling_are_options(bundle: str, tmp_path: Path) -> None:
    drawn = []
    for i, options in enumerate(([], ["--ordinary"], ["--guidance", "3"], ["--top-k", "3"])):
        out = tmp_path / f"{i}.npz"
        assert main(["sample", "--teacher", bundle, "--num", "12", "--out", str(out), *options]) == 0
        drawn.append(np.load(out)["arr_0"])
    assert all((a != b).any() for i, a in enumerate(drawn) for b in drawn[:i])


def test_onestep_reads_pairs(student: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = tmp_path / "pairs", tmp_path / "x.npz"
    assert main(["pairs", "--teacher", bundle, "--num", "20", "--out", str(pairs)]) == 0
    assert main(["sample", "--student", str(student), "--onestep", str(pairs), "--num", "6", "--out", str(out)]) == 0
    assert "6 images, onestep*" in capsys.readouterr().out
    assert len({image.tobytes() for image in np.load(out)["arr_0"]}) > 1


def test_a_folder_is_finished_by_the_same_command(student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    words = ["sample", "--student", str(student), "--batch", "4", "--out", str(folder)]
    assert main([*words, "--num", "10"]) == 0
    files = sorted(folder.glob("*.png"))
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(10)]
    before = [f.read_bytes() for f in files]
    with Image.open(files[7]) as image:
        want = expected(load_student(student), None, few_step_plan((0,), 3 if max_group(student) > 1 else 9), [2] * 8)
        assert np.asarray(image).shape == want[7].shape
    for i in (3, 8):
        files[i].unlink()
    kept = files[4].stat().st_mtime_ns
    assert main([*words, "--num", "10"]) == 0
    assert [f.read_bytes() for f in files] == before and files[4].stat().st_mtime_ns == kept
    assert main([*words, "--num", "13"]) == 0
    assert len(list(folder.glob("*.png"))) == json.loads((folder / "sampling.json").read_text())["num"] == 13
    assert [f.read_bytes() for f in files] == before


def max_group(student: Path) -> int:
    return max(load_student(student).student.groups)


def test_a_folder_of_other_images_is_refused(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "samples"
    words = ["sample", "--student", str(student), "--num", "4", "--out"]
    assert main([*words, str(folder)]) == 0
    for options, message in (
        (["--seed", "0"], "seed is 1, not 0"),
        (["--steps", "2"], "way is 1 step, not 2 steps"),
        (["--classes", "1"], "classes is all, not [1]"),
        (["--num", "3"], "is for 4 images; name as many or more"),
        (["--split", "0"], "student.split is 2, not 0"),
        (["--guidance", "2"], "--guidance is about a teacher, which draws nothing here"),
    ):
        assert main([*words, str(folder), *options]) == 2
        assert message in capsys.readouterr().err
    (folder / "sampling.json").write_text("{")
    assert main([*words, str(folder)]) == 2
    assert "sampling.json is damaged" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (4, 4)).save(other / "mine.png")
    assert main([*words, str(other)]) == 2
    assert "holds 'mine.png', but no images of `ddfast sample`" in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["mine.png"]


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddfast.files.os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="may not be written to; choose another place than .*new"):
        check_writable(tmp_path / "new" / "deep")
    check_writable(tmp_path.parent)


def test_ranks_share_a_folder(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sample", "--student", str(student), "--num", "11", "--batch", "2", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert main([*words, str(tmp_path / "two")]) == 0
        counts.append(len(list((tmp_path / "two").glob("*.png"))))
    assert counts == [6, 11]
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert main([*words, str(tmp_path / "x.npz")]) == 2


def test_a_grid_is_labelled(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.png"
    assert main(["sample", "--student", str(student), "--num", "7", "--columns", "3", "--out", str(out)]) == 0
    assert "7 images, 1 step" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.width < 3 * 80 and image.height > 3 * 60


def test_comparing_puts_ways_above_one_another(
    student: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sample",
        "--student",
        str(student),
        "--compare",
        "--classes",
        "0-3",
        "--out",
        str(tmp_path / "c.png"),
    ]
    assert main(words) == 0
    captured = capsys.readouterr().out
    assert "4 samples, 2 steps above 1 step; tiny-" in captured and "is not at hand, so its row is missing" in captured
    with Image.open(tmp_path / "c.png") as image:
        two = image.height
    assert main([*words, "--teacher", bundle, "--teacher-groups", "1:2"]) == 0
    assert "teacher above pre-trained-2-3 above 2 steps above 1 step" in capsys.readouterr().out
    with Image.open(tmp_path / "c.png") as image:
        assert image.height > 1.9 * two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 1 --timesteps 0,2", "--steps and --timesteps are different plans; choose one"),
        ("--steps 3", "was trained on the timesteps 0,2: --steps can be 1 to 2; --timesteps takes any"),
        ("--steps 0", "--steps is 0; it must be at least 1"),
        ("--timesteps 1,2", "timesteps 1,2 must begin at 0 and rise"),
        ("--timesteps 0;2", "--timesteps '0;2' is no list of groups like 0,5"),
        ("--teacher-groups 1:2", "is not in the zoo; name it with --teacher"),
        ("--teacher {bundle} --teacher-groups 2:2", "teacher groups 2:2 are no groups"),
        ("--teacher {bundle} --teacher-groups 12", "'12' is no range of groups like 3:5"),
        ("--teacher {bundle} --skip 99", "skip 99 leaves nothing"),
        ("--teacher {bundle} --skip 1 --top-k 99", "top-k is 99, but tiny-"),
        ("--teacher digits-var --teacher-groups 1:2", "digits-var is not the teacher of tiny-dd"),
        ("--classes 5", "'5' is no class; use numbers or ranges from 0 to 4"),
        ("--num 0", "--num is 0; it must be at least 1"),
        ("--batch 0", "--batch is 0; it must be at least 1"),
        ("--seed -1", "--seed is -1; it must lie in"),
        ("--split 99", "--split 99 is no group of tiny-dd"),
        ("--columns 0", "--columns is 0"),
        ("--copy raw", "raw"),
        ("--compare --steps 2", "no other plan than --teacher-groups"),
        ("--onestep {bundle}", "holds no pairs"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    student: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    out = tmp_path / "grid.png"
    words = ["sample", "--student", str(student), "--out", str(out), *options.format(bundle=bundle).split()]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out x.png", "needs --student or --teacher"),
        ("--teacher digits-var --steps 1 --out x.png", "--steps is a plan of a student"),
        ("--teacher digits-var --weights w.pth --out x.png", "--weights are a student's"),
        ("--teacher var-d16 --out x.png", "name it with --teacher-weights"),
        ("--teacher digits-var --out x.gif", "must end in .png, .jpg, .jpeg, .webp, .npz"),
        ("--teacher digits-var --classes eihgt --out x.png", "did you mean eight?"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_classes_by_number_range_and_name() -> None:
    assert len(set(class_names(1000))) == 1000 and class_names(1000)[207] == "golden retriever"
    assert parse_classes("Golden Retriever, 3-5,goldfish,jack-o'-lantern", 1000) == (207, 3, 4, 5, 1, 607)
    assert parse_classes("3,seven", 10) == (3, 7) and class_names(5) == ()
    assert (name_of(207, 1000), name_of(7, 10), name_of(2, 5)) == ("golden retriever", "7", "2")
    for text in ("1000", "5-3", "998-1000", "golden retriver", "", "-"):
        with pytest.raises(UserError, match=f"--classes {text!r}: .* is no class; use numbers or ranges from 0 to 999"):
            parse_classes(text, 1000)
    with pytest.raises(UserError, match="did you mean golden retriever"):
        parse_classes("golden retriver", 1000)
