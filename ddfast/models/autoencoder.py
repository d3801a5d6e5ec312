"""The convolutional autoencoder that both families' tokenizers share, under each family's parameter names.

Both derive from the same VQGAN code: residual blocks with group normalisation, self-attention at the coarsest level,
stride-2 downsampling padded on the right and bottom. Only names and the packing of q, k, v differ, so that released
files load key by key.

Axes: B batch, H/W image side, h/w latent side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Parameter names of one family's autoencoder."""

    encoder_stages: str
    decoder_stages: str
    res: str
    mid: tuple[str, str, str]
    fused_qkv: bool
    decoder_coarse_first: bool  # whether decoder stage 0 is the coarsest (first applied) one


VAR_LAYOUT = Layout("down", "up", "block", ("block_1", "attn_1", "block_2"), fused_qkv=True, decoder_coarse_first=False)
LLAMAGEN_LAYOUT = Layout(
    "conv_blocks", "conv_blocks", "res", ("0", "1", "2"), fused_qkv=False, decoder_coarse_first=True
)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))"""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm1 = group_norm(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = group_norm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the map, with 1x1 convolutions as projections."""

    q: nn.Conv2d
    k: nn.Conv2d
    v: nn.Conv2d
    qkv: nn.Conv2d

    def __init__(self, channels: int, fused_qkv: bool) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        for name in ("qkv",) if fused_qkv else ("q", "k", "v"):
            setattr(self, name, nn.Conv2d(channels, 3 * channels if fused_qkv else channels, 1))
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.fused_qkv = fused_qkv

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, dim=1) if self.fused_qkv else (self.q(h), self.k(h), self.v(h))
        q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (q, k, v))  # [B, 1, h*w, channels]
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(out)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """The residual blocks of one resolution, each followed by attention where ``attn``, then a resampling."""

    def __init__(self, layout: Layout, cin: int, cout: int, blocks: int, attn: bool) -> None:
        super().__init__()
        self.res_name = layout.res
        setattr(self, layout.res, nn.ModuleList(ResBlock(cin if i == 0 else cout, cout) for i in range(blocks)))
        self.attn = nn.ModuleList(AttnBlock(cout, layout.fused_qkv) for _ in range(blocks if attn else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, res in enumerate(getattr(self, self.res_name)):
            x = res(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class Mid(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, layout: Layout, channels: int) -> None:
        super().__init__()
        res_in, attn, res_out = layout.mid
        self.add_module(res_in, ResBlock(channels, channels))
        self.add_module(attn, AttnBlock(channels, layout.fused_qkv))
        self.add_module(res_out, ResBlock(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


class Encoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] to features [B, z_channels, h, w]."""

    def __init__(self, layout: Layout, ch: int, ch_mult: tuple[int, ...], res_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        stages = []
        for i, (cin, cout) in enumerate(zip([ch, *widths[:-1]], widths, strict=True)):
            stage = Stage(layout, cin, cout, res_blocks, attn=i == last)
            if i != last:
                stage.downsample = Downsample(cout)
            stages.append(stage)
        self.stages_name = layout.encoder_stages
        setattr(self, self.stages_name, nn.ModuleList(stages))
        self.mid = Mid(layout, widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in getattr(self, self.stages_name):
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features [B, z_channels, h, w] to an image [B, 3, H, W], nominally in [-1, 1], not clamped."""

    def __init__(self, layout: Layout, ch: int, ch_mult: tuple[int, ...], res_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch * m for m in reversed(ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = Mid(layout, widths[0])
        stages = []
        for i, (cin, cout) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            stage = Stage(layout, cin, cout, res_blocks + 1, attn=i == 0)
            if i != last:
                stage.upsample = Upsample(cout)
            stages.append(stage)
        self.coarse_first = layout.decoder_coarse_first
        self.stages_name = layout.decoder_stages
        setattr(self, self.stages_name, nn.ModuleList(stages if self.coarse_first else reversed(stages)))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        stages: Iterable[nn.Module] = getattr(self, self.stages_name)
        for stage in stages if self.coarse_first else reversed(list(stages)):
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))
