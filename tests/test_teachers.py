"""The teachers against outputs of the official code, and cached decoding against teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import Golden
from torch import Tensor, nn

from ddfast import ops
from ddfast.errors import UserError
from ddfast.flow import make_solver
from ddfast.models import load_teacher
from ddfast.models.base import Teacher
from ddfast.models.llamagen import LlamaGenConfig, LlamaGenTransformer, rope_2d
from ddfast.models.llamagen_teacher import LlamaGenTeacher
from ddfast.models.quantizer import MultiScaleQuantizer
from ddfast.models.var import VARConfig, VARTransformer
from ddfast.models.var_teacher import VARTeacher
from ddfast.pairs import decode


class QuantizerOnly(nn.Module):
    """A tokenizer without an autoencoder: the golden files of the teachers hold only the quantizer."""

    image_size = 0

    def __init__(self, quantizer: MultiScaleQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook


class CodebookOnly(nn.Module):
    image_size = 0

    def __init__(self, vocab_size: int, channels: int = 8) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(vocab_size, channels, generator=torch.Generator().manual_seed(0)))


def var_teacher(golden: Golden) -> VARTeacher:
    k, v = golden.config["kwargs"], golden.config["vae_kwargs"]
    config = VARConfig(
        depth=k["depth"],
        embed_dim=k["embed_dim"],
        num_heads=k["num_heads"],
        patch_nums=tuple(k["patch_nums"]),
        num_classes=k["num_classes"],
        vocab_size=v["vocab_size"],
        codebook_dim=v["z_channels"],
        mlp_ratio=k["mlp_ratio"],
        norm_eps=k["norm_eps"],
        shared_aln=k["shared_aln"],
        attn_l2_norm=k["attn_l2_norm"],
    )
    transformer = VARTransformer(config)
    weights = golden.weights()
    for key in VARTransformer.optional_keys(config):
        weights.pop(key, None)
    transformer.load_state_dict(weights)
    quantizer = MultiScaleQuantizer(
        v["vocab_size"], v["z_channels"], tuple(v["v_patch_nums"]), v["share_quant_resi"], v["quant_resi"]
    )
    quantizer.load_state_dict({k.removeprefix("quantize."): w for k, w in golden.weights("vae_weights.").items()})
    return VARTeacher(golden.path.stem, transformer, QuantizerOnly(quantizer)).eval()


def llamagen_teacher(golden: Golden) -> LlamaGenTeacher:
    k = golden.config["kwargs"]
    assert k["ffn_dim_multiplier"] is None and k["cls_token_num"] == 1
    config = LlamaGenConfig(
        n_layer=k["n_layer"],
        n_head=k["n_head"],
        dim=k["dim"],
        block_size=k["block_size"],
        vocab_size=k["vocab_size"],
        num_classes=k["num_classes"],
        n_kv_head=k["n_kv_head"],
        multiple_of=k["multiple_of"],
        norm_eps=k["norm_eps"],
        rope_base=k["rope_base"],
    )
    assert config.ffn_hidden == golden.config["ffn_hidden"]
    transformer = LlamaGenTransformer(config)
    transformer.load_state_dict(golden.weights())
    return LlamaGenTeacher(golden.path.stem, transformer, CodebookOnly(config.vocab_size)).eval()


def guided(teacher: Teacher, labels: Tensor, tokens: Tensor, guidance: float, interval: int = -1) -> list[Tensor]:
    """Guided logits of every group, decoding with forced tokens through the wall, in poisoned buffers."""
    torch.use_deterministic_algorithms(True)  # torch.empty then returns NaN: a cache entry read before written shows
    try:
        state = teacher.decode_state(labels, guidance, interval)
        assert state.cache.data_N2RHLd.isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    address = state.cache.data_N2RHLd.data_ptr()
    out, start = [], 0
    for n in teacher.groups:
        weight = state.weight
        cond, uncond = teacher.logits(state)
        out.append(cond if uncond is None else uncond + weight * (cond - uncond))
        teacher.append(state, tokens[:, start : start + n])
        start += n
    assert state.cache.data_N2RHLd.data_ptr() == address
    return out


def from_prefix(
    teacher: Teacher, labels: Tensor, tokens: Tensor, guidance: float, start: int, released: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(group, its guided logits) from group ``start`` on, those before it being prefilled, all tokens forced."""
    state = teacher.decode_state(labels, guidance)
    parts = tokens.split(list(teacher.groups), dim=1)
    teacher.prefill(state, torch.cat([tokens[:, :0], *parts[:start]], dim=1), released)
    for k in range(start, len(parts)):
        weight = state.weight
        cond, uncond = teacher.logits(state)
        yield k, cond if uncond is None else uncond + weight * (cond - uncond)
        teacher.append(state, parts[k])
        assert int(state.length) == state.cache.start == sum(teacher.groups[: k + 1])


