"""The students against outputs of the official code, and their attention against its dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Golden
from torch import Tensor

from ddfast.models.attention import Attend, group_mask, grouped, masked
from ddfast.models.checkpoints import make_part
from ddfast.models.llamagen import LlamaGenConfig, LlamaGenTransformer
from ddfast.models.llamagen_student import LlamaGenStudent, LlamaGenStudentConfig
from ddfast.models.student import Student
from ddfast.models.var import VARConfig, VARTransformer
from ddfast.models.var_student import VARStudent, VARStudentConfig
from ddfast.sampling import few_step

OFFICIAL = ("dd_var_student_*", "dd_llamagen_student*")


def var_config(kwargs: dict[str, Any], vae: dict[str, Any]) -> dict[str, Any]:
    names = ("depth", "embed_dim", "num_heads", "num_classes", "mlp_ratio", "norm_eps", "shared_aln", "attn_l2_norm")
    return {k: kwargs[k] for k in names} | {
        "patch_nums": tuple(kwargs["patch_nums"]),
        "vocab_size": vae["vocab_size"],
        "codebook_dim": vae["z_channels"],
    }


def llamagen_config(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("n_layer", "n_head", "dim", "block_size", "vocab_size", "num_classes", "n_kv_head", "multiple_of")
    return {k: kwargs[k] for k in (*names, "norm_eps", "rope_base") if k in kwargs}


def student_of(golden: Golden) -> Student:
    """The student of a golden file, loaded strictly."""
    k = golden.config["kwargs"]
    if golden.config["case"] == "dd_var_student":
        assert k["n_d_embed_enable"]
        config: Any = VARStudentConfig(
            **var_config(k, golden.config["vae_kwargs"]), layerwise=bool(k["layerwise_n_d_embed"])
        )
        kind = "var-student"
    else:
        config, kind = LlamaGenStudentConfig(**llamagen_config(k), codebook_dim=k["codebook_dim"]), "llamagen-student"
    module = make_part(kind, config, golden.weights(), golden.path.name).build(torch.float32, "cpu")
    assert isinstance(module, Student)
    return module


def codebook_of(golden: Golden) -> Tensor:
    if "in.codebook" in golden:
        return golden["in.codebook"]
    return golden.weights("vae_weights.")["quantize.embedding.weight"]


def timesteps(golden: Golden) -> list[tuple[str, int | Tensor]]:
    """(tag, t) of every forward pass in a file."""
    each = [(f"t{t}", t) for t in golden.config["t_values"]]
    return [*each, ("tmix", golden["in.tmix"])]


def trajectory_point(student: Student, golden: Golden, t: int | Tensor) -> Tensor:
    """x_t: tokens in groups before t, noise from there on (Eq. 5)."""
    known = student.known(t, torch.device("cpu"))[:, 1:, None].bool()
    return torch.where(known, golden["in.tokens"], golden["in.noise"])


@pytest.mark.golden(*OFFICIAL)
@torch.inference_mode()
def test_both_heads(golden: Golden) -> None:
    student = student_of(golden)
    for tag, t in timesteps(golden):
        if isinstance(t, Tensor) and int(t.max()) > len(student.groups):
            continue
        x_t = trajectory_point(student, golden, t)
        golden.close(x_t, f"out.{tag}.x_t")
        embeddings, logits = student(golden["in.label"], x_t, t)
        golden.close(embeddings, f"out.{tag}.fwd_tokens")
        golden.close(logits, f"out.{tag}.fwd_logits")


@pytest.mark.golden(*OFFICIAL)
def test_one_step_keeps_data_and_splits_the_heads(golden: Golden) -> None:
    student, codebook = student_of(golden), codebook_of(golden)
    var = golden.config["case"] == "dd_var_student"
    name = "final_sequence" if var else "final_x"
    for t in golden.config["t_values"]:
        x_t = trajectory_point(student, golden, t)
        for split in golden.config["splits"]:
            got = student.predict(golden["in.label"], x_t, t, codebook, split)
            golden.close(got, f"out.t{t}.{name}.split{split}")


@pytest.mark.golden(*OFFICIAL)
def test_few_step_sampling(golden: Golden) -> None:
    student, codebook = student_of(golden), codebook_of(golden)
    for pipeline in golden.config["sample_pipelines"]:
        steps, split = tuple(pipeline["t_list"]), pipeline["split_t"]
        got = few_step(student, golden["in.label"], golden["in.noise"], codebook, steps, split)
        golden.close(got, f"out.sample.t{'_'.join(map(str, steps))}.split{split}.x")


def test_heads_run_only_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VARStudentConfig(2, 32, 2, (1, 2, 3), 5, 24, 4)
    student = VARStudent(config).eval()
    student.init_weights(torch.Generator().manual_seed(0))
    widths: dict[str, list[int]] = {"logits": [], "embeddings": []}

    def watch(name: str) -> None:
        inner = getattr(student, name)

        def watched(h: Tensor, cond: Tensor) -> Tensor:
            widths[name].append(h.shape[1])
            return inner(h, cond)

        monkeypatch.setattr(student, name, watched)

    watch("logits")
    watch("embeddings")
    x, codebook, labels = torch.randn(2, 14, 4), torch.randn(24, 4), torch.tensor([0, 4])
    for t, split in ((0, 2), (1, 2), (2, 1), (0, 3), (0, 0)):
        student.predict(labels, x, t, codebook, split)
    assert widths == {"logits": [5, 4, 14], "embeddings": [9, 9, 9, 14]}


@pytest.mark.golden("dd_var_init_with_teacher*")
def test_var_student_starts_from_its_teacher(golden: Golden) -> None:
    k = golden.config["kwargs"]
    shapes = var_config(k, golden.config["vae_kwargs"])
    teacher = VARTransformer(VARConfig(**shapes))
    unread = VARTransformer.optional_keys(teacher.config)
    teacher.load_state_dict({key: t for key, t in golden.weights("teacher.").items() if key not in unread})
    student = VARStudent(VARStudentConfig(**shapes, layerwise=bool(golden.config["layerwise_n_d_embed"])))
    optional = VARStudent.optional_keys(student.settings)
    before = {key: t for key, t in golden.weights("student_before.").items() if key not in optional}
    student.load_state_dict(before)
    student.init_with_teacher(teacher, torch.Generator().manual_seed(0))
    after, given = student.state_dict(), dict(teacher.state_dict())
    # the row that the official code draws anew by mistake is the teacher's; the one it meant is drawn
    meant = {"class_emb.weight": (1, "teacher[1]"), "lvl_embed.weight": (1, "random")}
    for key, rule in golden.config["rules"].items():
        if key in optional or key not in after:
            continue
        if rule["rule"] == "copied":
            assert torch.equal(after[key], given[key]), key
        elif rule["rule"].startswith("unchanged"):
            assert torch.equal(after[key], before[key]), key
        else:
            rows = list(rule["rows"])
            if key in meant:
                rows[meant[key][0]] = meant[key][1]
            for row, what in enumerate(rows):
                now, was = after[key].select(rule["axis"], row), before[key].select(rule["axis"], row)
                if what.startswith("teacher"):
                    assert torch.equal(now, given[key].select(rule["axis"], int(what[8:-1]))), (key, row)
                elif what == "unchanged":
                    assert torch.equal(now, was), (key, row)
                else:
                    assert not torch.equal(now, was) and 0 < now.std() < 0.05, (key, row)


@pytest.mark.golden("dd_llamagen_init_with_teacher*")
def test_llamagen_student_starts_from_its_teacher(golden: Golden) -> None:
    k = golden.config["kwargs"]
    teacher = LlamaGenTransformer(LlamaGenConfig(**llamagen_config(k)))
    teacher.load_state_dict(golden.weights("teacher."))
    student = LlamaGenStudent(LlamaGenStudentConfig(**llamagen_config(k), codebook_dim=k["codebook_dim"]))
    student.load_state_dict(golden.weights("student_before."))
    student.init_with_teacher(teacher)
    assert set(golden.config["rules"]) == set(student.state_dict())
    for key, value in golden.weights("student_after.").items():
        assert torch.equal(student.state_dict()[key], value), key


GROUPS = {"var": (1, 1, 4, 9, 16, 25, 36, 64), "uneven": (3, 1, 130, 2), "single": (1,) * 20, "short": (1, 1, 4, 9)}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("chunk", [1 << 21, 500])
def test_grouped_attention_equals_the_dense_mask(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddfast.models.attention.CHUNK", chunk)
    groups, generator = GROUPS[name], torch.Generator().manual_seed(1)
    cpu, length = torch.device("cpu"), sum(GROUPS[name])
    qkv = torch.randn(3, 2, 3, length, 8, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
    gradient = torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64)
    results = []
    for attend in (grouped(groups, cpu), masked(group_mask(groups, cpu))):
        qkv.grad = None
        out = attend(*qkv.unbind(0), 0.3)
        out.backward(gradient)
        assert qkv.grad is not None
        results.append((out.detach(), qkv.grad.clone()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [20, 150])
def test_keys_and_values_may_have_fewer_heads(length: int) -> None:
    generator, groups, cpu = torch.Generator().manual_seed(1), (1,) * length, torch.device("cpu")
    q, k, v = (torch.randn(2, heads, length, 8, generator=generator) for heads in (4, 2, 2))
    every = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    want = masked(group_mask(groups, cpu))(q, *every, 0.3)
    torch.testing.assert_close(grouped(groups, cpu)(q, k, v, 0.3), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [(1, 1, 4, 9), (1, 1, 4, 9, 16, 25, 36, 64)], ids=["short", "long"])
def test_bfloat16_attention_errs_like_the_dense_mask(groups: tuple[int, ...]) -> None:
    """Against float64, forwards and backwards; scores and sums are float32 in both."""
    generator, cpu, length = torch.Generator().manual_seed(3), torch.device("cpu"), sum(groups)
    qkv, gradient = torch.randn(4, 2, 3, length, 32, generator=generator).bfloat16().split([3, 1])

    def run(attend: Attend, dtype: torch.dtype) -> Tensor:
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        out = attend(*(2 * leaf).unbind(0), 0.3)
        out.backward(gradient[0].to(dtype))
        assert leaf.grad is not None
        return torch.cat([out.detach()[None], leaf.grad]).double()

    dense = masked(group_mask(groups, cpu))
    exact = run(dense, torch.float64)
    errors = [(run(f, torch.bfloat16) - exact).flatten(1).norm(dim=1) for f in (grouped(groups, cpu), dense)]
    assert (errors[0] <= 3 * errors[1]).all(), errors


def test_a_position_sees_strictly_earlier_groups_and_itself() -> None:
    assert group_mask((1, 2, 1), torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 1, 1, 1],
    ]
