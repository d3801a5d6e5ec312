"""What make gpu measures of whole pairs, and what is projected from it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import full_size
import gpu
import gpu_cases
import gpu_pairs
import project
import pytest
import torch
from engine_helpers import (
    FAMILIES,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddfast.models import TEACHERS, Teacher, load_teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_work_is_what_the_transformer_multiplies(bundles: dict[str, Path], family: str) -> None:
    """Against torch's own count, of one row at once: all products with weights but VAR's embedding of codes."""
    teacher = load_teacher(str(bundles[family]))
    config, length = teacher.transformer.config, teacher.num_tokens
    work = gpu_pairs.count_work(config, rows=1)
    inputs = torch.zeros(1, length - 1, 4) if family == "var" else torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        teacher.transformer(torch.tensor([1]), inputs)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    embedding = 2 * (length - 1) * 4 * 32 if family == "var" else 0
    assert work.gemm_flop == counts.pop("aten.addmm", 0) + counts.pop("aten.mm", 0) - embedding
    ends = [1, 5, 14] if family == "var" else list(range(1, 10))
    seen = sum(n * end for n, end in zip(teacher.groups, ends, strict=True))
    assert work.attention_flop / seen == sum(counts.values()) / length**2  # which counts masked scores, too
    both = gpu_pairs.count_work(config)
    assert both.flop == 2 * work.flop and both.weights == work.weights and both.steps == len(ends)
    assert both.cached * 4 * length == teacher.cache_bytes(guided=True) * sum(ends)
    assert both.read_bytes(2, 4) == 4 * (work.weights * len(ends) / 2 + both.cached)


def test_var_d16_takes_what_the_bench_counted() -> None:
    rows = json.loads((project.RESULTS / "pairs-cpu.json").read_text())["rows"]
    counted = {row["gemm_gflop_per_pair"] for row in rows if row["teacher"] == "var-d16"}
    assert counted and all(
        count == pytest.approx(gpu_pairs.count_work(TEACHERS["var-d16"].config).gemm_flop / 1e9, 0.01)
        for count in counted
    )


def test_pair_rates_have_every_figure(teacher: Teacher) -> None:
    ceilings = gpu_cases.Ceilings(copy_bytes_per_s=1e10, bf16_flop_per_s=1e12)
    work = gpu_pairs.count_work(teacher.transformer.config)
    row = gpu_pairs.measure_pairs(teacher, work, "plain", 4, ceilings, precision="native", batches=5)
    assert row["pairs"] == 16 and row["pairs_per_s"] > 0 and row["s_before_second_batch"] > 0
    assert row["share_of_matmul_peak"] == pytest.approx(row["pairs_per_s"] * work.flop / 1e12)
    assert row["share_of_copy_bandwidth"] == pytest.approx(row["pairs_per_s"] * work.read_bytes(4, 4) / 1e10)
    text = gpu_pairs.line({"name": "pairs tiny"} | row)
    assert "pairs/s" in text and "of the matmul peak" in text
    json.dumps(row)


@pytest.mark.parametrize("name", ["var-d16", "llamagen-b-256"])
def test_random_teachers_have_logits_of_a_teacher(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At a toy size: two layers."""
    change = {"depth": 2} if name == "var-d16" else {"n_layer": 2}
    entry = TEACHERS[name]
    small = replace(
        entry,
        config=replace(entry.config, embed_dim=128, num_heads=2, **change)
        if name == "var-d16"
        else replace(entry.config, dim=128, n_head=2, **change),
    )
    monkeypatch.setattr(full_size, "TEACHERS", {name: small})
    teacher = full_size.random_teacher(name, torch.bfloat16, torch.device("cpu"))
    state = teacher.decode_state(torch.tensor([1, 2]), 2.0)
    assert teacher.dtype == torch.bfloat16 and 1 < teacher.logits(state)[0].float().std() < 4
    assert teacher.preset("paper").guidance == 2.0


