"""LlamaGen's VQ tokenizer (arXiv 2406.06525; released as ``vq_ds16_c2i.pt`` and ``vq_ds8_c2i.pt``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import nearest_code
from .autoencoder import LLAMAGEN_LAYOUT, Decoder, Encoder


@dataclass(frozen=True)
class LlamaGenTokenizerConfig:
    """Shapes of a LlamaGen VQ tokenizer. ``grid``, the side of the token grid, follows the teacher."""

    codebook_size: int = 16384
    codebook_dim: int = 8
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    grid: int = 16


class Codebook(nn.Module):
    """Holds the raw rows; their l2-normalised form is what is used everywhere."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)


class LlamaGenTokenizer(nn.Module):
    """Images in [0, 1] to raster tokens [B, L] and back; codebook rows have unit length."""

    def __init__(self, config: LlamaGenTokenizerConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        self.encoder = Encoder(LLAMAGEN_LAYOUT, c.ch, c.ch_mult, c.num_res_blocks, c.z_channels)
        self.decoder = Decoder(LLAMAGEN_LAYOUT, c.ch, c.ch_mult, c.num_res_blocks, c.z_channels)
        self.quantize = Codebook(c.codebook_size, c.codebook_dim)
        self.quant_conv = nn.Conv2d(c.z_channels, c.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.codebook_dim, c.z_channels, 1)

    @staticmethod
    def optional_keys(config: LlamaGenTokenizerConfig) -> dict[str, tuple[int, ...]]:
        """Entries of a released file that inference does not need: name to shape."""
        return {"quantize.codebook_used": (65536,)}

    @property
    def codebook(self) -> Tensor:
        """[V, C], rows of unit length."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    @property
    def image_size(self) -> int:
        """Side of a decoded image in pixels."""
        return int(self.config.grid * 2 ** (len(self.config.ch_mult) - 1))

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to the map [B, C, h, w] that is quantized."""
        return self.quant_conv(self.encoder(images * 2 - 1))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to tokens int64 [B, L]."""
        z = F.normalize(self.latents(images).flatten(2).transpose(1, 2), dim=-1)
        return nearest_code(z, self.codebook)

    def decode_raw(self, x_BLC: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Embeddings [B, L, C] in raster order over ``grid`` (h, w) to an image [B, 3, H, W], nominally in [-1, 1]."""
        h_BChw = x_BLC.transpose(1, 2).unflatten(2, grid or (self.config.grid, self.config.grid))
        return self.decoder(self.post_quant_conv(h_BChw))

    def decode_embeddings(self, x_BLC: Tensor) -> Tensor:
        """Embeddings [B, L, C] (codebook rows or continuous ones) to images [B, 3, H, W] in [0, 1].

        Tokens missing at the end are zeros.
        """
        whole_BLC = F.pad(x_BLC, (0, 0, 0, self.config.grid**2 - x_BLC.shape[1]))
        return self.decode_raw(whole_BLC).clamp(-1, 1).add(1).mul(0.5)

    def decode_continuous(self, x_BLC: Tensor) -> Tensor:
        """Embeddings [B, L, C] to images [B, 3, H, W], nominally in [0, 1], not clamped: every pixel has a gradient."""
        return self.decode_raw(x_BLC).add(1).mul(0.5)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] to images [B, 3, H, W] in [0, 1]."""
        return self.decode_embeddings(self.codebook[tokens])
