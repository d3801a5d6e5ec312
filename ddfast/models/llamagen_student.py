"""The student of the LlamaGen family: its blocks over [class, x_0 .. x_{L-1}], causal.

Axes: B images, L tokens of an image, D width, V codebook size, C codebook channels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .llamagen import LlamaGenConfig, LlamaGenTransformer
from .student import EmbeddingHead, Student, add_n_d_embed

INPUT_STD = 0.1  # of the input projection's weights


@dataclass(frozen=True)
class LlamaGenStudentConfig(LlamaGenConfig):
    """The teacher's config and the width C of a codebook entry, which a student reads and writes."""

    codebook_dim: int = 8


class LlamaGenStudent(Student, LlamaGenTransformer):  # type: ignore[misc]  # forward is the student's
    """Noise or codebook rows to tokens; released as ``DDTransformer``, whose keys it has.

    The vocabulary head reads the stream behind the last norm, the embedding head before it.
    """

    kind = "llamagen-student"
    tok_embeddings: nn.Linear  # type: ignore[assignment]

    def __init__(self, config: LlamaGenStudentConfig) -> None:
        backbone = {k: v for k, v in asdict(config).items() if k != "codebook_dim"}
        super().__init__(LlamaGenConfig(**backbone))
        self.settings = config
        self.groups, self.num_classes = (1,) * config.block_size, config.num_classes
        self.vocab_size, self.channels = config.vocab_size, config.codebook_dim
        self.tok_embeddings = nn.Linear(config.codebook_dim, config.dim)
        self.n_d_embed = nn.Embedding(2, config.dim)
        self.final_layer_conti = EmbeddingHead(config.dim, config.codebook_dim)

    @property
    def stack(self) -> nn.ModuleList:
        return self.layers

    @property
    def width(self) -> int:
        return self.settings.dim

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        LlamaGenTransformer.init_weights(self, generator)
        nn.init.normal_(self.tok_embeddings.weight, std=INPUT_STD, generator=generator)
        self.tok_embeddings.bias.zero_()
        self.init_own(generator)

    def cond(self, labels: Tensor) -> Tensor:
        return self.cls_embedding(labels)

    def hidden(self, x_BLC: Tensor, known_BL: Tensor, cond_BD: Tensor) -> Tensor:
        attend = self.attend(x_BLC)
        x = torch.cat([cond_BD.unsqueeze(1), self.tok_embeddings(x_BLC)], dim=1)
        x = add_n_d_embed(x, known_BL, self.n_d_embed.weight)
        rope = self.rope[: x.shape[1]]
        return self.run_blocks(lambda block, x: block(x, rope, attend), x)[:, 1:]

    def logits(self, h_BnD: Tensor, cond_BD: Tensor) -> Tensor:
        return self.output(self.norm(h_BnD))

    @torch.no_grad()
    def init_with_teacher(self, teacher: nn.Module, generator: torch.Generator | None = None) -> None:
        """Take over a :class:`LlamaGenTransformer`, key by key.

        The input projection, which no teacher has, keeps its values. (The least-squares map from codebook rows to the
        teacher's token embeddings learns more slowly: noise comes out of it large.)
        """
        assert isinstance(teacher, LlamaGenTransformer)
        own = dict(self.named_parameters())
        for key, value in teacher.named_parameters():
            if key != "tok_embeddings.weight":
                own[key].copy_(value)
