"""The nearest codebook entry in plain torch: the twin of the fused loops."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 32 * 2**20  # of scores; about what stays in a CPU's cache


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The codebook row nearest to each vector: int64 [...], for x [..., C] and codebook [V, C].

        argmin_j |x - c_j|^2 = argmax_j (x.c_j - |c_j|^2 / 2)

    Ties go to the lowest index, as far as equal distances also round equally, and a vector with a NaN gets index 0.
    Works in float64 if x is float64, otherwise in float32. Scores [N, V] exist for a chunk of the vectors at a time.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    codebook = codebook.to(dtype)
    bias = -0.5 * codebook.square().sum(dim=1)
    vectors = x.reshape(-1, x.shape[-1])
    nearest = torch.empty(len(vectors), dtype=torch.int64, device=x.device)
    rows = max(1, _CHUNK_BYTES // (dtype.itemsize * len(codebook)))
    for start in range(0, len(vectors), rows):
        part = slice(start, start + rows)
        nearest[part] = torch.addmm(bias, vectors[part].to(dtype), codebook.t()).argmax(dim=1)
    return nearest.view(x.shape[:-1])
