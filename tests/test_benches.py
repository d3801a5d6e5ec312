"""The benches themselves, at toy sizes on a CPU: that their figures are there, and that failures are told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_flow
import bench_layers
import bench_pairs
import bench_solvers
import bench_train
import flow_cases
import gpu
import gpu_cases
import gpu_train
import naive
import pytest
import torch
from flow_helpers import one_thread  # noqa: F401 - a fixture
from gpu_pairs import count_work

from ddfast import _native, ops
from ddfast.flow import DEFAULT_NFE, LogitFilter, filter_logits, make_solver
from ddfast.flow.tokens import guide
from ddfast.models import load_teacher
from ddfast.training import Run

BENCHES = Path(bench_flow.__file__).parent
CPU = torch.device("cpu")
SMALL = flow_cases.Setting(("small", "small-c4"), LogitFilter(top_k=20, top_p=0.9), 1.5)
PEAKS = {"gflop_per_s": 100.0, "read_gb_per_s": 10.0}
needs_native = pytest.mark.skipif(not _native.available(), reason="ddfast._C is not built")


# What is measured


def test_guided_problems_are_what_they_were_made_from() -> None:
    one, two = (flow_cases.guided_problem("small", 30, seed, 1.5) for seed in (1, 2))
    again = flow_cases.guided_problem("small", 30, 1, 3.0)
    assert torch.equal(one.noise, again.noise) and not torch.equal(one.noise, two.noise)
    logits = guide(one.cond, one.uncond, 1.5)
    torch.testing.assert_close(logits, guide(again.cond, again.uncond, 3.0), rtol=1e-4, atol=1e-4)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    assert 1.1 < entropy.exp().min() and entropy.exp().max() < 41
    more = one.repeat(70, seed=3)
    assert torch.equal(more.cond[60:], one.cond[:10]) and not torch.equal(more.noise[30:60], more.noise[:30])


@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_solvers_are_judged_on_a_teacher_s_own_distributions(name: str) -> None:
    figures = bench_solvers.judge_teacher(name, 20, seed=1)
    assert figures.keys() == DEFAULT_NFE.keys()
    agreed = {solver: by_nfe[str(DEFAULT_NFE[solver])]["agreement_percent"] for solver, by_nfe in figures.items()}
    assert 98 < agreed["adams"] <= agreed["precise"] and agreed["dpmpp-3m"] < 60 < agreed["euler"]


@pytest.mark.parametrize("rule", ["var", "llamagen"])
@pytest.mark.parametrize(("k", "p"), [(0, None), (20, None), (0, 0.8), (20, 0.9)])
def test_the_plain_formulation_is_right(rule: str, k: int, p: float | None) -> None:
    problem, keep = flow_cases.guided_problem("small", 200, 4, 1.5), LogitFilter(0.9, k, p, rule)
    logits = guide(problem.cond, problem.uncond, 1.5)
    assert torch.equal(naive.filter_logits(logits, keep) > -torch.inf, filter_logits(logits, keep) > -torch.inf)
    got = naive.flow_tokens(*problem.tensors, guidance=1.5, filter=keep, rows=64)
    want = ops.flow_tokens(*problem.tensors, guidance=1.5, filter=keep, solver=make_solver())
    assert (got == want).double().mean() > 0.8
    for nearest in (naive.nearest_cdist, naive.nearest_matmul):
        assert torch.equal(nearest(problem.noise, problem.codebook, 64), ops.nearest_code(*problem.tensors[2:]))


def test_work_is_counted() -> None:
    """With nothing pruned, no token done early and two knots, every evaluation looks at every kept code."""
    problem = flow_cases.guided_problem("small", 50, 5, SMALL.guidance)
    solver = replace(make_solver("adams", 2), prune=0.0, certain=0.0, pair=0.0)
    keep = LogitFilter(top_k=20)
    work = flow_cases.count_work(problem, replace(SMALL, filter=keep), solver)
    assert work == flow_cases.Work(evaluations=2.0, kept=20.0, after_top_k=0.0, looked_at=40.0)
    assert work.flop(64, 8) == 3 * 64 + 20 * (2 * 8 + 26) + 40 * (4 * 8 + 20)
    pruned, whole = (
        flow_cases.count_work(problem, SMALL, s) for s in (make_solver(), replace(make_solver(), prune=0.0))
    )
    assert pruned.after_top_k == 20 and pruned.looked_at < whole.looked_at


# On a CPU


@needs_native
def test_exactness_counts_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = bench_flow.exactness(SMALL, SMALL.families, 20, seed=6)
    assert exact == {"rows": 40, "kept_sets_percent": 100.0, "tokens_percent": 100.0, "ties": []}
    real = bench_flow.fused
    monkeypatch.setattr(bench_flow, "fused", lambda *given: real(*given).index_fill_(0, torch.tensor([3]), 0))
    exact = bench_flow.exactness(SMALL, SMALL.families[:1], 20, seed=6)
    assert exact["tokens_percent"] == 95.0 and exact["ties"] == [None]


def test_a_tie_is_told_by_the_least_move_of_the_noise() -> None:
    """Between two codes as likely, the noise decides on a plane: 3e-5 from it, 1e-4 is the least nudge that tells."""
    logits, codebook = torch.zeros(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    noise = torch.tensor([3e-5, 0.4])
    options = (codebook, LogitFilter())
    assert bench_flow.least_nudge(logits, noise, *options, token=torch.tensor(0)) == 1e-6
    assert bench_flow.least_nudge(logits, noise, *options, token=torch.tensor(1)) == 1e-4
    assert bench_flow.least_nudge(logits, noise + 2, *options, token=torch.tensor(1)) is None


@needs_native
def test_flow_bench_has_every_figure(tmp_path: Path) -> None:
    speed = bench_flow.speed(SMALL, 8, 1, 7, PEAKS)
    paths = {"plain torch", "bfloat16 logits", "two threads", *_native.cpu_levels()}
    assert set(speed["microseconds_a_token"]) == paths
    for times in speed["microseconds_a_token"].values():
        assert 0 < times["min"] <= times["median"]
    assert 0 < speed["floor_us"] and set(speed["by_family_us"]) == set(SMALL.families)
    assert len(speed["work_a_token"]) == 2 and speed["times_plain_torch"] > 0
    figures: dict[str, Any] = {
        "exactness": {"var": {"kept_sets_percent": 100.0, "tokens_percent": 99.0}},
        "speed": {"var": speed | {"times_plain_torch": 16.0}},
        "memory_mb": {"1000": 65.0},
    }
    held = {bar["name"]: bar["held"] for bar in bench_flow.bars(figures)}
    assert held["var: kept sets as in float64 (%)"] and not held["var: tokens as in float64 (%)"]
    assert held["var: times plain torch"] and not held["extra memory of 1000 rows (MB)"]
    pytest.importorskip("matplotlib")
    bench_flow.plot(figures, tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 0


def test_the_floor_is_arithmetic_and_reading() -> None:
    """2e5 FLOP at 100 GFLOP/s take 2 us; two rows of 64 float32 logits at 10 GB/s 0.0512 us."""
    assert bench_flow.floor_us(2e5, SMALL, 4, PEAKS) == pytest.approx(2.0512)


@needs_native
def test_operations_alone() -> None:
    alone = bench_flow.filter_speed(SMALL, 20, 1, 8), bench_flow.nearest_speed(30, 64, 8, 1)
    assert all(figures["times_plain_torch"] > 0 for figures in alone)
    peaks = bench_flow.measure_peaks(1)
    assert peaks["gflop_per_s"] > 0 and peaks["read_gb_per_s"] > 0


def test_extra_memory_is_measured() -> None:
    pytest.importorskip("resource")
    assert 0 <= bench_flow.extra_megabytes(3000, vocab=2048, channels=4) <= 64


# What make gpu runs


def measured(cases: list[gpu_cases.Case], monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> list[dict[str, Any]]:
    """What ``measure_all`` reports on the CPU, with ceilings measured at toy sizes."""
    small = partial(gpu_cases.measure_ceilings, megabytes=1, size=64)
    monkeypatch.setattr(gpu, "measure_ceilings", small)
    rows: list[dict[str, Any]] = []
    assert gpu.measure_all(cases, gpu_cases.Clock(CPU, flush_megabytes=1), seconds, rows.append) == 0
    return rows


def test_every_kind_of_case_runs_and_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(list(gpu_cases.toy_cases()), monkeypatch)
    kinds = [case.name.split()[0] for case in gpu_cases.all_cases()]
    assert {row["name"].split()[0] for row in rows} == set(kinds)
    for row in rows:
        assert row["agreement_percent"] == 100 and row["times_ceiling"] > 0 and row["times_plain"] > 0
        assert len(row["us"]) >= 2 and all(0 < t["p20"] <= t["p50"] <= t["p80"] for t in row["us"].values())
        assert row["times_read_once"] >= row["times_ceiling"]
    json.dumps(rows)
    assert "100.00% as on the CPU" in gpu.line(rows[0])


def test_real_cases_have_names_of_their_own() -> None:
    names = [case.name for case in gpu_cases.all_cases()]
    assert len(set(names)) == len(names) and names[0] == "flow var 43520 rows bfloat16"


def test_a_case_that_fails_is_told_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(device: torch.device) -> gpu_cases.Prepared:
        raise RuntimeError("out of\nshared memory")

    cases = [gpu_cases.Case("broken", fail), next(iter(gpu_cases.toy_cases()))]
    rows = measured(cases, monkeypatch)
    assert rows[0] == {"name": "broken", "problem": "RuntimeError: out of\nshared memory"} and "us" in rows[1]
    late = measured(cases, monkeypatch, seconds=-1)
    assert [row["problem"] for row in late] == ["out of time"] * 2
    monkeypatch.setattr(gpu_cases.Clock, "works", lambda clock: False)
    reported: list[dict[str, Any]] = []
    assert gpu.measure_all(cases, gpu_cases.Clock(CPU, 1), 60, reported.append) != 0
    assert reported == rows[:1]
    tuned = [{"operation": "flow", "problem": "out of time"}, {"operation": "nearest", "problem": "no GPU"}]
    tests = {"passed": 2, "failed": 1, "skipped": 0, "failures": ["tests.a::test_b"], "seconds": 1.0}
    figures: dict[str, Any] = {"hardware": {"gpu": "a GPU"}, "tests": tests, "benches": rows + late, "tuned": tuned}
    figures["failures"] = gpu.failures(figures)
    assert sum("out of time" in failure for failure in figures["failures"]) == 2
    gpu.print_report(figures)
    printed = capsys.readouterr().out
    for line in ("tests: 2 passed, 1 failed, 0 skipped", "failed: tests.a::test_b", "tuning nearest: no GPU"):
        assert line in printed
    assert "out of" in printed and "shared memory" in printed


def test_a_process_that_dies_is_started_again_at_the_next_case() -> None:
    """Case 0 works, 1 ends the process (as a segmentation fault does), 2 breaks the device, 3 works."""
    script = """