def test_pair_cases_and_their_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = gpu_pairs.pair_cases()
    assert len({case.name for case in cases}) == len(cases) and {case.precision for case in cases} == {"native", "fp8"}
    kinds = [(case.teacher, case.precision) for case in cases]
    assert sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)) == len(set(kinds)) - 1
    figures = {"share_of_matmul_peak": 0.4, "share_of_copy_bandwidth": 0.7, "pairs_per_s": 1.0}
    rows = [{"name": c.name, "teacher": c.teacher, "precision": c.precision} | figures for c in cases]
    rows[1]["share_of_matmul_peak"] = 0.55
    rows[-2]["share_of_matmul_peak"] = 0.99  # fp8 is held to no bar of bf16
    rows.append({"name": "pairs late", "problem": "out of time"})
    assert [(bar["name"], bar["value"], bar["held"]) for bar in gpu_pairs.bars(rows)] == [
        ("pairs var-d16 batch 32 native: share_of_matmul_peak", 0.55, True),
        ("pairs llamagen-l-256 batch 256 native: share_of_copy_bandwidth", 0.7, True),
    ]
    assert gpu.failures({"pairs": rows})[-1] == "pairs late: out of time"
    reported: list[dict[str, Any]] = []
    arguments = (
        (lambda case, ceilings, device: {"name": case.name, "note": "old"}),
        cases[:2],
        None,
        torch.device("cpu"),
    )
    gpu.report_cases(*arguments, time.monotonic() + 60, reported.append)  # type: ignore[arg-type]
    gpu.report_cases(*arguments, 0.0, reported.append)  # type: ignore[arg-type]
    assert [row.get("note", row.get("problem")) for row in reported] == ["old", "old", "out of time", "out of time"]


def test_the_projection_is_up_to_date() -> None:
    page = project.PAGE.read_text()
    text = project.projection(project.RESULTS, project.PRICE_GPU, project.PRICE_CPU)
    assert project.rewritten(page, text) == page, "run python benches/project.py"


def test_rates_scale_within_a_family(tmp_path: Path) -> None:
    """From the nearest one measured: VAR by arithmetic, LlamaGen by bytes; int8, with other pairs, is left out."""
    rows: list[dict[str, Any]] = [
        {"teacher": "var-d16", "dtype": "bfloat16", "batch": 4, "pairs_per_s": 1.0},
        {"teacher": "var-d16", "dtype": "bfloat16", "batch": 4, "pairs_per_s": 9.0, "precision": "int8"},
        {"teacher": "var-d30", "dtype": "bfloat16", "batch": 4, "pairs_per_s": 0.1},
        {"teacher": "llamagen-l-256", "dtype": "bfloat16", "batch": 64, "pairs_per_s": 2.0, "precision": "native"},
        {"teacher": "digits-var", "dtype": "float32", "batch": 1, "pairs_per_s": 80.0},
        {"name": "pairs var-d16 batch 1 native", "teacher": "var-d16", "note": "old"},
    ]
    measured = project.best(rows)
    assert project.rate("var-d16", measured, gpu=True) == (1.0, "measured: bfloat16, batch 4")
    flop = {name: gpu_pairs.count_work(TEACHERS[name].config).flop for name in ("var-d16", "var-d20", "var-d30")}
    assert project.rate("var-d20", measured, gpu=True) == (
        pytest.approx(flop["var-d16"] / flop["var-d20"]),
        "var-d16, by GFLOP",
    )
    read = [gpu_pairs.count_work(TEACHERS[f"llamagen-{x}-256"].config).read_bytes(64) for x in "bl"]
    assert project.rate("llamagen-b-256", measured, gpu=True) == (
        pytest.approx(2 * read[1] / read[0]),
        "llamagen-l-256, by GB read",
    )
    assert project.rate("digits-llamagen", measured, gpu=True) is None
    (tmp_path / "pairs-cpu.json").write_text(json.dumps({"hardware": {"cpu": "a CPU"}, "rows": rows}))
    (tmp_path / "gpu-toy.json").write_text(json.dumps({"hardware": {"gpu": "Toy GPU"}, "pairs": rows[:1]}))
    text = project.projection(tmp_path, 36.0, 1.0)
    assert "| var-d16 | 597 GFLOP | 1 | measured: bfloat16, batch 4 | 333 | $12,000 |" in text
    assert (
        "Toy GPU" in text and "GPU: not measured" not in text and "| digits-llamagen | small | not measured |" in text
    )
    with pytest.raises(SystemExit, match="marks"):
        project.rewritten("no marks", text)