@pytest.mark.golden("var_teacher_*")
@torch.inference_mode()
def test_var_teacher_forcing(golden: Golden) -> None:
    teacher = var_teacher(golden)
    inputs = teacher.tokenizer.quantizer.teacher_forcing_inputs(golden["in.idx"])
    golden.close(inputs, "out.x_BLCv_wo_first_l")
    golden.close(teacher.transformer(golden["in.label"], inputs), "out.logits_tf")
    nobody = torch.full_like(golden["in.label"], teacher.num_classes)
    golden.close(teacher.transformer(nobody, inputs), "out.logits_tf_uncond")


@pytest.mark.golden("var_teacher_*")
@torch.inference_mode()
def test_var_guided_decoding(golden: Golden) -> None:
    teacher = var_teacher(golden)
    labels, tokens = golden["in.label"], golden["in.idx"]
    for k, logits in enumerate(guided(teacher, labels, tokens, golden.config["cfg"])):
        golden.close(logits, f"out.ar.cfg_logits.{k}")
    quantizer = teacher.tokenizer.quantizer
    f_hat = quantizer.empty_f_hat(len(labels))
    for k, part in enumerate(quantizer.split(tokens)):
        f_hat, following = quantizer.embed_step(k, part, f_hat)
        golden.close(f_hat, f"out.ar.f_hat.{k}")
        if following is not None:
            golden.close(following, f"out.ar.next_map.{k}")


@pytest.mark.golden("var_teacher_*")
@torch.inference_mode()
def test_var_unmasked_prefix_of_the_official_sampler(golden: Golden) -> None:
    teacher, cfg = var_teacher(golden), golden.config["cfg"]
    for start in golden.config["prefix_nomask"]["starts"]:
        for k, logits in from_prefix(teacher, golden["in.label"], golden["in.idx"], cfg, start, released=True):
            golden.close(logits, f"out.prefix_nomask.start{start}.cfg_logits.{k}")


@pytest.mark.golden("var_teacher_*")
@torch.inference_mode()
def test_var_prefix_equals_decoding_from_the_start(golden: Golden) -> None:
    teacher, cfg = var_teacher(golden), golden.config["cfg"]
    for start in range(len(teacher.groups)):
        for k, logits in from_prefix(teacher, golden["in.label"], golden["in.idx"], cfg, start):
            golden.close(logits, f"out.ar.cfg_logits.{k}")


@pytest.mark.golden("llamagen_teacher*")
@torch.inference_mode()
def test_llamagen_teacher_forcing(golden: Golden) -> None:
    teacher = llamagen_teacher(golden)
    golden.close(teacher.transformer.rope, "out.freqs_cis")
    labels, tokens = golden["in.label"], golden["in.idx"]
    golden.close(teacher.transformer(labels, tokens), "out.logits_tf")
    nobody = torch.full_like(labels, teacher.num_classes)
    golden.close(teacher.transformer(nobody, tokens), "out.logits_tf_uncond")