import json, sys
first, _, path = sys.argv[1:]
def report(**row):
    open(path, "a").write(json.dumps(row) + chr(10))
for case in range(int(first), 4):
    if case == 1:
        sys.exit(-11)
    report(name=f"case {case}")
    if case == 2:
        sys.exit(3)
"""
    saved: list[list[str]] = []
    until, command = time.monotonic() + 60, [sys.executable, "-c", script]
    names = [f"case {i}" for i in range(4)]
    rows: list[dict[str, Any]] = []

    def save(so_far: list[dict[str, Any]]) -> None:
        saved.append([row["name"] for row in so_far])
        rows[:] = so_far

    gpu.run_benches(names, until, save, command)
    assert saved == [names[:2], names[:3], names]
    assert [row.get("problem") for row in rows] == [None, "the process ended with 245", None, None]


def test_bars_of_the_var_flow() -> None:
    name = "flow var 43520 rows float32"
    rows = [{"name": name, "us": {}, "times_read_once": 1.9, "times_plain": 49.0}, {"name": name, "problem": "x"}]
    assert [(bar["value"], bar["held"]) for bar in gpu.bars(rows)] == [(1.9, True), (49.0, False)]


def test_tests_are_run_and_counted(tmp_path: Path) -> None:
    source = """
import pytest
def test_good(): pass
@pytest.mark.parametrize("x", [1, 2])
def test_bad(x): assert x == 2
@pytest.mark.skip
def test_skipped(): pass
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
"""
    (tmp_path / "test_it.py").write_text(source)
    (tmp_path / "test_dies.py").write_text("import os\ndef test_good(): pass\ndef test_dies(): os._exit(9)\n")
    files = [tmp_path / "test_dies.py", tmp_path / "test_it.py"]
    counts = gpu.run_tests(60, files, ())
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 2, 1)
    names = sorted(name.split("::")[1] for name in counts["failures"])
    assert [name.partition(":")[0] for name in names] == ["test_bad[1]", "test_error"] and "assert 1 == 2" in names[0]
    assert counts["problem"] == "test_dies.py: pytest ended with 9" and set(counts["seconds"]) == {
        "test_dies",
        "test_it",
    }
    assert gpu.failures({"tests": counts})[-2:] == [f"failed: {name}" for name in counts["failures"]]


def test_tests_that_take_too_long_are_interrupted_and_the_finished_ones_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, wait = tmp_path / "started", gpu._wait

    def wait_once_started(run: Any, until: float) -> bool:
        while not started.exists():
            time.sleep(0.05)
        return wait(run, time.monotonic())

    source = f"import time\ndef test_good(): pass\ndef test_hangs(): open({str(started)!r}, 'w'); time.sleep(60)\n"
    (tmp_path / "test_it.py").write_text(source)
    monkeypatch.setattr(gpu, "_wait", wait_once_started)
    counts = gpu.run_tests(60, [tmp_path / "test_it.py"], ())
    assert (counts["passed"], counts["failed"]) == (1, 0)
    assert counts["problem"] == "test_it.py took more than 60 s"


def test_gpu_tests_are_found() -> None:
    names = {path.name for path in gpu.test_files()}
    assert {"test_layers_cuda.py", "test_kernels.py", "test_graphs.py", "test_linear.py"} <= names
    assert not names & {"test_benches.py", "test_cli.py"}


def test_names() -> None:
    assert gpu.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert gpu.output_of(["no-such-program"]) is None
    assert gpu.output_of([sys.executable, "-c", "print('release 13.0, V13')"], r"release ([\d.]+)") == "13.0"
    assert {"cpu", "driver", "versions", "commit"} <= set(gpu.about("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["make", "gpu", f"PYTHON={sys.executable}"], [sys.executable, "benches/gpu.py"]])
def test_without_a_gpu_nothing_is_started(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    run = subprocess.run(command, capture_output=True, text=True, cwd=BENCHES.parent)
    assert run.returncode != 0 and "CUDA device" in run.stderr and "cmake" not in run.stdout


def test_all_stages_end_in_one_file_and_a_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    row = {"name": "flow var 43520 rows bfloat16", "us": {"fused": {"p50": 300.0}}, "agreement_percent": 99.9}
    row |= {"times_ceiling": 1.5, "times_read_once": 1.5, "times_plain": 80.0}
    counts = {"passed": 5, "failed": 0, "skipped": 0, "failures": [], "seconds": 1.0}
    untils: list[float] = []
    given: dict[str, Any] = {
        "run_tests": lambda seconds: counts,
        "run_benches": lambda names, until, save, command: (untils.append(until), save([row])),
        "run_tuning": lambda problems, until, save: save([{"operation": "flow", "rows": 8}]),
        "about": lambda device: {"gpu": "Toy GPU"},
        "RESULTS": tmp_path,
    }
    for name, value in given.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy GPU")
    monkeypatch.setattr(_native, "cuda_built", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 0
    figures = json.loads((tmp_path / "gpu-toy-gpu.json").read_text())
    assert figures["tests"] == counts and figures["failures"] == []
    assert figures["benches"] == figures["pairs"] == figures["train"] == [row]
    assert [b - a for a, b in zip(untils, untils[1:], strict=False)] == pytest.approx(list(gpu._KEPT.values()))
    assert [bar["held"] for bar in figures["bars"]] == [True, True] and figures["tuned"][0]["rows"] == 8
    assert capsys.readouterr().out.rstrip().endswith("tests: 5 passed, 0 failed, 0 skipped")
    counts["failures"] = ["test_x"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "tests", "--out", str(tmp_path / "some" / "other.json")])
    assert gpu.main() == 1
    assert set(json.loads((tmp_path / "some" / "other.json").read_text())) & {"benches", "tuned"} == set()


# Pairs


@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_pairs_are_set_beside_their_own_matrix_products(name: str) -> None:
    teacher = load_teacher(name)
    row = bench_pairs.timed_pairs(teacher, "release", batch=3, rounds=2, batches=2)
    work = count_work(teacher.transformer.config)  # all but the word embedding
    assert row["gemm_gflop_per_pair"] == pytest.approx(work.gemm_flop / 1e9, rel=0.02)
    assert row["pairs"] == 12 and row["time_over_gemm"] > 1 and len(row["time_over_gemm_of_rounds"]) == 2
    assert 0 < row["flow_s_per_pair"] < row["s_per_pair"] == pytest.approx(1 / row["pairs_per_s"])
    assert row["dtype"] == "float32" and row["guidance"] == teacher.preset("release").guidance


def test_endurance_reports_speed_and_memory() -> None:
    figures = bench_pairs.endurance(0.04)
    assert figures["shards"] >= 1 and figures["minutes"]
    assert all(row["pairs_per_s"] > 0 and row["rss_mib"] > 50 for row in figures["minutes"])


# Training


def linear_products(name: str, batch: int) -> float:
    """6 x rows x weights of every linear layer of a bundled teacher's student, in GFLOP, by its place in the model."""
    student = load_teacher(name).new_student(torch.Generator().manual_seed(0))
    tokens, total = batch * student.num_tokens, 0
    in_blocks = {id(m) for m in student.stack.modules()}
    for place, m in student.named_modules():
        if isinstance(m, torch.nn.Linear):
            rows = batch + tokens if id(m) in in_blocks else tokens  # the condition has a position in the blocks
            rows = batch if "ada_lin" in place else 2 if "layerwise" in place else rows
            total += 6 * rows * m.weight.numel()
    return total / 1e9


