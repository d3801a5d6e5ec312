"""The zoo against the released checkpoints' layouts; strict loading, conversion, and damaged files."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from ddfast.errors import UserError
from ddfast.models import STUDENTS, TEACHERS, TOKENIZERS, load_teacher
from ddfast.models.checkpoints import (
    Part,
    expected_shapes,
    load_bundle,
    make_part,
    optional_shapes,
    read_extra,
    read_tensors,
    save_bundle,
)
from ddfast.models.llamagen import LlamaGenConfig, LlamaGenTransformer
from ddfast.models.llamagen_student import LlamaGenStudent, LlamaGenStudentConfig
from ddfast.models.llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from ddfast.models.var_student import VARStudent, VARStudentConfig
from ddfast.models.zoo import ZooEntry, find_weights, identify, read_part
from ddfast.records import signed
from ddfast.tensors import content_hash

REFERENCE = json.loads((Path(__file__).parent / "reference" / "checkpoints.json").read_text())["checkpoints"]
ZOO: list[ZooEntry] = [*TEACHERS.values(), *TOKENIZERS.values(), *STUDENTS.values()]
BY_FILE = {t.file: t for t in ZOO if t.kind is not None}
CONFIG = LlamaGenConfig(n_layer=2, n_head=2, dim=16, block_size=4, vocab_size=32, num_classes=3, multiple_of=8)
VQ_CONFIG = LlamaGenTokenizerConfig(codebook_size=32, codebook_dim=4, ch=32, ch_mult=(1, 1), z_channels=4, grid=2)


def test_the_zoo_has_every_released_model() -> None:
    assert set(BY_FILE) == set(REFERENCE)


@pytest.mark.parametrize("file", sorted(REFERENCE))
def test_keys_and_shapes_equal_the_released_ones(file: str) -> None:
    entry, want = BY_FILE[file], REFERENCE[file]
    assert entry.kind is not None
    required = expected_shapes(entry.kind, entry.config)
    optional = optional_shapes(entry.kind, entry.config)
    shapes = {k: tuple(v) for k, v in want["state_dict"].items()}
    assert required == {k: s for k, s in shapes.items() if k not in want["optional"]}
    assert {k: s for k, s in optional.items() if k != "freqs_cis"} == {k: shapes[k] for k in want["optional"]}
    assert sum(torch.Size(s).numel() for s in required.values()) == want["n_parameters"]
    assert entry.name in identify(shapes)


@pytest.mark.parametrize("name", [n for n, t in TEACHERS.items() if not t.bundled] + list(STUDENTS))
def test_hyperparameters_equal_the_released_ones(name: str) -> None:
    entry = TEACHERS.get(name) or STUDENTS[name]
    hyper, config = REFERENCE[entry.file]["hyper"], entry.config
    mine = {"depth", "embed_dim", "num_heads", "norm_eps", "shared_aln", "attn_l2_norm", "n_layer", "n_head", "dim"}
    mine |= {
        "block_size",
        "rope_base",
        "num_classes",
        "vocab_size",
        "mlp_ratio",
        "multiple_of",
        "head_dim",
        "ffn_hidden",
        "codebook_dim",
    }
    shared = {k for k in mine if k in hyper and hasattr(config, k)}
    assert len(shared) >= 9
    assert {k: getattr(config, k) for k in shared} == {k: hyper[k] for k in shared}
    patch_nums = hyper.get("patch_nums")
    if patch_nums:
        assert list(config.patch_nums) == patch_nums and config.codebook_dim == hyper["Cvae"]
    if name in TEACHERS:
        vq = TEACHERS[name].tokenizer_config
        assert list(vq.patch_nums) == patch_nums if patch_nums else vq.grid**2 == config.block_size


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_has_its_teachers_shapes_and_its_published_sampling(name: str) -> None:
    entry = STUDENTS[name]
    want, teacher = REFERENCE[entry.file], TEACHERS[entry.teacher]
    assert teacher.file == want["teacher"]
    shared = asdict(teacher.config)
    assert {k: v for k, v in asdict(entry.config).items() if k in shared} == shared
    assert getattr(entry.config, "layerwise", True) is want["hyper"].get("layerwise_n_d_embed", True)
    two = want["sampling"]["two_step"]
    assert [*entry.timesteps] == two["t_list"]
    assert entry.split == two.get("loss_split_t", two.get("split_t"))


def random_tensors(module: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(t.shape, generator=generator) for k, t in module.state_dict().items()}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return random_tensors(LlamaGenTransformer(CONFIG))


@pytest.fixture
def bundle(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    vq = make_part("llamagen-tokenizer", VQ_CONFIG, random_tensors(LlamaGenTokenizer(VQ_CONFIG)), "vq")
    part = make_part("llamagen-transformer", CONFIG, tensors, "test")
    path = tmp_path / "tiny.safetensors"
    save_bundle(path, "tiny", {"transformer": part, "tokenizer": vq})
    return path


@pytest.mark.parametrize("container", [None, "model", "module", "state_dict"])
def test_released_containers_are_opened(tmp_path: Path, tensors: dict[str, Tensor], container: str | None) -> None:
    stored: dict[str, Any] = dict(tensors) | {"freqs_cis": torch.zeros(5, 4, 2)}
    path = tmp_path / "weights.pt"
    torch.save({container: stored, "args": argparse.Namespace(lr=1e-4), "steps": 3} if container else stored, path)
    part = read_part(path, "transformer", "llamagen-transformer", CONFIG)
    assert set(part.tensors) == set(tensors)  # the rebuilt rotation table is left out
    assert all(torch.equal(part.tensors[k], tensors[k]) for k in tensors)
    plain = tmp_path / "weights.safetensors"
    save_file(tensors, plain)
    assert read_part(plain, "transformer", "llamagen-transformer", CONFIG).sha256 == part.sha256


VAR_STUDENT = VARStudentConfig(2, 32, 2, (1, 2, 3), 5, 24, 4)
LLAMAGEN_STUDENT = LlamaGenStudentConfig(2, 2, 32, 9, 24, 5, multiple_of=32, codebook_dim=4)
RELEASED: dict[str, tuple[Any, type[torch.nn.Module], dict[str, list[tuple[str, ...]]]]] = {
    "var-student": (
        VAR_STUDENT,
        VARStudent,
        {"ema": [("trainer", "ema_parameters")], "raw": [("trainer", "var_wo_ddp")]},
    ),
    "llamagen-student": (
        LLAMAGEN_STUDENT,
        LlamaGenStudent,
        {"ema": [("ema",)], "raw": [("model",), ("module",), ("state_dict",), ()]},
    ),
}


def stored_under(places: dict[tuple[str, ...], dict[str, Tensor]]) -> dict[str, Any]:
    """A checkpoint with state dicts at these places, and what else the official scripts put there."""
    out: dict[str, Any] = {}
    for place, tensors in places.items():
        inner = out
        for key in place:
            inner = inner.setdefault(key, {})
        inner.update(tensors)
    return out if () in places else out | {"args": argparse.Namespace(lr=1e-4), "steps": 3, "optimizer": {"state": {}}}


@pytest.mark.parametrize("kind", RELEASED)
def test_both_copies_of_a_student_are_found(tmp_path: Path, kind: str) -> None:
    config, build, places = RELEASED[kind]
    ema, raw = random_tensors(build(config), 1), random_tensors(build(config), 2)
    buffers = {k: torch.zeros(s) for k, s in optional_shapes(kind, config).items()}
    path = tmp_path / "student.pt"
    for place in places["raw"]:
        held = {place: raw | buffers} | ({places["ema"][0]: ema} if place else {})  # the EMA copy has no buffers
        torch.save(stored_under(held), path)
        for copy, want in {"ema": ema, "raw": raw}.items():
            if copy == "ema" and not place:
                with pytest.raises(UserError, match=r"no ema copy of the weights, only raw; .*--copy raw"):
                    read_part(path, "student", kind, config, "ema")
                continue
            assert read_part(path, "student", kind, config, copy).sha256 == content_hash(want)


@pytest.mark.parametrize("kind", RELEASED)
@pytest.mark.parametrize("missing", ["ema", "raw"])
def test_a_missing_copy_is_not_made_up_from_the_other(tmp_path: Path, kind: str, missing: str) -> None:
    config, build, places = RELEASED[kind]
    held = "raw" if missing == "ema" else "ema"
    path = tmp_path / "student.pt"
    torch.save(stored_under({places[held][0]: random_tensors(build(config))}), path)
    with pytest.raises(
        UserError, match=f"student.pt holds no {missing} copy of the weights, only {held}; .*--copy {held}"
    ):
        read_part(path, "student", kind, config, missing)
    assert read_part(path, "student", kind, config, held).kind == kind
    with pytest.raises(UserError, match="copy is 'best'; use one of raw, ema"):
        read_part(path, "student", kind, config, "best")


@pytest.mark.parametrize("kind", RELEASED)
def test_a_key_too_few_or_too_many_in_a_students_copy_is_refused(tmp_path: Path, kind: str) -> None:
    config, build, places = RELEASED[kind]
    tensors = random_tensors(build(config))
    del tensors["n_d_embed.weight"]
    path = tmp_path / "student.pt"
    torch.save(stored_under({places["ema"][0]: tensors | {"extra": torch.zeros(1)}}), path)
    with pytest.raises(UserError, match=r"(?s)missing n_d_embed.weight .*unexpected extra"):
        read_part(path, "student", kind, config, "ema")


def test_a_student_in_a_teachers_place_says_which_it_is(tmp_path: Path) -> None:
    entry = STUDENTS["llamagen-dd-b"]
    shapes = expected_shapes(entry.kind, entry.config)
    path = tmp_path / "llamagen-B.pt"
    torch.save({"model": {k: torch.zeros(1).expand(s) for k, s in shapes.items()}}, path)  # strides 0: a small file
    with pytest.raises(UserError, match="looks like llamagen-dd-b"):
        load_teacher("llamagen-b-256", weights=path, tokenizer=path)


def test_differences_are_listed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pth"
    tensors["extra.weight"] = torch.zeros(2)
    tensors["norm.weight"] = torch.zeros(7)
    del tensors["output.weight"]
    torch.save(tensors, path)
    with pytest.raises(UserError) as error:
        read_part(path, "transformer", "llamagen-transformer", CONFIG)
    for line in (
        "missing output.weight [32, 16]",
        "unexpected extra.weight [2]",
        "norm.weight has shape [7] instead of [16]",
    ):
        assert line in str(error.value)


def test_a_file_of_another_model_says_which(tmp_path: Path) -> None:
    entry = TOKENIZERS["llamagen-vq-16"]
    shapes = expected_shapes(entry.kind, entry.config)
    path = tmp_path / "var_d16.pth"
    torch.save({"model": {k: torch.zeros(1).expand(s) for k, s in shapes.items()}}, path)  # strides 0: a small file
    with pytest.raises(UserError, match="looks like llamagen-vq-16"):
        load_teacher("var-d16", weights=path, tokenizer=path)


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "list", "missing", "folder"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(
    tmp_path: Path, bundle: Path, tensors: dict[str, Tensor], suffix: str, damage: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(tensors, path) if suffix == ".pth" else path.write_bytes(bundle.read_bytes())
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage != "missing":
        data[data.index(tensors["output.weight"].numpy().tobytes())] ^= 1
        path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "text": b"not weights"}[damage])
    with pytest.raises(UserError, match="weights"):
        read_part(path, "transformer", "llamagen-transformer", CONFIG)


def test_every_flipped_byte_of_a_bundle_is_noticed(bundle: Path) -> None:
    data = bundle.read_bytes()
    name, parts = load_bundle(bundle)
    for position in range(0, len(data), len(data) // 150):
        broken = bytearray(data)
        broken[position] ^= 0x10
        bundle.write_bytes(broken)
        with pytest.raises(UserError):
            load_bundle(bundle)
    bundle.write_bytes(data)
    assert (
        load_bundle(bundle)[0] == name and load_bundle(bundle)[1]["transformer"].sha256 == parts["transformer"].sha256
    )


def test_bundles_round_trip_and_decode(bundle: Path, tensors: dict[str, Tensor]) -> None:
    teacher = load_teacher(str(bundle))
    assert teacher.groups == (1,) * 4 and teacher.num_classes == 3 and teacher.name == "tiny"
    assert teacher.weights_sha256["transformer"] == content_hash(tensors)
    assert teacher.preset() == teacher.plain_sampling()
    assert teacher.images(torch.zeros(2, 4, dtype=torch.long)).shape == (2, 3, 4, 4)


def test_extra_is_read_back_and_its_absence_leaves_the_bytes_alone(tmp_path: Path, bundle: Path) -> None:
    name, parts = load_bundle(bundle)
    assert read_extra(bundle) == {}
    described = {k: {"kind": p.kind, "config": asdict(p.config), "sha256": p.sha256} for k, p in parts.items()}
    header = json.dumps(signed({"format": 2, "name": name, "parts": described}), sort_keys=True)
    tensors = {f"{label}.{k}": t for label, p in parts.items() for k, t in p.tensors.items()}
    assert bundle.read_bytes() == save(tensors, {"ddfast": header})
    path, extra = tmp_path / "folder" / "more.safetensors", {"timesteps": [0, 2], "split": 1, "note": "ü"}
    save_bundle(path, name, parts, extra)
    assert read_extra(path) == extra
    assert {k: p.sha256 for k, p in load_bundle(path)[1].items()} == {k: p.sha256 for k, p in parts.items()}


@pytest.mark.parametrize("header", ["[]", "{}", "{", '{"format": 1, "extra": [1]}', '{"format": 9}'])
def test_a_damaged_header_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "broken.safetensors"
    save_file({"transformer.a": torch.zeros(1)}, path, {"ddfast": header})
    for read in (read_extra, load_bundle):
        with pytest.raises(UserError, match=r"the header of .* (is damaged|has the name None)|bundle format (9|None)"):
            read(path)


def test_a_bundle_without_a_tokenizer_is_no_teacher(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "half.safetensors"
    save_bundle(path, "half", {"transformer": make_part("llamagen-transformer", CONFIG, tensors, "test")})
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_teacher(str(path))


def test_content_hash_depends_on_names_shapes_types_and_values() -> None:
    t = torch.arange(6.0)
    variants = [{"a": t}, {"b": t}, {"a": t.view(2, 3)}, {"a": t.double()}, {"a": t + 1}, {"a": t, "b": t}]
    assert len({content_hash(v) for v in variants}) == len(variants)
    assert content_hash({"a": t, "b": t}) == content_hash({"b": t, "a": t})


def test_unknown_names_and_missing_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean .*var-d16"):
        load_teacher("var-d1")
    monkeypatch.setenv("DDFAST_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"bring c2i_L_256.pt .* --weights"):
        load_teacher("llamagen-l-256")
    (tmp_path / "c2i_L_256.pt").touch()
    assert find_weights(TEACHERS["llamagen-l-256"]) == tmp_path / "c2i_L_256.pt"


def test_an_unknown_preset_names_those_there_are(bundle: Path) -> None:
    with pytest.raises(UserError, match="tiny has no preset 'paper'; it has plain"):
        load_teacher(str(bundle)).preset("paper")


def test_published_presets() -> None:
    for entry in TEACHERS.values():
        if not entry.bundled:
            assert entry.presets["paper"].guidance == 2.0
            assert next(iter(entry.presets)) == "paper"
    release = {n: t.presets["release"] for n, t in TEACHERS.items()}
    assert (release["var-d30"].guidance, release["var-d30"].top_k, release["var-d30"].top_p) == (1.5, 900, 0.96)
    assert [release[f"llamagen-{s}-384"].guidance for s in ("b", "l", "xl", "xxl", "3b")] == [
        2.0,
        2.0,
        1.75,
        1.75,
        1.65,
    ]


def test_a_dtype_is_applied_to_the_transformer_alone(bundle: Path) -> None:
    teacher = load_teacher(str(bundle), dtype=torch.bfloat16)
    assert teacher.dtype == torch.bfloat16 and teacher.codebook.dtype == torch.float32
    assert teacher.images(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.float32
    assert isinstance(load_bundle(bundle)[1]["transformer"], Part)
    assert read_tensors(bundle)["transformer.norm.weight"].dtype == torch.float32
