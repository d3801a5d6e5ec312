"""Exported folders from elsewhere: what they may name, read and run; and what a killed or refused export leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from said import Said, done, refused
from tiny import tiny_student

from ddfast.errors import UserError, WorkError
from ddfast.export import build, trust
from ddfast.export.build import Job, building, check_trusted, export_student, open_engine
from ddfast.export.engine import Engine, Stage, Tensors
from ddfast.export.external import external_files
from ddfast.export.manifest import Manifest, inside, is_exported, list_files, read_manifest
from ddfast.export.parity import measure
from ddfast.files import locked
from ddfast.models import Distilled, load_student
from ddfast.models.checkpoints import load_bundle, save_bundle
from ddfast.records import signed

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
__all__ = ["done", "refused"]  # fixtures

Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture(scope="module")
def model(raster_student_file: Path) -> Distilled:
    return load_student(raster_student_file)


@pytest.fixture(scope="module")
def made(model: Distilled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student as ONNX, its weights beside the graph."""
    out = tmp_path_factory.mktemp("exported") / "engine"
    export_student(Job(model, "onnx", "fp32", (0,), single_file=0, progress=lambda what: None), out)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "engine")
    return tmp_path / "engine"


def forge(folder: Path, change: Change) -> None:
    """Change a manifest and sign it again: a checksum keeps accidents out, not people."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    change(record, folder)
    path.write_text(json.dumps(signed(record)))


def rename_outside(record: dict[str, Any], folder: Path) -> None:
    shutil.copy(folder / "model.onnx", folder.parent / "outside.onnx")
    record["stages"]["whole"] = "../outside.onnx"


def rename_absolute(record: dict[str, Any], folder: Path) -> None:
    record["stages"]["whole"] = str(folder.parent / "outside.onnx")


def link_outside(record: dict[str, Any], folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "outside.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "outside.onnx")


def list_outside(record: dict[str, Any], folder: Path) -> None:
    record["files"]["../outside"] = {"bytes": 0, "sha256": ""}


def list_nothing(record: dict[str, Any], folder: Path) -> None:
    record["files"] = {}


def unlist_weights(record: dict[str, Any], folder: Path) -> None:
    """Weights of zeros, which nothing would compare."""
    del record["files"]["model.onnx.data"]
    data = folder / "model.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))


def entries(**changes: Any) -> Change:
    return lambda record, folder: record.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_outside, "names '../outside.onnx', which lies outside"),
        (rename_absolute, "outside.onnx', which lies outside"),
        (link_outside, "names 'model.onnx', which lies outside"),
        (list_outside, "names '../outside', which lies outside"),
        (list_nothing, "does not list model.onnx, which it would run"),
        (unlist_weights, "reads 'model.onnx.data', which its manifest does not list"),
        (entries(stages={}), "its stages are none; use whole or trunk, decoder"),
        (entries(stages={"decoder": "model.onnx", "trunk": "model.onnx"}), "its stages are decoder, trunk"),
        (entries(precision={}), "it says the precision of no stage"),
        (entries(target=3), "target is 3; it must be str"),
        (entries(batch=None), "batch is None; it must be dict"),
        (entries(batch={"least": 3, "best": 2, "most": 1}), "batches 3,2,1 must rise"),
        (entries(shapes={"tokens": 0, "channels": 4, "num_classes": 5, "image_size": 12}), "its tokens is 0"),
        (entries(timesteps="0"), "timesteps is '0'; it must be tuple"),
        (entries(student={"name": "x\ny"}), "has the name 'x.ny'; names are up to 200 printable characters"),
        (entries(target="aoti"), "a program, which can do all that you can"),
        (entries(target="openvino"), "reads 'model.bin', which its manifest does not list"),
        (entries(target="triton-server"), r"lacks what a folder for triton-server says \(KeyError"),
        (entries(surprise=1), "has the unknown key 'surprise'"),
    ],
)
def test_a_forged_manifest_reads_and_runs_nothing_else(folder: Path, change: Change, message: str) -> None:
    open_engine(folder)
    forge(folder, change)
    with pytest.raises(UserError, match=message):
        open_engine(folder)


def test_every_changed_entry_of_a_manifest_is_noticed(folder: Path) -> None:
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    for name in record:
        for value in (None, 7, "x", [], {"a": 1}):
            if record[name] != value:
                path.write_text(json.dumps(record | {name: value}))
                with pytest.raises(UserError):
                    read_manifest(folder)
    data = path.read_bytes()
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(UserError):
            read_manifest(folder)


def test_a_folder_from_before_signatures_opens(folder: Path) -> None:
    path = folder / "manifest.json"
    record = {k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"} | {"format": 1}
    path.write_text(json.dumps(record))
    assert open_engine(folder).manifest == replace(read_manifest(folder))


def test_what_onnxruntime_refuses_is_a_sentence(folder: Path) -> None:
    def break_graph(record: dict[str, Any], folder: Path) -> None:
        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        graph.graph.node[0].op_type = "NoSuchOperator"
        (folder / "model.onnx").write_bytes(graph.SerializeToString())
        record["files"] = list_files(folder)

    forge(folder, break_graph)
    with pytest.raises(UserError, match=r"onnxruntime refuses .*model\.onnx: .*NoSuchOperator"):
        open_engine(folder)


def test_graphs_that_take_something_else_are_refused(folder: Path) -> None:
    def another_input(record: dict[str, Any], folder: Path) -> None:
        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        for node in graph.graph.node:
            node.input[:] = ["secret" if name == "noise" else name for name in node.input]
        graph.graph.input[1].name = "secret"
        (folder / "model.onnx").write_bytes(graph.SerializeToString())
        record["files"] = list_files(folder)

    forge(folder, another_input)
    with pytest.raises(UserError, match="model.onnx takes secret, of which its manifest says nothing"):
        open_engine(folder)


def test_which_files_a_graph_reads_is_known_without_loading_it(made: Path, tmp_path: Path) -> None:
    assert external_files(made / "model.onnx") == {"model.onnx.data"}
    helper, proto = onnx.helper, onnx.TensorProto
    tensors = []
    for i, location in enumerate(("../x", "/etc/passwd", "a.bin")):
        tensor = proto(name=f"t{i}", data_type=1, dims=[1], data_location=proto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        tensors.append(tensor)
    inner = helper.make_graph([], "inner", [], [], initializer=[tensors[1]])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensors[2]),
        helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner),
    ]
    graph = helper.make_graph(nodes, "g", [], [], initializer=[tensors[0]])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert external_files(tmp_path / "m.onnx") == {"../x", "/etc/passwd", "a.bin"}
    data = (tmp_path / "m.onnx").read_bytes()
    for broken in (b"", data[:-3], b"\xff" * 40, b"\x3b" + data):
        (tmp_path / "m.onnx").write_bytes(broken)
        with pytest.raises(UserError, match="m.onnx is (empty|no ONNX graph)"):
            external_files(tmp_path / "m.onnx")


def test_names_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert inside(tmp_path, "a/b.onnx") == tmp_path / "a" / "b.onnx"
    for name in ("", ".", "..", "../x", "a/../../x", "/x"):
        if name == ".":
            continue
        with pytest.raises(UserError, match="lies outside of"):
            inside(tmp_path, name)


# --- programs


def program(target: str, **built: Any) -> Manifest:
    return Manifest(
        target,
        {"whole": "fp32"},
        {"whole": "model"},
        {"name": "x"},
        (0,),
        build.Batch(),
        build.Shapes(9, 4, 5, 12),
        built=built,
    )


@pytest.mark.parametrize(
    ("manifest", "what"),
    [
        (program("aoti"), "a compiled library"),
        (program("tensorrt"), "a TensorRT engine"),
        (program("tensorrt-rtx"), "a TensorRT-RTX engine"),
        (program("triton-server", backend="tensorrt"), "a TensorRT engine"),
    ],
)
def test_a_program_runs_where_it_was_made_or_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, manifest: Manifest, what: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(UserError, match=f"holds {what}: a program, .* not made by you on this machine.* add --trust"):
        check_trusted(tmp_path, manifest, False)
    check_trusted(tmp_path, manifest, True)
    assert f"runs {what}, trusted as told" in caplog.text
    trust.remember(manifest)
    check_trusted(tmp_path, manifest, False)
    assert f"runs {what}, made on this machine" in caplog.text
    other = replace(manifest, files={"model": {"bytes": 1, "sha256": "0"}})
    with pytest.raises(UserError, match="a program"):
        check_trusted(tmp_path, other, False)
    register = tmp_path / "state" / "ddfast" / "made-here"
    assert register.stat().st_mode & 0o077 == 0
    register.unlink()
    os.mkfifo(register)
    with pytest.raises(UserError, match="a program"):
        check_trusted(tmp_path, manifest, False)


def test_graphs_are_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for manifest in (program("onnx"), program("openvino"), program("triton-server", backend="onnxruntime")):
        check_trusted(tmp_path, manifest, False)
        trust.remember(manifest)
    assert not caplog.records


def test_without_a_home_trust_is_asked_for_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ddfast.export.trust.home", lambda *parts, variable: None)
    trust.remember(program("aoti"))
    assert "running it will ask for --trust" in caplog.text and not trust.made_here(program("aoti"))


# --- names, labels, parity


@pytest.mark.parametrize("name", ["x\ntouch PWNED #", 'x\nbackend: "python"\n#', "x\r", "\x1b]0;x\x07"])
def test_a_name_is_no_line_of_a_script(
    tmp_path: Path, pyramid_student_file: Path, refused: Said, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a bundle that did not check it, and from Python."""
    parts = load_bundle(pyramid_student_file)[1]
    path, extra = tmp_path / "s.safetensors", {"timesteps": [0, 2], "split": 2, "teacher": "tiny-var"}
    with pytest.raises(UserError, match="names are up to 200 printable characters"):
        save_bundle(path, name, parts, extra)
    monkeypatch.setattr("ddfast.models.checkpoints.check_name", lambda name, where: name)
    save_bundle(path, name, parts, extra)
    monkeypatch.undo()
    out = tmp_path / "out"
    for target in ("tensorrt", "triton-server"):
        said = refused("export", "--student", path, "--to", target, "--out", out)
        assert "printable characters" in said and not out.exists()
    job = Job(replace(load_student(pyramid_student_file), name=name), "onnx", "fp32", (0,))
    with pytest.raises(UserError, match="the student has the name"):
        export_student(job, out)


