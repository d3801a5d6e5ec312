"""The tokenizers against outputs of the official code."""

from __future__ import annotations

import pytest
import torch
from conftest import Golden

from ddfast.models.llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from ddfast.models.quantizer import phi_index
from ddfast.models.var_vqvae import VARTokenizer, VARTokenizerConfig


def var_tokenizer(golden: Golden) -> VARTokenizer:
    k, fixed = golden.config["kwargs"], golden.config["hardcoded"]
    config = VARTokenizerConfig(
        vocab_size=k["vocab_size"],
        z_channels=k["z_channels"],
        ch=k["ch"],
        ch_mult=tuple(fixed["ch_mult"]),
        num_res_blocks=fixed["num_res_blocks"],
        patch_nums=tuple(k["v_patch_nums"]),
        share_phi=k["share_quant_resi"],
        quant_resi=k["quant_resi"],
        quant_conv_kernel=k["quant_conv_ks"],
    )
    model = VARTokenizer(config)
    weights = golden.weights()
    for key in VARTokenizer.optional_keys(config):
        weights.pop(key, None)
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.golden("vqvae_var*")
@torch.inference_mode()
def test_var_encoder_and_tokens(golden: Golden) -> None:
    model = var_tokenizer(golden)
    f = model.latents(golden["in.image"].add(1).mul(0.5))
    golden.close(f, "out.f")
    tokens = torch.cat(model.quantizer.encode(f), dim=1)
    assert torch.equal(tokens, golden["out.idx"])
    golden.close(model.quantizer.teacher_forcing_inputs(tokens), "out.var_input")
    golden.close(model.decode_raw(model.quantizer.f_hat(tokens)).clamp(-1, 1), "out.img_recon")


@pytest.mark.golden("vqvae_var*")
@torch.inference_mode()
def test_var_stepwise_reconstruction(golden: Golden) -> None:
    model = var_tokenizer(golden)
    for kind, tokens in (("f_hat_from_img", golden["out.idx"]), ("rnd.f_hat", golden["in.rnd_idx"])):
        f_hat = model.quantizer.empty_f_hat(tokens.shape[0])
        for scale, part in enumerate(model.quantizer.split(tokens)):
            f_hat, following = model.quantizer.embed_step(scale, part, f_hat)
            golden.close(f_hat, f"out.{kind}.{scale}")
            if kind.startswith("rnd") and following is not None:
                golden.close(following, f"out.rnd.next_map.{scale}")
    tokens = golden["in.rnd_idx"]
    golden.close(model.quantizer.teacher_forcing_inputs(tokens), "out.rnd.var_input")
    golden.close(model.decode_raw(model.quantizer.f_hat(tokens)), "out.rnd.img_noclamp")
    images = model.decode(tokens)
    want = golden["out.rnd.img_noclamp"].clamp(-1, 1).add(1).mul(0.5)
    torch.testing.assert_close(images, want, rtol=golden.config["rtol"], atol=golden.config["atol"])
    assert images.shape[-1] == model.image_size == golden.config["image_size"]


@pytest.mark.golden("vqvae_var*")
def test_which_phi_serves_which_scale(golden: Golden) -> None:
    for row, want in enumerate(golden["out.phi_index_K4"].tolist()):
        scales = row + 2
        assert [phi_index(si, scales, 4) for si in range(scales)] == want[:scales]


def llamagen_tokenizer(golden: Golden) -> LlamaGenTokenizer:
    k = golden.config["kwargs"]
    assert k["encoder_ch_mult"] == k["decoder_ch_mult"]
    config = LlamaGenTokenizerConfig(
        codebook_size=k["codebook_size"],
        codebook_dim=k["codebook_embed_dim"],
        ch=golden.config["ch"],
        ch_mult=tuple(k["encoder_ch_mult"]),
        num_res_blocks=golden.config["hardcoded"]["num_res_blocks"],
        z_channels=k["z_channels"],
        grid=golden.config["token_hw"][0],
    )
    model = LlamaGenTokenizer(config)
    model.load_state_dict(golden.weights())
    return model.eval()


@pytest.mark.golden("llamagen_vq*")
@torch.inference_mode()
def test_llamagen_tokenizer(golden: Golden) -> None:
    model = llamagen_tokenizer(golden)
    images = golden["in.image"].add(1).mul(0.5)
    golden.close(model.latents(images), "out.pre_quant")
    tokens = model.encode(images)
    assert torch.equal(tokens, golden["out.idx"].view_as(tokens))
    grid = tuple(golden.config["token_hw"])
    golden.close(model.decode_raw(model.codebook[tokens], grid), "out.recon")
    embeddings = model.codebook[golden["in.rnd_idx"]]
    golden.close(embeddings.transpose(1, 2).reshape(golden["out.rnd.embed"].shape), "out.rnd.embed")
    golden.close(model.decode_raw(embeddings, grid), "out.rnd.img")
    golden.close(model.decode_raw(golden["in.cont_tokens"], grid), "out.cont.img")
    assert model.image_size == golden.config["image_size"][0]
    assert model.decode(torch.zeros(1, grid[0] ** 2, dtype=torch.long)).shape == (
        1,
        3,
        model.image_size,
        model.image_size,
    )