@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_training_steps_are_set_beside_the_products_of_their_linear_layers(name: str) -> None:
    whole, parts = (bench_train.timed_steps(load_teacher(name), 6, Run(micro_batch=m), 1, steps=2) for m in (None, 3))
    assert whole["products_gflop"] == pytest.approx(linear_products(name, 6))
    twice = 2 * linear_products(name, 3)  # VAR's two markings pass through their layers in each part
    assert parts["products_gflop"] == pytest.approx(twice) and (whole["micro_batch"], parts["micro_batch"]) == (6, 3)
    for row in (whole, parts):
        assert row["steps"] == 2 and row["pairs_per_s"] == pytest.approx(6 / row["s_per_step"])
        assert row["time_over_products"] == pytest.approx(row["s_per_step"] / row["products_s"])
        assert row["products_gflop_per_s"] == pytest.approx(row["products_gflop"] / row["products_s"])
        assert row["mfu"] == pytest.approx(
            row["pairs_per_s"] * row["model_gflop_per_pair"] / 1e3 / row["peak_tflop_per_s"]
        )
        assert row["products_gflop"] < 6 * row["model_gflop_per_pair"] and row["memory_gib"] > 0.1
    json.dumps([whole, parts])


CEILINGS = gpu_cases.Ceilings(copy_bytes_per_s=1e10, bf16_flop_per_s=2e12)