def test_labels_that_are_no_class_give_no_image(made: Path, model: Distilled) -> None:
    """By onnxruntime alone: the graph says what is allowed, and nobody gets another class's image."""
    session = ort.InferenceSession(str(made / "model.onnx"), providers=["CPUExecutionProvider"])
    shapes = read_manifest(made).shapes
    noise = np.random.default_rng(0).standard_normal((3, shapes.tokens, shapes.channels), dtype=np.float32)
    for labels in ([0, shapes.num_classes, 1], [-1, 4, 2]):
        (image,) = session.run(["image"], {"label": np.array(labels), "noise": noise})
        fine = np.array([0 <= label < shapes.num_classes for label in labels])
        assert (np.isfinite(image).all((1, 2, 3)) == fine).all()
    graph = onnx.load(str(made / "model.onnx"), load_external_data=False)
    said = "label: a class, 0 to 4; for any other number the image is NaN"
    assert {p.key: p.value for p in graph.metadata_props}["ddfast.labels"] == said
    assert graph.graph.input[0].doc_string == said


class Same(Stage):
    """Gives every class and noise one image."""

    runtime, inputs = "fake", ("label", "noise")

    def __init__(self, model: Distilled) -> None:
        self.model = model

    def __call__(self, feeds: Tensors) -> Tensors:
        embeddings = self.model.codebook[:1].expand(len(feeds["label"]), self.model.student.num_tokens, -1)
        return {"image": self.model.images(embeddings), "embeddings": embeddings}


