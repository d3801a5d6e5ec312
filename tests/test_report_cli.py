"""``ddfast report``: what a study measures, and the page of digits from nothing."""

from __future__ import annotations

from pathlib import Path

import gpu_sample
import pytest
import torch
from _common import RESULTS
from engine_helpers import FAMILIES
from evaluation_helpers import small_reference
from gpu_cases import Ceilings
from torch import Tensor

from ddfast.cli import main
from ddfast.errors import UserError, WorkError
from ddfast.evaluation.features import Features, load_digits_features
from ddfast.evaluation.reference import Reference, load_reference
from ddfast.evaluation.statistics import FeatureStatistics
from ddfast.models import Distilled, Teacher, load_student, load_teacher
from ddfast.report import read_report
from ddfast.report.digits import DigitsPlan, prepare
from ddfast.report.run import Examiner, Settings, Subject, usual_involved, usual_skips
from ddfast.sampling import Drawing, involved_plan, passes, teacher_plan

__all__ = ["small_reference"]  # a fixture


def test_usual_plans_are_those_of_the_paper_or_near() -> None:
    """LlamaGen's pre-trained-1-81, 41-81 and 61-81; VAR's skip-1 and skip-2."""
    assert usual_involved((0, 80), 256)[:3] == ((0, 80), (40, 80), (60, 80))
    assert usual_involved((0, 5), 10) == ((0, 5), (2, 5), (3, 5), (5, 10))
    assert usual_involved((0, 1), 4) == ((0, 1), (1, 4)) and usual_involved((0,), 4) == ()
    assert usual_skips(10) == (1, 2) and usual_skips(256) == (26, 52) and usual_skips(2) == (1,)
    for timesteps, groups in (((0, 80), 256), ((0, 2), 4), ((0, 5), 10)):
        for span in usual_involved(timesteps, groups):
            assert 1 < passes(involved_plan(*span, groups)) < groups


class Bright:
    """A network of one feature, the mean brightness, for images of any size."""

    name, distance = "brightness", "FD"
    num_features, num_spatial, num_classes, names_labels = 2, 0, 2, False
    side = None
    device = torch.device("cpu")

    def facts(self) -> dict[str, object]:
        return {"network": "brightness"}

    def __call__(self, images: Tensor) -> Features:
        x = images.float().flatten(1) / 255
        pool = torch.stack([x.mean(1), x.var(1)], dim=1)
        return Features(pool, None, pool)


def nowhere(*_: object) -> Reference:
    """A reference for :class:`Bright`."""
    zero = FeatureStatistics(torch.zeros(2).double(), torch.eye(2).double(), 100)
    return Reference(zero, None, None, "none are there", {"path": "nowhere"})


@pytest.fixture
def student(student_file: Path) -> Distilled:
    return load_student(student_file)


