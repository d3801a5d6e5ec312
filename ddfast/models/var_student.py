"""The student of the VAR family: VAR's blocks over 1 + L positions, every scale seeing the coarser ones.

Axes: B images, L tokens of all scales, D width, V codebook size, C codebook channels, K scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .student import NEW_STD, EmbeddingHead, Student, add_n_d_embed
from .var import VARConfig, VARTransformer


@dataclass(frozen=True)
class VARStudentConfig(VARConfig):
    """The teacher's config (``patch_nums`` included), and whether the noise/data embedding is added inside every block
    through a linear layer of its own (``layerwise``) or as it is."""

    layerwise: bool = True

    def internal(self) -> VARConfig:
        """The backbone's config: the condition is a scale of one token before the others."""
        own = {k: v for k, v in asdict(self).items() if k != "layerwise"}
        return VARConfig(**own | {"patch_nums": (1, *self.patch_nums)})


class VARStudent(Student, VARTransformer):  # type: ignore[misc]  # forward is the student's
    """Noise or codebook rows to tokens; released as ``DD_Model``, whose keys it has."""

    kind = "var-student"

    def __init__(self, config: VARStudentConfig) -> None:
        super().__init__(config.internal())
        self.settings = config
        self.groups, self.num_classes = config.groups, config.num_classes
        self.vocab_size, self.channels = config.vocab_size, config.codebook_dim
        dim = config.embed_dim
        self.n_d_embed = nn.Embedding(2, dim)
        if config.layerwise:
            self.layerwise_n_d_embed = nn.ModuleList(nn.Linear(dim, dim) for _ in range(config.depth + 1))
        self.final_layer_conti = EmbeddingHead(dim, config.codebook_dim)

    @staticmethod
    def optional_keys(config: VARConfig) -> dict[str, tuple[int, ...]]:
        """Constant buffers of a released file, rebuilt here instead of read: name to shape."""
        assert isinstance(config, VARStudentConfig)
        return VARTransformer.optional_keys(config.internal())

    @property
    def stack(self) -> nn.ModuleList:
        return self.blocks

    @property
    def width(self) -> int:
        return self.settings.embed_dim

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        VARTransformer.init_weights(self, generator)
        self.init_own(generator)

    def units(self) -> Iterator[tuple[nn.Module, str | None]]:
        """Modulations run before the blocks that they belong to."""
        for block in self.blocks:
            if self.settings.shared_aln:
                yield block, "modulation"
            else:
                yield block.get_submodule("ada_lin"), None
                yield block, None

    def cond(self, labels: Tensor) -> Tensor:
        return self.class_emb(labels)

    def logits(self, h_BnD: Tensor, cond_BD: Tensor) -> Tensor:
        return VARTransformer.logits(self, h_BnD, cond_BD)

    def hidden(self, x_BLC: Tensor, known_BL: Tensor, cond_BD: Tensor) -> Tensor:
        def n_d(place: int) -> tuple[Tensor, Tensor]:
            """The noise/data embedding of block ``place``, or last, of the heads."""
            rows_2D = self.n_d_embed.weight
            return known_BL, self.layerwise_n_d_embed[place](rows_2D) if self.settings.layerwise else rows_2D

        attend, mods = self.attend(x_BLC), self.modulations(cond_BD)
        x = torch.cat([self.start_tokens(cond_BD), self.word_embed(x_BLC)], dim=1)
        x = x + self.positions()[:, : x.shape[1]]
        x = add_n_d_embed(x, known_BL, self.n_d_embed.weight)
        places = {block: place for place, block in enumerate(self.blocks)}

        def run(block: nn.Module, x: Tensor) -> Tensor:
            place = places[block]
            return block(x, mods[place], attend, n_d(place))

        return add_n_d_embed(self.run_blocks(run, x), *n_d(len(self.blocks)))[:, 1:]

    @torch.no_grad()
    def init_with_teacher(self, teacher: nn.Module, generator: torch.Generator | None = None) -> None:
        """Take over a :class:`VARTransformer`, key by key. The condition has its first position and level; what is new
        for the first token is drawn from a normal distribution, as is the noise/data embedding.

        (The released code draws row 1 of ``class_emb`` anew where row 1 of ``lvl_embed`` was meant.)
        """
        assert isinstance(teacher, VARTransformer)
        own, theirs = dict(self.named_parameters()), dict(teacher.named_parameters())
        for key, value in theirs.items():
            if key not in ("lvl_embed.weight", "pos_1LC"):
                own[key].copy_(value)
        for mine, given in ((self.lvl_embed.weight, teacher.lvl_embed.weight), (self.pos_1LC[0], teacher.pos_1LC[0])):
            mine[0].copy_(given[0])
            mine[2:].copy_(given[1:])
            nn.init.trunc_normal_(mine[1:2], std=NEW_STD, generator=generator)
        nn.init.trunc_normal_(self.n_d_embed.weight, std=NEW_STD, generator=generator)
