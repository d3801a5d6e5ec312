"""The tokenizer of the bundled digits teachers: a small PixelUnshuffle VQ-VAE on 16x16 gray images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizer import MultiScaleQuantizer


@dataclass(frozen=True)
class DigitsTokenizerConfig:
    """Shapes of a digits VQ-VAE. ``patch_nums`` (1, 2, 3, 4) is VAR-like; (4,), a single scale, gives raster tokens.

    A latent cell covers 4x4 pixels, so images are ``4 * patch_nums[-1]`` pixels wide. ``share_phi`` is the number of
    residual convolutions and ``quant_resi`` their mixing ratio; a single scale has none.
    """

    vocab_size: int = 64
    channels: int = 8
    width: int = 64
    patch_nums: tuple[int, ...] = (1, 2, 3, 4)
    share_phi: int = 4
    quant_resi: float = 0.2


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))) at constant width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(4, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = x + self.conv2(F.silu(self.norm2(h)))
        return out


class RasterQuantizer(MultiScaleQuantizer):
    """A single scale without residual convolutions: the embeddings are the latent map."""

    def __init__(self, vocab_size: int, channels: int, side: int) -> None:
        super().__init__(vocab_size, channels, (side,), share_phi=0)

    def residual(self, scale: int, h_BnC: Tensor) -> Tensor:
        return h_BnC.transpose(1, 2).reshape(-1, self.channels, self.side, self.side)

    def f_hat_from_embeddings(self, x_BLC: Tensor) -> Tensor:
        """As it is; tokens missing at the end are zeros."""
        return super().f_hat_from_embeddings(F.pad(x_BLC, (0, 0, 0, self.side**2 - x_BLC.shape[1])))


def build_quantizer(config: DigitsTokenizerConfig) -> MultiScaleQuantizer:
    """The quantizer that ``config`` describes, with random weights."""
    c = config
    if len(c.patch_nums) == 1:
        return RasterQuantizer(c.vocab_size, c.channels, c.patch_nums[0])
    return MultiScaleQuantizer(c.vocab_size, c.channels, c.patch_nums, c.share_phi, c.quant_resi)


class DigitsTokenizer(nn.Module):
    """Gray digits to tokens [B, L] (all scales, coarse to fine, each in raster order) and back.

    Latents are scaled so that the codebook entries have a standard deviation of about one, like the flow's noise.
    """

    def __init__(self, config: DigitsTokenizerConfig) -> None:
        super().__init__()
        c, wide, narrow = config, config.width, config.width // 2
        self.config = config
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4, narrow, 3, padding=1),
            ResBlock(narrow),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * narrow, wide, 3, padding=1),
            ResBlock(wide),
            nn.Conv2d(wide, c.channels, 3, padding=1),
        )
        self.quantize = build_quantizer(c)
        self.decoder = nn.Sequential(
            nn.Conv2d(c.channels, wide, 3, padding=1),
            ResBlock(wide),
            nn.Conv2d(wide, 4 * narrow, 3, padding=1),
            nn.PixelShuffle(2),
            ResBlock(narrow),
            nn.Conv2d(narrow, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        return self.quantize

    @property
    def codebook(self) -> Tensor:
        """[V, C]"""
        return self.quantize.codebook

    @property
    def image_size(self) -> int:
        """Side of a decoded image in pixels."""
        return 4 * self.quantize.side

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [0, 1] (their mean over channels) to the map [B, C, h, w] that is quantized."""
        out: Tensor = self.encoder(images.mean(dim=1, keepdim=True) * 2 - 1)
        return out

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [0, 1] to tokens int64 [B, L]."""
        return torch.cat(self.quantize.encode(self.latents(images)), dim=1)

    def decode_raw(self, f_hat: Tensor) -> Tensor:
        """Latent map [B, C, h, w] to a gray image [B, 1, H, W], nominally in [-1, 1], not clamped."""
        out: Tensor = self.decoder(f_hat)
        return out

    def decode_latent(self, f_hat: Tensor) -> Tensor:
        """Latent map [B, C, h, w] to images [B, 3, H, W] in [0, 1], the gray value repeated."""
        return self.decode_raw(f_hat).clamp(-1, 1).add(1).mul(0.5).expand(-1, 3, -1, -1)

    def decode_embeddings(self, x_BLC: Tensor) -> Tensor:
        """Embeddings [B, L, C] (codebook rows or continuous ones) to images [B, 3, H, W] in [0, 1]."""
        return self.decode_latent(self.quantize.f_hat_from_embeddings(x_BLC))

    def decode_continuous(self, x_BLC: Tensor) -> Tensor:
        """Embeddings [B, L, C] to images [B, 3, H, W], nominally in [0, 1], not clamped: every pixel has a gradient."""
        raw = self.decode_raw(self.quantize.f_hat_from_embeddings(x_BLC))
        return raw.add(1).mul(0.5).expand(-1, 3, -1, -1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] to images [B, 3, H, W] in [0, 1]."""
        return self.decode_latent(self.quantize.f_hat(tokens))

    @torch.no_grad()
    def rescale_latents(self, factor: float) -> None:
        """Multiply latents and codebook by ``factor`` and undo it in the decoder: same tokens, same images.

        The residual convolutions are linear but for their biases, which are scaled too.
        """
        first, last = self.decoder[0], self.encoder[-1]
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d) and last.bias is not None
        first.weight.div_(factor)
        last.weight.mul_(factor)
        last.bias.mul_(factor)
        self.quantize.embedding.weight.mul_(factor)
        for conv in self.quantize.quant_resi.qresi_ls:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            conv.bias.mul_(factor)
