"""VAR's multi-scale residual quantizer (arXiv 2404.02905, Algorithms 1 and 2).

Axes: B batch, C codebook channels, h/w latent side, V codebook size, n tokens of one scale, L tokens of all scales.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import nearest_code
from .groups import first_groups


def phi_index(scale: int, num_scales: int, share: int) -> int:
    """Which of ``share`` residual convolutions serves ``scale``: its tick is nearest to scale / (num_scales - 1).

    The ticks are evenly spaced; with four of them the outer ones sit at 1/12 and 11/12. The released weights depend on
    this rule to the last bit (0.5 is a tie that float rounding resolves to index 2), hence numpy float64 as in VAR.
    """
    margin = 1 / 3 / share if share == 4 else 1 / 2 / share
    ticks = np.linspace(margin, 1 - margin, share)
    return int(np.argmin(np.abs(ticks - scale / max(num_scales - 1, 1))))


class Phi(nn.Module):
    """The convolutions of the residual connection, phi(h) = (1 - ratio) h + ratio conv(h), shared among scales."""

    def __init__(self, channels: int, share: int, ratio: float, kernel: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.qresi_ls = nn.ModuleList(nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(share))

    def conv(self, scale: int, num_scales: int) -> nn.Conv2d:
        """The convolution that serves ``scale``."""
        return cast(nn.Conv2d, self.qresi_ls[phi_index(scale, num_scales, len(self.qresi_ls))])

    def apply_scale(self, h_BChw: Tensor, scale: int, num_scales: int) -> Tensor:
        return torch.lerp(h_BChw, self.conv(scale, num_scales)(h_BChw), self.ratio)


class MultiScaleQuantizer(nn.Module):
    """Codes a latent map as tokens on a pyramid of grids; each scale codes what the coarser ones left.

    Args:
        vocab_size: V, codebook entries.
        channels: C, width of an entry.
        patch_nums: side of the token grid at each scale; the last is the side of the latent map.
        share_phi: number of residual convolutions shared among the scales.
        quant_resi: their mixing ratio.
        phi_kernel: their kernel size.

    Attributes:
        by_matrices: see :meth:`resample_by_matrices`.
    """

    by_matrices = False

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        patch_nums: tuple[int, ...],
        share_phi: int = 4,
        quant_resi: float = 0.5,
        phi_kernel: int = 3,
    ) -> None:
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.channels = channels
        self.embedding = nn.Embedding(vocab_size, channels)
        self.quant_resi = Phi(channels, share_phi, abs(quant_resi), phi_kernel)

    @property
    def codebook(self) -> Tensor:
        """[V, C]"""
        return self.embedding.weight

    @property
    def side(self) -> int:
        return self.patch_nums[-1]

    def empty_f_hat(self, batch: int) -> Tensor:
        """Zeros [B, C, h, w] in the codebook's dtype and device: the reconstruction before any token."""
        return self.codebook.new_zeros(batch, self.channels, self.side, self.side)

    def resample_by_matrices(self) -> None:
        """From here on :meth:`residual` upsamples by the constants of :meth:`matrices`: what exported graphs hold.

        Bicubic resampling between fixed sizes is linear; a product rounds less, and runtimes need no kernel for it.
        """
        for scale in range(len(self.patch_nums) - 1):
            self.register_buffer(f"up_{scale}", self.matrices(scale)[0], persistent=False)
        self.by_matrices = True

    def residual(self, scale: int, h_BnC: Tensor) -> Tensor:
        """What the embeddings [B, n, C] of one scale add to the reconstruction: [B, C, h, w]."""
        last = len(self.patch_nums) - 1
        pn = self.patch_nums[scale]
        if scale != last and self.by_matrices:
            h_BSC = self.get_buffer(f"up_{scale}") @ h_BnC
            h_BChw = h_BSC.transpose(1, 2).unflatten(2, (self.side, self.side))
            return self.quant_resi.apply_scale(h_BChw, scale, len(self.patch_nums))
        h_BChw = h_BnC.transpose(1, 2).unflatten(2, (pn, pn))
        if scale != last:
            h_BChw = F.interpolate(h_BChw, size=(self.side, self.side), mode="bicubic")
        return self.quant_resi.apply_scale(h_BChw.contiguous(), scale, len(self.patch_nums))

    def next_map(self, scale: int, f_hat: Tensor) -> Tensor | None:
        """The reconstruction at the resolution of the following scale, [B, C, pn, pn]; None after the last one."""
        if scale == len(self.patch_nums) - 1:
            return None
        pn = self.patch_nums[scale + 1]
        return F.interpolate(f_hat, size=(pn, pn), mode="area")

    def step(self, scale: int, h_BnC: Tensor, f_hat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add one scale's embeddings [B, n, C] to ``f_hat`` [B, C, h, w]; returns (f_hat, next scale's input map)."""
        f_hat = f_hat + self.residual(scale, h_BnC)
        return f_hat, self.next_map(scale, f_hat)

    def embed_step(self, scale: int, tokens_Bn: Tensor, f_hat: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`step` for token indices."""
        return self.step(scale, self.embedding(tokens_Bn), f_hat)

    def matrices(self, scale: int) -> tuple[Tensor | None, Tensor | None]:
        """Resampling of one scale between fixed sizes, as matrices for ``ops.quantizer_step``.

        Returns:
            ``up`` [S, n], bicubic from its n tokens to the S positions of the latent map, None at the last scale;
            ``down`` [m, S], area from the map to the m positions of the next scale, None after the last one.
        """
        pn, side = self.patch_nums[scale], self.side
        if scale == len(self.patch_nums) - 1:
            return None, None
        like = self.codebook
        small = torch.eye(pn * pn, dtype=like.dtype, device=like.device).view(-1, 1, pn, pn)
        whole = torch.eye(side * side, dtype=like.dtype, device=like.device).view(-1, 1, side, side)
        up = F.interpolate(small, size=(side, side), mode="bicubic").flatten(1).t().contiguous()
        down = F.interpolate(whole, size=(self.patch_nums[scale + 1],) * 2, mode="area").flatten(1).t().contiguous()
        return up, down

    def taps(self, scale: int) -> tuple[Tensor, Tensor]:
        """The convolution that serves one scale, for ``ops.quantizer_step``: [k*k, C in, C out] and [C]."""
        conv = self.quant_resi.conv(scale, len(self.patch_nums))
        assert conv.bias is not None
        return conv.weight.detach().flatten(2).permute(2, 1, 0).contiguous(), conv.bias.detach()

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, L, ...] into one [B, n, ...] per scale. ``x`` may end behind any scale."""
        return x.split(first_groups([pn * pn for pn in self.patch_nums], x.shape[1]), dim=1)

    def f_hat_from_embeddings(self, x_BLC: Tensor) -> Tensor:
        """Embeddings [B, L, C] (codebook rows or continuous ones) to the latent map [B, C, h, w].

        They may end behind any scale; those missing add nothing.
        """
        f_hat = self.empty_f_hat(x_BLC.shape[0])
        for scale, h_BnC in enumerate(self.split(x_BLC)):
            f_hat = f_hat + self.residual(scale, h_BnC)
        return f_hat

    def f_hat(self, tokens_BL: Tensor) -> Tensor:
        """Tokens [B, L] to the latent map [B, C, h, w]."""
        return self.f_hat_from_embeddings(self.embedding(tokens_BL))

    def teacher_forcing_inputs(self, tokens_BL: Tensor) -> Tensor:
        """Inputs of scales 1.. when all earlier tokens are known: [B, L - n_0, C]."""
        f_hat = self.empty_f_hat(tokens_BL.shape[0])
        maps = []
        for scale, tokens_Bn in enumerate(self.split(tokens_BL)[:-1]):
            f_hat, following = self.embed_step(scale, tokens_Bn, f_hat)
            assert following is not None
            maps.append(following.flatten(2).transpose(1, 2))
        return torch.cat(maps, dim=1)

    def encode(self, f_BChw: Tensor) -> list[Tensor]:
        """Code a latent map greedily, coarse to fine: a list of tokens [B, n], one per scale."""
        f_rest = f_BChw
        tokens = []
        for scale, pn in enumerate(self.patch_nums):
            z = f_rest if scale == len(self.patch_nums) - 1 else F.interpolate(f_rest, size=(pn, pn), mode="area")
            tokens_Bn = nearest_code(z.flatten(2).transpose(1, 2), self.codebook)
            f_rest = f_rest - self.residual(scale, self.embedding(tokens_Bn))
            tokens.append(tokens_Bn)
        return tokens