@pytest.mark.golden("llamagen_teacher*")
@torch.inference_mode()
def test_llamagen_guided_decoding(golden: Golden) -> None:
    teacher = llamagen_teacher(golden)
    labels, tokens, scale = golden["in.label"], golden["in.idx"], golden.config["cfg_scale"]
    for interval in golden.config["cfg_intervals"]:
        logits = torch.cat(guided(teacher, labels, tokens, scale, interval), dim=1)
        golden.close(logits, f"out.ar.cfg_logits.interval{interval}")
    golden.close(torch.cat(guided(teacher, labels, tokens, 1.0), dim=1), "out.ar.logits_nocfg")


@pytest.mark.golden("llamagen_teacher*")
@torch.inference_mode()
def test_llamagen_prefix(golden: Golden) -> None:
    teacher, scale, start = llamagen_teacher(golden), golden.config["cfg_scale"], golden.config["prefix_start"]
    parts = from_prefix(teacher, golden["in.label"], golden["in.idx"], scale, start)
    golden.close(torch.cat([logits for _, logits in parts], dim=1), f"out.prefix.start{start}.cfg_logits")


@torch.inference_mode()
def test_a_prefix_behind_the_last_guided_token_needs_no_unconditional_rows() -> None:
    teacher, labels = tiny_llamagen(), torch.tensor([1, 2])
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(1))
    want = guided(teacher, labels, tokens, 2.0, interval=0)
    state = teacher.decode_state(labels, 2.0, interval=0)
    teacher.prefill(state, tokens[:, :4])
    cond, uncond = teacher.logits(state)
    assert uncond is None and state.rows == 2
    torch.testing.assert_close(cond, want[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "fixed", "message"),
    [(2, False, "2 tokens end within a group"), (30, False, "a whole image"), (1, True, "1 groups .* call restart")],
)
def test_a_prefix_that_cannot_be_is_refused(count: int, fixed: bool, message: str) -> None:
    teacher = load_teacher("digits-var")
    state = teacher.decode_state(torch.tensor([1]), 0.5)
    if fixed:
        teacher.logits(state)
        teacher.append(state, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UserError, match=message):
        teacher.prefill(state, torch.zeros(1, count, dtype=torch.int64))


@pytest.mark.golden("var_teacher_*", "llamagen_teacher*")
@torch.inference_mode()
def test_cached_decoding_equals_teacher_forcing(golden: Golden) -> None:
    if golden.config["case"] == "var_teacher":
        teacher: Teacher = var_teacher(golden)
        inputs = teacher.tokenizer.quantizer.teacher_forcing_inputs(golden["in.idx"])
        unguided = 0.0
    else:
        teacher, inputs, unguided = llamagen_teacher(golden), golden["in.idx"], 1.0
    want = teacher.transformer(golden["in.label"], inputs)
    got = torch.cat(guided(teacher, golden["in.label"], golden["in.idx"], unguided), dim=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def tiny_llamagen(**changes: int) -> LlamaGenTeacher:
    config = LlamaGenConfig(
        **{"n_layer": 2, "n_head": 4, "dim": 32, "block_size": 9, "vocab_size": 16, "num_classes": 5} | changes
    )
    transformer = LlamaGenTransformer(config)
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return LlamaGenTeacher("tiny", transformer, CodebookOnly(16)).eval()


@torch.inference_mode()
def test_grouped_query_attention_decodes_like_teacher_forcing() -> None:
    teacher = tiny_llamagen(n_kv_head=2)
    labels, tokens = torch.tensor([0, 4]), torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(1))
    got = torch.cat(guided(teacher, labels, tokens, 1.0), dim=1)
    torch.testing.assert_close(got, teacher.transformer(labels, tokens), rtol=1e-4, atol=1e-4)


def test_rows_without_class_are_dropped_once_guidance_ends() -> None:
    teacher = tiny_llamagen()
    state = teacher.decode_state(torch.tensor([1, 2]), 2.0, interval=0)
    rows = []
    for _ in teacher.groups:
        rows.append(state.rows)
        teacher.logits(state)
        teacher.append(state, torch.zeros(2, 1, dtype=torch.long))
    assert rows == [4, 4] + [2] * 7


def test_a_class_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="label 5 .* use 0 to 4"):
        tiny_llamagen().decode_state(torch.tensor([0, 5]), 1.0)


