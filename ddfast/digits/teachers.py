"""Training of the digits tokenizer-teacher pairs: a VAR and a LlamaGen transformer by teacher-forced cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.digits.data import NUM_CLASSES, Batches, Digits
from ddfast.digits.loop import Ema, Progress, Schedule, fit
from ddfast.digits.tokenizer import TokenizerRecipe, train_tokenizer
from ddfast.models.digits import DigitsTokenizer, DigitsTokenizerConfig
from ddfast.models.llamagen import LlamaGenConfig, LlamaGenTransformer
from ddfast.models.var import VARConfig, VARTransformer

WIDTH, DEPTH, HEADS = 96, 4, 3
CLASS_DROPOUT = 0.1
EMA_DECAY = 0.995


@dataclass(frozen=True)
class Recipe:
    """How one digits teacher is made.

    Attributes:
        kind: of its transformer, a key of ``ddfast.models.checkpoints.KINDS``.
        tokenizer: how its tokenizer is made.
        build: makes the transformer for a tokenizer, with uninitialised weights.
        schedule: of the transformer's training.
    """

    kind: str
    tokenizer: TokenizerRecipe
    build: Callable[[DigitsTokenizerConfig], VARTransformer | LlamaGenTransformer]
    schedule: Schedule


def build_var(c: DigitsTokenizerConfig) -> VARTransformer:
    """A VAR transformer over the tokens of a digits tokenizer."""
    config = VARConfig(DEPTH, WIDTH, HEADS, c.patch_nums, NUM_CLASSES, c.vocab_size, codebook_dim=c.channels)
    return VARTransformer(config)


def build_llamagen(c: DigitsTokenizerConfig) -> LlamaGenTransformer:
    """A LlamaGen transformer over the raster tokens of a digits tokenizer."""
    config = LlamaGenConfig(
        n_layer=DEPTH,
        n_head=HEADS,
        dim=WIDTH,
        block_size=c.patch_nums[-1] ** 2,
        vocab_size=c.vocab_size,
        num_classes=NUM_CLASSES,
    )
    return LlamaGenTransformer(config)


RECIPES = {
    "digits-var": Recipe(
        "var-transformer",
        TokenizerRecipe(
            DigitsTokenizerConfig(vocab_size=128),
            Schedule(steps=2800, lr=4e-3, weight_decay=0.0),
            commitment=2.0,
            scale_dropout=0.25,
        ),
        build_var,
        Schedule(steps=3000, lr=4e-3, weight_decay=0.05),
    ),
    "digits-llamagen": Recipe(
        "llamagen-transformer",
        TokenizerRecipe(
            DigitsTokenizerConfig(vocab_size=128, patch_nums=(4,), share_phi=0),
            Schedule(steps=1400, lr=4e-3, weight_decay=0.0),
            commitment=1.0,
        ),
        build_llamagen,
        Schedule(steps=1600, weight_decay=0.05),
    ),
}


def train_teacher(
    name: str, train: Digits, seed: int, progress: Progress, steps_scale: float = 1.0
) -> tuple[VARTransformer | LlamaGenTransformer, DigitsTokenizer]:
    """Train tokenizer, then transformer, of ``digits-var`` or ``digits-llamagen``, reproducibly by ``seed``.

    The returned weights are float32 moving averages of the last few hundred steps.
    """
    recipe = RECIPES[name]
    tokenizer = train_tokenizer(recipe.tokenizer, train, seed, progress, f"{name} tokenizer", steps_scale)
    transformer = recipe.build(tokenizer.config)
    train_transformer(
        transformer, tokenizer, train, seed + 1, progress, f"{name} transformer", recipe.schedule.scaled(steps_scale)
    )
    return transformer, tokenizer


def train_transformer(
    model: VARTransformer | LlamaGenTransformer,
    tokenizer: DigitsTokenizer,
    train: Digits,
    seed: int,
    progress: Progress,
    stage: str,
    schedule: Schedule,
) -> None:
    """Fit ``model`` in place to the tokens of augmented digits; a tenth of the labels are dropped, for guidance."""
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    batches, ema = Batches(train, schedule.batch, seed), Ema(model, EMA_DECAY)

    def loss_at(_step: int) -> Tensor:
        images, labels = batches.next()
        with torch.no_grad():
            tokens = tokenizer.encode(images)
        dropped = torch.rand(len(labels), generator=generator) < CLASS_DROPOUT
        logits = model(labels.masked_fill(dropped, NUM_CLASSES), model_inputs(model, tokenizer, tokens))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # the fused kernel's backward is slow on short rows
        fit(stage, model, schedule, loss_at, progress, lambda _step: ema.update())
    ema.copy_to_module()


@torch.no_grad()
def model_inputs(model: nn.Module, tokenizer: DigitsTokenizer, tokens: Tensor) -> Tensor:
    """What teacher forcing shows the transformer: VAR the maps [B, L - 1, C], LlamaGen the tokens [B, L] themselves."""
    return tokenizer.quantizer.teacher_forcing_inputs(tokens) if isinstance(model, VARTransformer) else tokens
