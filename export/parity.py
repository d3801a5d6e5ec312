"""How far an exported folder is from the torch student.

Axes: B images, L tokens of an image, C codebook channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddfast.errors import WorkError
from ddfast.models import Distilled
from ddfast.ops import nearest_code
from ddfast.sampling import few_step, sample_noise

from .engine import Engine

BATCH = 16
MOST_PSNR = 200.0  # dB of equal images: JSON has no infinity
MIN_PSNR = 25.0
"""dB of a decoder below which something is broken (an overflow, a wrong layout), not rounded."""


def psnr(a: Tensor, b: Tensor) -> float:
    """dB between images in [0, 1]; infinity where they are equal."""
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


@torch.inference_mode()
def measure(engine: Engine, model: Distilled, num: int, seed: int) -> dict[str, Any]:
    """Of ``num`` images, samples 0.. of ``seed`` with the classes in turn, by an engine that gives its embeddings.

    Returns:
        ``token_agreement`` of the trunk, the share of equal tokens, and ``embedding_error``, the largest difference
        where tokens agree; ``decoder_psnr`` and ``decoder_error`` (the largest), both decoders having been given the
        engine's own embeddings; ``images_alike``, the share of images whose tokens all agree, and ``image_error``, the
        largest difference among them, the whole way (None if there is none); ``num``, ``seed``.

    Raises:
        WorkError: an output is not finite, all images are alike, or the decoder is broken.
    """
    device, manifest = model.device, engine.manifest
    labels, samples = torch.arange(num) % manifest.shapes.num_classes, torch.arange(num)
    drawn = list(engine.draw(labels, seed, samples))
    image, embeddings = (torch.cat([part[name].to(device) for part in drawn]) for name in ("image", "embeddings"))
    for name, values in (("image", image), ("embeddings", embeddings)):
        if not values.isfinite().all():
            raise WorkError(f"the exported {name} is not finite: too narrow a type; use --precision bf16 or fp32")
    if num > 1 and bool((embeddings == embeddings[:1]).all()):
        raise WorkError(
            f"all {num} images of the export are alike, whatever their class and noise: a comparison says nothing. "
            "The student's weights or a type too narrow for them are to blame"
        )
    codebook, shapes = model.codebook, manifest.shapes
    noise = sample_noise(seed, samples.to(device), shapes.tokens, shapes.channels)
    batches = zip(labels.to(device).split(BATCH), noise.split(BATCH), strict=True)
    want = torch.cat([few_step(model.student, *b, codebook, manifest.timesteps, model.split) for b in batches])
    equal = nearest_code(want, codebook) == nearest_code(embeddings, codebook)
    alike, decoded = equal.all(1), model.images(embeddings)
    found: dict[str, Any] = {
        "num": num,
        "seed": seed,
        "token_agreement": equal.double().mean().item(),
        "embedding_error": largest((want - embeddings)[equal]),
        "decoder_psnr": min(psnr(image, decoded), MOST_PSNR),
        "decoder_error": largest(image - decoded),
        "images_alike": alike.double().mean().item(),
        "image_error": largest(image[alike] - model.images(want[alike])) if alike.any() else None,
    }
    if found["decoder_psnr"] < MIN_PSNR:
        raise WorkError(
            f"the exported decoder is {found['decoder_psnr']:.1f} dB from torch's on the same tokens, below "
            f"{MIN_PSNR:g}: use a wider --precision"
        )
    return found


def largest(differences: Tensor) -> float:
    return differences.abs().max().item() if differences.numel() else 0.0