def pretend_steps(monkeypatch: pytest.MonkeyPatch, fits: int) -> list[Run]:
    """``timed_steps`` without steps, which runs out of memory above ``fits`` pairs at once. Fills what it returns."""
    runs: list[Run] = []

    def timed(teacher: Any, batch: int, run: Run, rounds: int, steps: int) -> dict[str, Any]:
        runs.append(run)
        if run.micro_batch is None or run.micro_batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        figures = {"teacher": teacher, "batch": batch, "s_per_step": 0.25, "mfu": 0.5}
        figures["activation_checkpointing"] = run.activation_checkpointing
        more = {"pairs_per_s": 256.0, "model_gflop_per_pair": 5.0, "time_over_products": 1.5, "memory_gib": 7.0}
        return figures | more | {"peak_source": "datasheet"}

    monkeypatch.setattr(gpu_train, "timed_steps", timed)
    monkeypatch.setattr(gpu_train, "make_teacher", lambda name, device: SimpleNamespace(device=CPU))
    return runs


def test_training_cases_are_named_apart_and_one_is_held_to_the_bar() -> None:
    cases = gpu_train.train_cases()
    assert len({case.name for case in cases}) == len(cases) and cases[0].name == "train digits-var batch 128 eager"
    rows = [
        {"name": c.name, "teacher": c.teacher, "activation_checkpointing": c.checkpointing, "mfu": 0.44} for c in cases
    ]
    rows.append({"name": "train var-d16 batch 64", "problem": "out of time"})
    bars = gpu_train.bars(rows)
    assert bars == [{"name": "train var-d16 batch 64: mfu", "value": 0.44, "at least": 0.45, "held": False}]
    assert gpu.failures({"train": rows})[-1] == "train var-d16 batch 64: out of time"


