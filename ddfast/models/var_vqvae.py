"""VAR's multi-scale VQVAE: the tokenizer of the VAR teachers (released as ``vae_ch160v4096z32.pth``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .autoencoder import VAR_LAYOUT, Decoder, Encoder
from .quantizer import MultiScaleQuantizer


@dataclass(frozen=True)
class VARTokenizerConfig:
    """Shapes of a VAR VQVAE. ``patch_nums`` is not in the weights: one file serves 256 and 512 pixel models."""

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    share_phi: int = 4
    quant_resi: float = 0.5
    quant_conv_kernel: int = 3


class VARTokenizer(nn.Module):
    """Images in [0, 1] to tokens [B, L] (all scales, coarse to fine) and back."""

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        pad = c.quant_conv_kernel // 2
        self.encoder = Encoder(VAR_LAYOUT, c.ch, c.ch_mult, c.num_res_blocks, c.z_channels)
        self.decoder = Decoder(VAR_LAYOUT, c.ch, c.ch_mult, c.num_res_blocks, c.z_channels)
        self.quantize = MultiScaleQuantizer(c.vocab_size, c.z_channels, c.patch_nums, c.share_phi, c.quant_resi)
        self.quant_conv = nn.Conv2d(c.z_channels, c.z_channels, c.quant_conv_kernel, padding=pad)
        self.post_quant_conv = nn.Conv2d(c.z_channels, c.z_channels, c.quant_conv_kernel, padding=pad)

    @staticmethod
    def optional_keys(config: VARTokenizerConfig) -> dict[str, tuple[int, ...]]:
        """Entries of a released file that inference does not need: name to shape."""
        return {"quantize.ema_vocab_hit_SV": (len(config.patch_nums), config.vocab_size)}

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
        return int(self.quantize.side * 2 ** (len(self.config.ch_mult) - 1))

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to the map [B, C, h, w] that is quantized."""
        return self.quant_conv(self.encoder(images * 2 - 1))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to tokens int64 [B, L]."""
        return torch.cat(self.quantize.encode(self.latents(images)), dim=1)

    def decode_raw(self, f_hat: Tensor) -> Tensor:
        """Latent map [B, C, h, w] to an image [B, 3, H, W], nominally in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(f_hat))

    def decode_latent(self, f_hat: Tensor) -> Tensor:
        """Latent map [B, C, h, w] to images [B, 3, H, W] in [0, 1]."""
        return self.decode_raw(f_hat).clamp(-1, 1).add(1).mul(0.5)

    def decode_embeddings(self, x_BLC: Tensor) -> Tensor:
        """Embeddings [B, L, C] (codebook rows or continuous ones) to images [B, 3, H, W] in [0, 1]."""
        return self.decode_latent(self.quantize.f_hat_from_embeddings(x_BLC))

    def decode_continuous(self, x_BLC: Tensor) -> Tensor:
        """Embeddings [B, L, C] to images [B, 3, H, W], nominally in [0, 1], not clamped: every pixel has a gradient."""
        return self.decode_raw(self.quantize.f_hat_from_embeddings(x_BLC)).add(1).mul(0.5)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] to images [B, 3, H, W] in [0, 1]."""
        return self.decode_latent(self.quantize.f_hat(tokens))
