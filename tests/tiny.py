"""Tiny teachers and students with random weights, as files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddfast.models.checkpoints import Part, load_bundle, make_part, save_bundle
from ddfast.models.digits import DigitsTokenizer, DigitsTokenizerConfig
from ddfast.models.distilled import save_student
from ddfast.models.llamagen import LlamaGenConfig, LlamaGenTransformer
from ddfast.models.llamagen_student import LlamaGenStudent, LlamaGenStudentConfig
from ddfast.models.var import VARConfig, VARTransformer
from ddfast.models.var_student import VARStudent, VARStudentConfig

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


def student_part(family: str, seed: int = 3, **changes: Any) -> Part:
    """A random student of the tiny teacher of the family."""
    if family == "var":
        var = VARStudentConfig(2, 32, 2, (1, 2, 3), CLASSES, VOCAB, CHANNELS)
        var = replace(var, **changes)
        return make_part("var-student", var, random_weights(VARStudent(var), seed), "test")
    config = LlamaGenStudentConfig(2, 2, 32, 9, VOCAB, CLASSES, multiple_of=32, codebook_dim=CHANNELS)
    config = replace(config, **changes)
    return make_part("llamagen-student", config, random_weights(LlamaGenStudent(config), seed), "test")


def tiny_student(path: Path, bundle: str, family: str) -> Path:
    """A random student of a ``tiny_bundle``; groups before 2 by its logits, the others by its embeddings."""
    save_student(
        path, "tiny-dd", student_part(family), load_bundle(Path(bundle))[1]["tokenizer"], (0, 2), 2, f"tiny-{family}"
    )
    return path