def test_a_parity_of_images_that_are_all_alike_is_none(made: Path, model: Distilled) -> None:
    engine = Engine(read_manifest(made), {"whole": Same(model)})
    with pytest.raises(WorkError, match="all 4 images of the export are alike, whatever their class and noise"):
        measure(engine, model, 4, 1)


def test_images_that_are_no_numbers_are_not_written(made: Path, tmp_path: Path) -> None:
    from ddfast.export.images import engine_images

    engine = open_engine(made)
    plain = engine.stages["whole"]

    class Broken(Same):
        def __call__(self, feeds: Tensors) -> Tensors:
            values = plain(feeds)
            return values | {"image": values["image"] * torch.nan}

    images = engine_images(Engine(engine.manifest, {"whole": Broken(None)}), None, 2, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="images of tiny-dd are not finite"):
        images.draw(torch.arange(2))


# --- where exports go


def build_at(out: Path) -> None:
    with building(out) as inside:
        (inside / "model.onnx").write_bytes(b"graph")
        (inside / "ddfast").mkdir()
        (inside / "manifest.json").write_bytes(b"{}")


def test_an_export_goes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder, an empty one, the one it stands in, and a link to one: a volume may be mounted there."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (tmp_path / "new" / "deep", tmp_path / "link", Path(".")):
        build_at(out)
        assert {p.name for p in out.iterdir()} == {"model.onnx", "ddfast", "manifest.json"}
    assert (tmp_path / "link").is_symlink()


