"""LPIPS (arXiv 1801.03924), version 0.1 on VGG16.

VGG16 comes from the file that torchvision publishes, the linear heads from a file of the installed ``lpips`` package.
Neither package is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models.checkpoints import read_tensors, shortened
from ..tensors import check_finite

VGG_FILE = "vgg16-397923af.pth"
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # widths of the convolutions
MIN_SIDE = 16  # pixels that leave one position after four poolings
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # mean and deviation of ImageNet's pixels in [-1, 1]


def vgg16_features() -> nn.Sequential:
    """The convolutions of VGG16 under torchvision's indices, without the last pooling; on the meta device."""
    layers: list[nn.Module] = []
    channels = 3
    with torch.device("meta"):
        for widths in STAGES:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
    return nn.Sequential(*layers)


def unit(h_BChw: Tensor) -> Tensor:
    """Each position's features at length one. Zeros stay zeros; their gradient is NaN, which the ReLU before stops."""
    return h_BChw / (h_BChw.square().sum(1, keepdim=True).sqrt() + 1e-10)


class LPIPS(nn.Module):
    """A distance between images that follows human judgement:

        d(x, y) = sum over stages k of the mean over positions of w_k . (u_k(x) - u_k(y))^2

    u_k are the features at the end of VGG16's stage k, of unit length at each position, and w_k >= 0 the stage's head.

    Args:
        vgg: ``N.weight`` and ``N.bias`` of the convolutions, N as in torchvision's ``features``.
        heads: [1, C_k, 1, 1] for each stage.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: Mapping[str, Tensor], heads: list[Tensor]) -> None:
        super().__init__()
        self.features = vgg16_features()
        self.features.load_state_dict({key: t.float() for key, t in vgg.items()}, assign=True)
        self.heads = nn.ParameterList(head.float() for head in heads)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def stages(self, images: Tensor) -> list[Tensor]:
        """u_k [B, C_k, h_k, w_k] of ``images`` [B, 3, H, W] in [0, 1]."""
        h, out = (2 * images - 1 - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                out.append(unit(h))
            h = layer(h)
        return [*out, unit(h)]

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W] in [0, 1], at least 16 pixels wide."""
        stages = zip(self.stages(predicted), self.stages(target), self.heads, strict=True)
        return torch.stack([F.conv2d((p - t).square(), head).mean((1, 2, 3)) for p, t, head in stages]).sum(0)


def heads_file() -> Path:
    """Where the installed ``lpips`` package keeps the heads for VGG16; UserError if it is not installed."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise UserError("the distance lpips needs the heads of the lpips package; pip install 'ddfast[lpips]'")
    return Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"


def read_fitting(
    path: Path, shapes: Mapping[str, tuple[int, ...]], what: str, dropped: tuple[str, ...] = ()
) -> list[Tensor]:
    """The tensors of a file in the order of ``shapes``; those whose names begin with one of ``dropped`` are not.

    Raises UserError, listing the keys, unless the others are exactly those of ``shapes``.
    """
    tensors = {key: t for key, t in read_tensors(path).items() if not key.startswith(dropped)}
    missing = [f"missing {key} {list(shape)}" for key, shape in shapes.items() if key not in tensors]
    unexpected = [f"unexpected {key} {list(t.shape)}" for key, t in tensors.items() if key not in shapes]
    misshapen = [
        f"{key} has shape {list(t.shape)} instead of {list(shapes[key])}"
        for key, t in tensors.items()
        if key in shapes and t.shape != shapes[key]
    ]
    lines = [line for part in (missing, unexpected, misshapen) for line in shortened(part)]
    if lines:
        raise UserError(f"{path} is not {what}:\n  " + "\n  ".join(lines))
    check_finite(tensors, path)
    return [tensors[key] for key in shapes]


def load_lpips(weights: Path) -> LPIPS:
    """LPIPS with the VGG16 of torchvision's file ``weights`` and the heads of the installed ``lpips`` package.

    Raises:
        UserError: the package is not installed; a file is missing, damaged or holds another network.
    """
    heads = {f"lin{k}.model.1.weight": (1, widths[-1], 1, 1) for k, widths in enumerate(STAGES)}
    shapes = {key: tuple(t.shape) for key, t in vgg16_features().state_dict().items()}
    head_tensors = read_fitting(heads_file(), heads, "the heads of LPIPS 0.1 for VGG16; install lpips 0.1.4 again")
    prefixed = {f"features.{key}": shape for key, shape in shapes.items()}
    vgg = read_fitting(weights, prefixed, f"torchvision's VGG16 ({VGG_FILE})", dropped=("classifier.",))
    return LPIPS(dict(zip(shapes, vgg, strict=True)), head_tensors)