def test_every_way_is_measured_for_every_seed(teacher: Teacher, student: Distilled, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    settings = Settings(num=40, teacher_num=60, batch=16, time_batches=(1, 3), seed=5)
    subject = Subject([student, student], Drawing(teacher, teacher.preset()), by_pairs={100: [student]})
    made = Examiner(subject, settings, Bright(), nowhere(), lambda *a: told.append(a)).study(tmp_path, {"dtype": "f"})  # type: ignore[arg-type]
    names = [row.name for row in made.rows]
    groups = len(teacher.groups)
    skips = [f"skip-{n}" for n in usual_skips(groups)]
    assert (
        names[:4] == ["teacher", "teacher, by the flow", "DD, 1 step", "DD, 2 steps"] and names[-len(skips) :] == skips
    )
    assert [row.kind for row in made.rows[:4]] == ["teacher", "teacher", "student", "student"]
    assert [row.passes for row in made.rows[:4]] == [groups, groups, 1, 2]
    for row in made.rows:
        assert set(row.values) == {"FD", "FD_T", "IS"} and set(row.ms_per_image) == {"1", "3"}
        assert all(len(values) == 2 and values[0] != values[1] for values in row.values.values())
    assert [(p.x, p.way) for p in made.pairs] == [(100, "1 step"), (100, "2 steps")] and not made.training
    assert (tmp_path / next(iter(made.pictures.values()))).stat().st_size > 500
    assert made.facts["noise"] == "seeds 5 to 6" and made.facts["samples"] == 40 and made.facts["dtype"] == "f"
    assert {total for _, _, total in told} == {40, 60}


@pytest.mark.usefixtures("small_reference")
def test_a_teachers_distance_to_itself_is_that_of_its_noise() -> None:
    """FD_T compares with other samples than those of the row: small, and not zero."""
    teacher = load_teacher("digits-llamagen")
    extractor = load_digits_features()
    reference = load_reference("digits", extractor)
    model = teacher.new_student(torch.Generator().manual_seed(0)).requires_grad_(False).eval()
    student = Distilled("random", model, teacher.tokenizer, teacher.name, (0, 4), 4, "", "")
    settings = Settings(num=500, teacher_num=2000, batch=500, time_batches=())
    subject = Subject([student], Drawing(teacher, teacher.preset()))
    examiner = Examiner(subject, settings, extractor, reference, lambda *a: None)
    found = examiner.figures("teacher", examiner.samplers(ordinary=True), teacher_plan(16))
    assert 0.1 < found["FD_T"][0] < 0.6 and found["accuracy"][0] > 0.95
    flow = examiner.figures("flow", examiner.samplers(), teacher_plan(16))
    assert flow["FD_T"][0] == pytest.approx(found["FD_T"][0], rel=0.5)


@pytest.mark.slow  # what it makes, `ddfast pairs` and `ddfast train`, and what it measures, a study, are tested alone
def test_digits_from_nothing(tmp_path: Path) -> None:
    """A run too short for the paper's order, which the published report is held to below."""
    words = ["report", "digits", "--teachers", "digits-llamagen", "--num-pairs", "300", "--steps-scale", "0.03"]
    words += ["--num", "300", "--time-batches", "1", "--teacher-groups", "3:5", "--skip", "2"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    (study,) = read_report(tmp_path / "report.json").studies
    fd = {row.name: row.values["FD"][0] for row in study.rows}
    assert list(fd)[2:] == ["DD, 1 step", "DD, 2 steps", "pre-trained-4-6", "skip-2", "onestep*"]
    assert fd["teacher"] < fd["onestep*"] < fd["skip-2"] and fd["teacher"] < fd["DD, 1 step"]
    curve = {point.x: point.values["FD"][0] for point in study.training if point.way == "1 step"}
    assert list(curve) == [12, 24, 36, 48, 60] and curve[60] < curve[12]
    assert curve[60] == pytest.approx(fd["DD, 1 step"], rel=1e-3)
    assert [p.x for p in study.pairs if p.way == "1 step"] == [30, 90, 300]
    page = (tmp_path / "report.html").read_text()
    assert "digits-llamagen" in page and page.count("data:image/png") >= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_a_study_of_its_own(
    inputs: dict[str, list[str]], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints make the curve over training; a run on other pairs makes that over their number."""
    run = ["--steps", "4", "--batch", "8", "--holdout", "16", "--recipe", "digits", "--save-every", "2"]
    words = ["train", *inputs[family], *run, "--out", str(tmp_path / "run")]
    assert main([*words, "--timesteps", "0,2"]) == 0
    monkeypatch.setattr("ddfast.cli.eval.load_digits_features", Bright)
    monkeypatch.setattr("ddfast.cli.report.load_reference", nowhere)
    how = ["--teacher", inputs[family][1], "--student", str(tmp_path / "run"), "--pairs", inputs[family][3], "--digits"]
    how += ["--num", "20", "--batch", "10", "--time-batches", "1", "--teacher-groups", "1:2", "--skip", "1"]
    assert main(["report", *how, "--by-pairs", str(tmp_path / "run"), "--out", str(tmp_path / "page")]) == 0
    (study,) = read_report(tmp_path / "page" / "report.json").studies
    assert [row.name for row in study.rows][4:] == ["pre-trained-2-3", "skip-1", "onestep*"]
    assert [(p.x, p.way) for p in study.training][::2] == [(2, "1 step"), (4, "1 step")]
    assert {p.x for p in study.pairs} == {134}
    last = next(row for row in study.rows if row.name == "DD, 1 step").values["FD"]
    assert study.training[2].values["FD"] == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "needs `digits`, or --teacher and --student"),
        ("--teacher digits-var", "needs `digits`, or --teacher and --student"),
        ("digits --teacher digits-var", "--teacher goes with --teacher and --student"),
        ("digits --teachers digits-vra", "digits-vra does not ship with ddfast"),
        ("digits --seeds 0", "--seeds is 0"),
        ("digits --num-pairs 3", "--num-pairs is 3; it must be at least 100"),
        ("digits --steps-scale 0", "--steps-scale is 0"),
        ("digits --num 1", "--num is 1; it must be at least 2"),
        ("digits --time-batches 0", "'0' is no list of batches"),
        ("digits --teacher-groups 3", "'3' is no range of groups"),
        ("--teacher digits-var --student x --seeds 2 --digits", "--seeds goes with `ddfast report digits`"),
        ("--teacher digits-var --student x", "needs --reference"),
        ("--teacher digits-var --student x --digits", "no student is called 'x'"),
    ],
)
def test_what_makes_no_report_is_refused(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *words.split(), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_a_command_that_fails_says_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddfast.report.digits.SMALLER", ())  # one command
    plan = DigitsPlan(tmp_path, ("digits-var",), 100, 1, 1.0)
    plan.pairs_folder("digits-var", 100).parent.mkdir()
    plan.pairs_folder("digits-var", 100).write_text("in the way")
    with pytest.raises(WorkError, match=r"(?s)pairs of digits-var, 100 failed \(\d\): ddfast pairs .*digits-var-100"):
        prepare(plan, lambda name: None)
    with pytest.raises(UserError, match="steps-scale is 101"):
        DigitsPlan(tmp_path, ("digits-var",), 100, 1, 101)


@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_the_published_report_holds_to_the_papers_order(name: str) -> None:
    """For every seed: teacher < Alg. 4 <= DD-2 < DD-1 << onestep*, of whose distance to the teacher DD-1 closes 80%."""
    report = read_report(RESULTS / "report-digits.json")
    study = next(study for study in report.studies if study.teacher == name)
    rows = {row.name: row.values["FD"] for row in study.rows}
    involved = [values for way, values in rows.items() if way.startswith("pre-trained")]
    assert len(involved) >= 3 and study.facts["seeds"] >= 3 and study.facts["samples"] >= 5000
    for seed in range(study.facts["seeds"]):
        teacher, one, two, independent = (
            rows[way][seed] for way in ("teacher", "DD, 1 step", "DD, 2 steps", "onestep*")
        )
        assert all(teacher < values[seed] <= two for values in involved) and two < one < independent / 2
        assert 1 - (one - teacher) / (independent - teacher) >= 0.8


def test_sampling_is_measured_by_every_plan() -> None:
    case = gpu_sample.sample_cases()[0]
    row = gpu_sample.measure_case(case, Ceilings(1e10, 2e12), torch.device("cpu"))
    assert row["name"] == "sample digits-var batch 64" == gpu_sample.line(row)[:26]
    assert list(row["ms_per_image"]) == ["1 step", "2 steps", "pre-trained-2-3", "teacher"]
    assert row["times_teacher"]["teacher"] == 1 and 0 < row["decoding_ms_per_image"] and row["share_of_matmul_peak"] > 0
    assert gpu_sample.line({"name": "x", "problem": "out of time"}).endswith("out of time")
