"""Training of the digits tokenizers: reconstruction with straight-through residual quantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.digits.data import Batches, Digits, enlarge
from ddfast.digits.loop import Ema, Progress, Schedule, fit, seeded
from ddfast.digits.metrics import psnr
from ddfast.models.digits import DigitsTokenizer, DigitsTokenizerConfig
from ddfast.models.quantizer import MultiScaleQuantizer
from ddfast.ops import nearest_code

FREE_SHARE = 1 / 14  # of the steps, at the start, run without quantization
REVIVE_EVERY = 20  # steps between two looks for unused codes
REVIVE_SHARE = 0.8  # of the steps; afterwards the codebook settles
EMA_DECAY = 0.99


@dataclass(frozen=True)
class TokenizerRecipe:
    """How a digits tokenizer is trained.

    Attributes:
        config: its shapes.
        schedule: of the training.
        commitment: weight of the pull of latents towards their codes. The higher, the fewer bits an image takes, which
            makes it easier to model.
        scale_dropout: share of images decoded from a random number of their coarser scales only. It moves information
            from the last scale, whose tokens a VAR draws independently of one another, to the scales before it.
    """

    config: DigitsTokenizerConfig
    schedule: Schedule
    commitment: float
    scale_dropout: float = 0.0


def scales_kept(num_scales: int, share: float, batch: int, generator: torch.Generator) -> Tensor:
    """How many scales each of ``batch`` images is decoded from: all, or for a random ``share`` of them 1..all - 1."""
    dropped = torch.rand(batch, generator=generator) < share
    fewer = torch.randint(1, max(num_scales, 2), (batch,), generator=generator)
    return torch.where(dropped, fewer, num_scales)


def quantize_with_loss(
    quantizer: MultiScaleQuantizer, f: Tensor, kept_B: Tensor, commitment: float
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Greedy coding of ``f`` [B, C, h, w] that gradients can cross.

    Returns the straight-through map [B, C, h, w] of each image's first ``kept_B`` scales; the loss, mean over scales of
    |f_hat - sg(f)|^2 + commitment |sg(f_hat) - f|^2 (VQ-VAE, arXiv 1711.00937, with VAR's running f_hat); per scale the
    tokens [B, n] and the vectors [B, n, C] they code.
    """
    target, f_hat, seen = f.detach(), torch.zeros_like(f), torch.zeros_like(f)
    loss = f.new_zeros(())
    tokens, vectors = [], []
    for scale, pn in enumerate(quantizer.patch_nums):
        rest = target - f_hat.detach()
        z = F.interpolate(rest, size=(pn, pn), mode="area").flatten(2).transpose(1, 2)
        tokens_Bn = nearest_code(z, quantizer.codebook)
        f_hat, _ = quantizer.embed_step(scale, tokens_Bn, f_hat)
        loss = loss + F.mse_loss(f_hat, target) + commitment * F.mse_loss(f, f_hat.detach())
        seen = torch.where((kept_B > scale).view(-1, 1, 1, 1), f_hat, seen)
        tokens.append(tokens_Bn)
        vectors.append(z)
    return f + (seen - f).detach(), loss / len(quantizer.patch_nums), tokens, vectors


class CodebookKeeper:
    """Starts the codebook from latents and moves codes that nothing uses onto random current vectors."""

    def __init__(self, quantizer: MultiScaleQuantizer, seed: int) -> None:
        self.codebook = quantizer.embedding.weight
        self.quantizer = quantizer
        self.generator = torch.Generator().manual_seed(seed)
        self.used = torch.zeros(len(self.codebook), dtype=torch.bool)

    @torch.no_grad()
    def start(self, f: Tensor) -> None:
        """Fill the codebook with the latents of ``f`` [B, C, h, w], pooled to every scale."""
        maps = [F.interpolate(f, size=(pn, pn), mode="area").flatten(2) for pn in self.quantizer.patch_nums]
        self.codebook.copy_(self._draw(torch.cat(maps, dim=2).transpose(1, 2).flatten(0, 1), len(self.codebook)))

    def watch(self, tokens: list[Tensor]) -> None:
        """Note which codes a batch used."""
        for part in tokens:
            self.used[part.flatten()] = True

    @torch.no_grad()
    def revive(self, vectors: list[Tensor]) -> None:
        """Replace the codes unseen since the last call by random ``vectors`` (each [B, n, C])."""
        dead = (~self.used).nonzero().flatten()
        if len(dead):
            pool = torch.cat([v.flatten(0, 1) for v in vectors])
            self.codebook[dead] = self._draw(pool, len(dead))
        self.used.fill_(False)

    def _draw(self, pool: Tensor, count: int) -> Tensor:
        return pool[torch.randint(len(pool), (count,), generator=self.generator)]


def train_tokenizer(
    recipe: TokenizerRecipe, train: Digits, seed: int, progress: Progress, stage: str, steps_scale: float = 1.0
) -> DigitsTokenizer:
    """A tokenizer fitted to augmented digits by mean squared error, its codebook rescaled to a std of one."""
    schedule, num_scales = recipe.schedule.scaled(steps_scale), len(recipe.config.patch_nums)
    batches = Batches(train, schedule.batch, seed)
    with seeded(seed):
        model = DigitsTokenizer(recipe.config)
    dropout = torch.Generator().manual_seed(seed + 2)
    keeper, ema = CodebookKeeper(model.quantize, seed + 1), Ema(model, EMA_DECAY)
    free = max(1, round(FREE_SHARE * schedule.steps))

    def loss_at(step: int) -> Tensor:
        images, _ = batches.next()
        f = model.latents(images)
        if step < free:
            return F.mse_loss(model.decode_raw(f), images * 2 - 1)
        if step == free:
            keeper.start(f)
        kept_B = scales_kept(num_scales, recipe.scale_dropout, len(f), dropout)
        f_st, vq_loss, tokens, vectors = quantize_with_loss(model.quantize, f, kept_B, recipe.commitment)
        keeper.watch(tokens)
        if step % REVIVE_EVERY == 0 and free < step < REVIVE_SHARE * schedule.steps:
            keeper.revive(vectors)
        return F.mse_loss(model.decode_raw(f_st), images * 2 - 1) + vq_loss

    fit(stage, model, schedule, loss_at, progress, lambda _step: ema.update())
    ema.copy_to_module()
    model.rescale_latents(1.0 / float(model.codebook.detach().std()))
    return model


@torch.no_grad()
def round_trip_psnr(model: DigitsTokenizer, data: Digits) -> float:
    """PSNR in dB of encoding and decoding the digits of ``data``, enlarged, without augmentation."""
    images = enlarge(data.images)
    return psnr(model.decode(model.encode(images))[:, :1], images)