def test_a_path_that_runtimes_cannot_open_is_refused(tmp_path: Path, made: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd6"))
    shutil.copytree(made, odd)
    for use in (lambda: open_engine(odd), lambda: build.check_out(odd / "out")):
        with pytest.raises(UserError, match="is not UTF-8, or this locale is not"):
            use()


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(KeyboardInterrupt), building(out) as inside:
            (inside / "model.onnx").write_bytes(b"half")
            raise KeyboardInterrupt
    assert not (tmp_path / "new").exists() and not list((tmp_path / "empty").iterdir())


def test_two_exports_to_one_place_know_of_each_other_at_once(tmp_path: Path) -> None:
    with building(tmp_path / "out") as inside:
        with pytest.raises(UserError, match="another process is writing to"):
            build_at(tmp_path / "out")
        assert inside.exists()


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    left, living, other = (out / f".export.0123456{i}.tmp" for i in range(3))
    for path in (left, living, other):
        path.mkdir()
        (path / "model.onnx").write_bytes(b"half")
    locked(left).close()
    with locked(living):
        build_at(out)
        assert {p.name for p in out.iterdir() if p.name.startswith(".")} == {living.name, other.name}


EXPORT = """
import sys
from pathlib import Path
from ddfast.cli import main
import ddfast.export.onnx as onnx
def build(job):
    (job.folder / "model.onnx").write_bytes(b"half")
    print("ready", flush=True)
    import time
    time.sleep(60)
onnx.build = build
sys.exit(main(["export", "--student", sys.argv[1], "--to", "onnx", "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_around_an_ended_export_goes_on(
    tmp_path: Path, raster_student_file: Path, inputs: dict[str, list[str]], number: signal.Signals, done: Said
) -> None:
    """An export into a run's folder, which is then trained on: nothing of it is in the way."""
    from train_helpers import train

    run = tmp_path / "run"
    assert done(*train(run, inputs["llamagen"], "--steps", "2"))
    words = [sys.executable, "-c", EXPORT, str(raster_student_file), str(run / "onnx")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    if number == signal.SIGTERM:
        assert process.returncode == 130 and "ddfast: interrupted; nothing of it stays at --out" in err
        assert not (run / "onnx").exists()
    assert done(*train(run, inputs["llamagen"], "--steps", "2"))
    build_at(run / "onnx")
    assert {p.name for p in (run / "onnx").iterdir()} == {"model.onnx", "ddfast", "manifest.json"}


def test_a_folder_of_pictures_is_no_export(tmp_path: Path) -> None:
    assert not is_exported(tmp_path)
    for text, want in (("[]", False), ('{"kind": "other"}', False), ('{"kind": "ddfast export"}', True), ("{", True)):
        (tmp_path / "manifest.json").write_text(text)
        assert is_exported(tmp_path) == want
    (tmp_path / "0.png").touch()
    assert not is_exported(tmp_path)


def test_a_students_place_is_told_from_its_file(tmp_path: Path, bundles: dict[str, Path]) -> None:
    """What a student's file says besides its weights is signed with it."""
    path = tiny_student(tmp_path / "s.safetensors", str(bundles["var"]), "var")
    data = path.read_bytes()
    begin = data.index(b"extra")
    for position in range(begin, begin + 90):
        path.write_bytes(data[:position] + bytes([data[position] ^ 2]) + data[position + 1 :])
        with pytest.raises(UserError):
            load_student(path)
