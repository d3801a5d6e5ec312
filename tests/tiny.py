"""Tiny teachers with random weights, as bundles on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ddfast.models.checkpoints import make_part, save_bundle
from ddfast.models.digits import DigitsTokenizer, DigitsTokenizerConfig
from ddfast.models.llamagen import LlamaGenConfig, LlamaGenTransformer
from ddfast.models.var import VARConfig, VARTransformer

VOCAB, CHANNELS, CLASSES = 24, 4, 5


def random_weights(module: nn.Module, seed: int, std: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(t.shape, generator=generator) * std for k, t in module.state_dict().items()}


def tiny_bundle(path: Path, family: str, seed: int = 0) -> Path:
    """A bundle of a random teacher of the family: "var" (groups 1, 4, 9) or "llamagen" (nine tokens)."""
    if family == "var":
        config = VARConfig(2, 32, 2, (1, 2, 3), CLASSES, VOCAB, CHANNELS)
        kind, transformer, scales = "var-transformer", VARTransformer(config), config.patch_nums
    else:
        config = LlamaGenConfig(2, 2, 32, block_size=9, vocab_size=VOCAB, num_classes=CLASSES, multiple_of=32)
        kind, transformer, scales = "llamagen-transformer", LlamaGenTransformer(config), (3,)
    vq_config = DigitsTokenizerConfig(VOCAB, CHANNELS, 16, scales)
    vq_weights = random_weights(DigitsTokenizer(vq_config), seed + 1)
    vq_weights["quantize.embedding.weight"] = vq_weights["quantize.embedding.weight"] / 0.3
    parts = {
        "transformer": make_part(kind, config, random_weights(transformer, seed), "test"),
        "tokenizer": make_part("digits-tokenizer", vq_config, vq_weights, "test"),
    }
    save_bundle(path, f"tiny-{family}", parts)
    return path
