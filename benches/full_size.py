"""Teachers at full size for benches: the released weights' shapes, filled with random numbers."""

from __future__ import annotations

import torch

from ddfast.models import TEACHERS, TOKENIZERS, Teacher
from ddfast.models.checkpoints import KINDS
from ddfast.models.zoo import TEACHER_CLASSES


@torch.no_grad()
def random_teacher(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Teacher:
    """A teacher of the zoo at full size, its transformer with random weights that give logits of about std 2.

    The same weights on each call, for one kind of device. The transformer is in ``dtype``, the tokenizer in float32.
    """
    entry = TEACHERS[name]
    assert entry.kind is not None and entry.tokenizer is not None
    torch.manual_seed(0)
    with torch.device(device):
        transformer = KINDS[entry.kind][1](entry.config)
        tokenizer = KINDS[TOKENIZERS[entry.tokenizer].kind][1](entry.tokenizer_config)
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == entry.config.vocab_size:
            torch.nn.init.normal_(module.weight, std=2 * module.in_features**-0.5)
    torch.nn.init.normal_(tokenizer.get_parameter("quantize.embedding.weight"), std=0.5)
    teacher: Teacher = TEACHER_CLASSES[entry.kind](name, transformer.to(device, dtype), tokenizer.to(device))
    teacher.presets = dict(entry.presets)
    return teacher.requires_grad_(False).eval()