def test_a_step_that_does_not_fit_is_tried_in_smaller_parts_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = pretend_steps(monkeypatch, fits=20)
    row = gpu_train.measure_case(gpu_train.TrainCase("var-d16", 64, checkpointing=True), CEILINGS, CPU)
    assert [run.micro_batch for run in runs] == [64, 32, 16]
    assert all(run.compile and run.activation_checkpointing and run.precision == "bfloat16" for run in runs)
    assert row["share_of_matmul_peak"] == pytest.approx(256 * 5e9 / 2e12)
    assert row["note"] == "out of memory at batch 64: in micro-batches of 16" and row["note"] in gpu_train.line(row)
    assert "0.2500 s a step" in gpu_train.line(row) and "MFU 50.0% (datasheet), 64.0%" in gpu_train.line(row)
    pretend_steps(monkeypatch, fits=64)
    assert "note" not in gpu_train.measure_case(gpu_train.TrainCase("var-d16", 64), CEILINGS, CPU)
    pretend_steps(monkeypatch, fits=0)
    with pytest.raises(torch.OutOfMemoryError, match="one pair at a time"):
        gpu_train.measure_case(gpu_train.TrainCase("var-d16", 4), CEILINGS, CPU)


@pytest.mark.parametrize("stage", ["pairs", "train", "sample", "export"])
def test_a_program_that_fails_is_told_and_the_next_process_goes_on(
    stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(case: Any, ceilings: Any, device: Any) -> dict[str, Any]:
        if case.name == names[1]:
            raise RuntimeError("unspecified launch failure")
        return {"name": case.name, "note": "done"}

    names = [case.name for case in gpu.whole_cases(stage)]
    monkeypatch.setattr(gpu._WHOLE[stage], "measure_case", measure)
    monkeypatch.setattr(gpu, "Clock", lambda device: None)
    monkeypatch.setattr(gpu, "measure_ceilings", lambda clock: CEILINGS)
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *args, **options: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *device: None)
    paths = [str(tmp_path / name) for name in ("first", "second", "late")]
    assert gpu.whole_from(stage, "0", "60", paths[0]) == gpu._BROKEN
    assert gpu.whole_from(stage, "2", "60", paths[1]) == 0
    assert gpu.whole_from(stage, "0", "-1", paths[2]) == 0
    rows = [[json.loads(text) for text in Path(path).read_text().splitlines()] for path in paths]
    assert [row["name"] for row in rows[0] + rows[1]] == names == [row["name"] for row in rows[2]]
    assert rows[0][1]["problem"] == "RuntimeError: unspecified launch failure" and rows[1][0]["note"] == "done"
    assert {row["problem"] for row in rows[2]} == {"out of time"}


