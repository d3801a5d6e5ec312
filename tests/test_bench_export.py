"""The bench of exported students at toy size, and its stand-in for the released code against that code's outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_export
import pytest
import torch
from conftest import Golden
from released import released, released_tokens
from test_students import OFFICIAL, codebook_of, student_of
from torch.utils.flop_counter import FlopCounterMode

from ddfast.models import load_student
from ddfast.sampling import few_step, sample_noise


@pytest.mark.golden(*OFFICIAL)
@torch.inference_mode()
def test_the_stand_in_gives_what_the_released_code_gave(golden: Golden) -> None:
    student, codebook = student_of(golden), codebook_of(golden)
    name = "final_sequence" if golden.config["case"] == "dd_var_student" else "final_x"
    for split in golden.config["splits"]:
        got = released_tokens(student, codebook, split)(golden["in.label"], golden["in.noise"])
        golden.close(got, f"out.t0.{name}.split{split}")


def test_the_stand_in_draws_the_student_s_images(student_file: Path) -> None:
    model = load_student(student_file)
    labels, noise = torch.arange(5), sample_noise(3, torch.arange(5), model.student.num_tokens, model.student.channels)
    x, images = released(model)(labels, noise)
    want = few_step(model.student, labels, noise, model.codebook, (0,), model.split)
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images, model.images(want), rtol=1e-4, atol=1e-4)
    low, _ = released(model, torch.bfloat16)(labels, noise)
    assert low.dtype == torch.float32 and not torch.equal(low, x)


def test_the_floor_counts_what_a_step_multiplies(student_file: Path) -> None:
    model = load_student(student_file)
    one, two = (bench_export.products(str(student_file), batch) for batch in (1, 2))
    s, blocks = model.student, len(model.student.stack)
    gflop = {
        stage: [sum(n * bench_export.flop_of(*key) for key, n in found[stage].items()) for found in (one, two)]
        for stage in one
    }
    positions = 1 + s.num_tokens
    assert one["attention"].total() == 2 * blocks
    assert gflop["attention"][0] == blocks * 4 * positions**2 * s.width
    inner = sum(p.numel() for name, p in s.stack.named_parameters() if p.ndim == 2 and "ada_lin" not in name)
    assert gflop["trunk"][0] > 2 * positions * inner
    assert gflop["decoder"][1] == 2 * gflop["decoder"][0]
    with FlopCounterMode(display=False) as counter:
        model.tokenizer.decode_embeddings(torch.zeros(1, s.num_tokens, s.channels))  # type: ignore[operator]
    assert counter.get_total_flops() == gflop["decoder"][0]


def test_a_process_of_its_own_tells_what_it_took(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    took = bench_export.alone("write", 1, name="digits-llamagen", path=str(path))
    assert load_student(path).timesteps == (0,) and took["answer"] == {}
    assert took["process_s"] > 0 and took["process_cpu_s"] > 0 and took["memory_gb"] > 0.1
    with pytest.raises(SystemExit, match="failed with 1"):
        bench_export.alone("exported", 1)


def test_the_bench_runs_on_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    def here(work: str, threads: int, **given: Any) -> dict[str, Any]:
        answer = json.loads(json.dumps(bench_export.WORK[work](**given)))
        return {"answer": answer, "process_s": 1.0, "process_cpu_s": 1.0, "memory_gb": 1.0}

    words = "--small --only digits-var --batches 2 --repeats 1 --rounds 2 --parity 2 --engines onnx-fp32"
    monkeypatch.setattr(bench_export, "alone", here)
    monkeypatch.setattr("sys.argv", ["bench_export.py", *words.split(), "--out", str(tmp_path / "out.json")])
    bench_export.main()
    said = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == said
    (done,) = said["exports"]
    assert done["parity"]["token_agreement"] == 1 and done["files_gb"] > 0
    rows = {row["way"]: row for row in said["rows"]}
    assert list(rows) == ["released fp32", "released bf16", "torch fp32", "torch bf16", "onnx-fp32"]
    assert rows["released fp32"]["faster_than_released"] == rows["released fp32"]["memory_of_released"] == 1
    (floor,) = said["floors"]
    for row in rows.values():
        bottom = sum(floor[precision][stage]["cpu_median_s"] for stage, precision in row["precision"].items())
        assert row["times_floor"] == pytest.approx(row["cpu_median_s"] / bottom, rel=1e-2)
        assert row["min_s"] <= row["median_s"]
    (winner,) = said["best"]
    assert winner["way"] == "onnx-fp32" and winner["times_floor"] == rows["onnx-fp32"]["times_floor"]
    assert winner["holds"] == {"times_floor": winner["times_floor"] <= 1.25}


def test_the_bars_are_those_of_the_batch_and_of_the_fastest_runtime() -> None:
    def row(batch: int, **changes: Any) -> dict[str, Any]:
        ratios = {"times_floor": 1.2, "faster_than_released": 3.5, "memory_of_released": 0.3}
        same = {"student": "s", "batch": batch, "way": "x", "runtime": "r", "cpu_median_s": 1.0}
        return same | ratios | changes

    slow, torch_s = row(1, cpu_median_s=2.0), {"cpu_median_s": 0.5}
    assert bench_export.best([torch_s, slow, row(1)])["holds"] == {"times_floor": True, "faster_than_released": True}
    of_four = bench_export.best([slow, row(4)])["holds"]
    assert of_four == {"times_floor": True, "faster_than_released": False, "memory_of_released": True}
    assert not bench_export.best([row(1, times_floor=1.3)])["holds"]["times_floor"]


def test_a_small_run_overwrites_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_export.py", "--small"])
    with pytest.raises(SystemExit):
        bench_export.main()