def test_head_width_of_the_3b_model_has_a_rotation_table() -> None:
    assert rope_2d(24, 100, 10000.0).shape == (577, 50, 2)


# Decoding with packed weights


@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
@torch.inference_mode()
def test_tokens_agree_with_the_plain_module_given_the_same_prefix(name: str) -> None:
    """Float32, guided: at least 99.5% of the tokens."""
    teacher = load_teacher(name)
    sampling, solver = teacher.preset("release"), make_solver()
    labels = torch.arange(100) % 10
    noise = torch.randn(100, teacher.num_tokens, teacher.codebook.shape[1], generator=torch.Generator().manual_seed(3))
    tokens = decode(teacher, labels, noise, sampling, solver)
    inputs = teacher.tokenizer.quantizer.teacher_forcing_inputs(tokens) if name == "digits-var" else tokens
    cond, uncond = (teacher.transformer(who, inputs) for who in (labels, torch.full_like(labels, teacher.num_classes)))
    weights = torch.tensor(teacher.guidance_weights(sampling.guidance)).repeat_interleave(torch.tensor(teacher.groups))
    logits = (uncond + weights[:, None] * (cond - uncond)).flatten(0, 1)
    flat, keep = noise.flatten(0, 1), teacher.filter(sampling)
    want = ops.flow_tokens(logits, None, flat, teacher.codebook, guidance=1.0, filter=keep, solver=solver)
    assert (tokens.flatten() == want).float().mean() >= 0.995


def small_teachers() -> list[Teacher]:
    return [tiny_llamagen(), load_teacher("digits-var")]


def first_logits(teacher: Teacher) -> Tensor:
    return teacher.logits(teacher.decode_state(torch.tensor([1, 2]), 0.5))[0]


@pytest.mark.parametrize("teacher", small_teachers(), ids=lambda t: t.name)
def test_released_matrices_serve_decoding_alone(teacher: Teacher) -> None:
    before = first_logits(teacher)
    held = sum(p.numel() for p in teacher.transformer.parameters())
    teacher.prepare(release=True)
    torch.testing.assert_close(first_logits(teacher), before)
    assert sum(p.numel() for p in teacher.transformer.parameters()) < 0.5 * held
    with pytest.raises(UserError, match="released by prepare"):
        teacher.transformer(torch.tensor([1]), torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(UserError, match="released by prepare.*load it again"):
        teacher.to(torch.bfloat16).decode_state(torch.tensor([1]), 1.0)


@pytest.mark.parametrize("teacher", small_teachers(), ids=lambda t: t.name)
def test_weights_that_change_are_packed_again(teacher: Teacher) -> None:
    before = first_logits(teacher)
    with torch.no_grad():
        next(p for k, p in teacher.transformer.named_parameters() if k.endswith(("head.weight", "output.weight"))).mul_(
            2
        )
    after = first_logits(teacher)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(first_logits(teacher.double()).float(), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("teacher", small_teachers(), ids=lambda t: t.name)
@torch.inference_mode()
def test_a_batch_begun_again_is_as_a_new_one(teacher: Teacher) -> None:
    """In buffers full of the last one's numbers, and for fewer images."""
    interval = 2 if teacher.steps_alike else -1
    state = teacher.decode_state(torch.tensor([0, 1, 2]), 2.0, interval)
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([3, 4]), torch.tensor([2, 1, 0])):
        teacher.restart(state, labels)
        fresh = teacher.decode_state(labels, 2.0, interval)
        for _ in teacher.groups:
            got, want = teacher.logits(state), teacher.logits(fresh)
            assert torch.equal(got[0], want[0]) and (got[1] is None) == (want[1] is None)
            assert int(state.length) == int(fresh.length)
            tokens = want[0].argmax(-1)
            for one in (state, fresh):
                teacher.append(one, tokens)
        with pytest.raises(UserError, match="more do not fit"):
            state.cache.advance(1)


def test_a_precision_the_device_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="fp8"):
        tiny_llamagen().prepare("fp8")
