from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import student_part

from ddfast.errors import UserError
from ddfast.export import aoti
from ddfast.export.build import Job, check, export_student, open_engine
from ddfast.export.manifest import Batch, read_manifest
from ddfast.models import Distilled, load_student

EXAMPLE = Path(__file__).parents[1] / "examples" / "aoti"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def job(model: Distilled, precision: str = "fp32", **changes: object) -> Job:
    return replace(Job(model, "aoti", precision, (0,), progress=lambda what: None), **changes)


@pytest.fixture(scope="module")
def model(raster_student_file: Path) -> Distilled:
    """Of one family and one block: every compilation is slow."""
    student: Any = student_part("llamagen", n_layer=1).build(torch.float32, "cpu")
    return replace(load_student(raster_student_file), student=student)


@pytest.fixture(scope="module")
def exported(model: Distilled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    out = tmp_path_factory.mktemp("aoti") / "out"
    export_student(job(model), out)
    return out


def test_an_exported_student_gives_torch_s_tokens_and_images(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert manifest.parity["token_agreement"] == 1 and manifest.parity["images_alike"] == 1
    assert manifest.parity["image_error"] < 2e-5
    assert sorted(p.name for p in exported.iterdir()) == sorted(["manifest.json", *manifest.stages.values()])
    assert manifest.built["device"] == "cpu" and manifest.built["torch"] == torch.__version__


def test_an_image_is_the_same_in_any_batch(exported: Path) -> None:
    engine = open_engine(exported)
    labels, samples = torch.arange(7) % 5, torch.arange(7)
    whole = next(engine.draw(labels, 3, samples))["image"]
    assert whole.shape == (7, 3, 12, 12) and whole.dtype == torch.float32
    single = next(engine.draw(labels[4:5], 3, samples[4:5]))["image"]
    torch.testing.assert_close(single, whole[4:5], rtol=0, atol=1e-5)


def test_a_file_that_differs_from_the_manifest_is_refused(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    file = copy / next(iter(read_manifest(exported).stages.values()))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="is not the file that its manifest lists"):
        open_engine(copy)


def test_a_file_that_torch_cannot_load_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"no archive")
    manifest = read_manifest(exported)
    with pytest.raises(UserError, match="cannot load .*model.pt2, which torch .* compiled"):
        aoti.open_stage(tmp_path / "model.pt2", "whole", manifest, torch.device("cpu"))


def test_another_device_than_the_compiled_one_is_refused(exported: Path) -> None:
    with pytest.raises(UserError, match="was compiled for cpu, not for cuda; use --device cpu"):
        open_engine(exported, "cuda")


def test_a_cpu_that_lacks_instructions_or_is_another_kind_is_refused() -> None:
    here = aoti.facts_of(torch.device("cpu"))
    aoti.check_device(Path("x.pt2"), {"device": "cpu", "cpu": here}, torch.device("cpu"))
    for facts, message in (
        (here | {"flags": ["avx9000"]}, "a CPU with avx9000, which this one lacks"),
        (here | {"machine": "pdp11"}, "was compiled for pdp11, and this is"),
    ):
        with pytest.raises(UserError, match=message):
            aoti.check_device(Path("x.pt2"), {"device": "cpu", "cpu": facts}, torch.device("cpu"))


def test_another_gpu_than_the_compiled_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"device": "cuda", "cuda": {"name": "NVIDIA H200", "compute_capability": "9.0"}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="compiled for a GPU .NVIDIA H200., and torch sees none here"):
        aoti.check_device(Path("x.pt2"), built, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"compiled for NVIDIA H200 .*9.0\), and this is NVIDIA A100 .*8.0\)"):
        aoti.check_device(Path("x.pt2"), built, torch.device("cuda"))


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("fp8", {}, "aoti has no precision fp8; use fp32, bf16, fp16"),
        ("fp16", {}, "fp16 on a CPU is slower"),
        ("fp32", {"device": "tpu"}, "no device 'tpu'; use cpu or cuda"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    model: Distilled, precision: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(job(model, precision, options=options))


def test_a_gpu_that_is_not_there_is_refused(model: Distilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA GPU here; use --device cpu"):
        check(job(model, options={"device": "cuda"}))


def test_without_a_compiler_the_message_says_what_to_install(model: Distilled) -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="needs a C.. compiler and finds none: install g.."):
            check(job(model))


@needs_compiler
def test_code_that_the_compiler_refuses_leaves_nothing_behind(
    model: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.exc import CppCompileError

    from ddfast.errors import WorkError

    def refuse(*args: object, **kwargs: object) -> None:
        raise CppCompileError(["g++"], "no such instruction")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", refuse)
    with pytest.raises(WorkError, match="compiler refused what AOTInductor wrote.*"):
        export_student(job(model, batch=Batch(2, 2, 2)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # the same file runs in Python above
@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_the_c_program_draws_an_image(exported: Path, tmp_path: Path) -> None:
    manifest = read_manifest(exported)
    prefix = torch.utils.cmake_prefix_path
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
    program, file = tmp_path / "build" / "draw", exported / manifest.stages["whole"]
    subprocess.run([program, file, "3", tmp_path / "image.ppm", "7"], check=True)
    torch.manual_seed(7)
    feeds = {"label": torch.tensor([3]), "noise": torch.randn(1, manifest.shapes.tokens, manifest.shapes.channels)}
    want = open_engine(exported).run(feeds)["image"][0].mul(255).round().byte().permute(1, 2, 0)
    got = torch.frombuffer(bytearray(Image.open(tmp_path / "image.ppm").tobytes()), dtype=torch.uint8)
    assert torch.equal(got.view(want.shape), want)
    refused = subprocess.run([program, file, "5", tmp_path / "none.ppm"], capture_output=True, text=True)
    assert refused.returncode == 1 and "no such class" in refused.stderr