def test_a_small_case_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, in bfloat16."""
    monkeypatch.setattr(gpu_train, "ROUNDS", 1)
    monkeypatch.setattr(gpu_train, "STEPS", 1)
    rows: list[dict[str, Any]] = []
    cases = [gpu_train.TrainCase("digits-llamagen", 4, compile=False, checkpointing=True)]
    gpu.report_cases(gpu_train.measure_case, cases, CEILINGS, CPU, time.monotonic() + 60, rows.append)
    assert rows[0]["name"] == "train digits-llamagen batch 4 eager checkpointed" and rows[0]["precision"] == "bfloat16"
    assert rows[0]["share_of_matmul_peak"] == pytest.approx(
        rows[0]["mfu"] * rows[0]["peak_tflop_per_s"] * 1e12 / CEILINGS.bf16_flop_per_s
    )
    assert "x bare products" in gpu_train.line(rows[0])


# Layers


@needs_native
def test_layer_cases_run() -> None:
    cases = list(bench_layers.cases(scale=4))
    assert len({case.name for case in cases}) == len(cases) == len(list(bench_layers.cases()))
    clock, ceilings = gpu_cases.Clock(CPU, flush_megabytes=1), gpu_cases.Ceilings(1e10, 1e11)
    for case in cases:
        row = gpu_cases.measure_case(case, clock, ceilings)
        assert row["us"]["fused"]["p50"] > 0 and row["us"]["plain torch"]["p50"] > 0 and row["times_ceiling"] > 0
