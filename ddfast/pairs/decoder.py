"""From noise to tokens: Alg. 1 of arXiv 2412.17153, batch after batch in buffers allocated once.

Axes: B images, n tokens of one group, L tokens of an image, V codebook size, C codebook channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..flow import Solver, solver_from_dict
from ..flow.tokens import raise_bad_rows
from ..models import Sampling, Teacher
from .dataset import Pairs
from .graphs import CudaRecorder, Recorder, Replay, record_program
from .manifest import Manifest


class Decoder:
    """Maps noise to tokens, group after group, through the flow of Eq. 3-4. Nothing here waits for the device.

    Fill ``noise_BLC`` and call :meth:`run`; for another batch, :meth:`begin` first.

    Args:
        labels: int64 [B], on the teacher's device: the first batch, and the largest.
        stop: only groups before it will be run; all by default.

    Attributes:
        noise_BLC: float32, standard normal.
        tokens_BL: int64.
        evaluations_BL: int32, of the field; below 0 where a token could not be found (see ``ops.flow``).
        state: the teacher's.
    """

    def __init__(
        self, teacher: Teacher, labels: Tensor, sampling: Sampling, solver: Solver, stop: int | None = None
    ) -> None:
        self.teacher, self.solver = teacher, solver
        self.filter, self.codebook = teacher.filter(sampling), teacher.codebook
        self.state = teacher.decode_state(labels, sampling.guidance, sampling.guidance_interval, stop)
        shape, device = (len(labels), teacher.num_tokens), teacher.device
        self.noise_BLC = torch.zeros(*shape, self.codebook.shape[1], device=device)
        self.tokens_BL = torch.zeros(shape, dtype=torch.int64, device=device)
        self.evaluations_BL = torch.zeros(shape, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def begin(self, labels: Tensor) -> None:
        """Another batch: ``labels`` int64 [b], b <= B, not checked. It uses the first b rows of every buffer."""
        self.teacher.restart(self.state, labels)

    @torch.inference_mode()
    def run(self) -> None:
        """All groups of the batch that has begun."""
        stop = 0
        for n in self.teacher.groups:
            start, stop = stop, stop + n
            self.step(slice(start, stop))

    @torch.inference_mode()
    def step(self, place: slice | Tensor) -> None:
        """The next group, at the positions ``place``: a slice, or int64 [n] on the device."""
        state, batch, weight = self.state, self.state.batch, self.state.weight
        cond, uncond = self.teacher.logits(state)
        result = ops.flow(
            cond.flatten(0, 1),
            None if uncond is None else uncond.flatten(0, 1),
            self.noise_BLC[:batch, place].flatten(0, 1),
            self.codebook,
            guidance=weight,
            filter=self.filter,
            solver=self.solver,
            check=False,
        )
        tokens_Bn = result.tokens.view(batch, -1)
        self.tokens_BL[:batch, place] = tokens_Bn
        self.evaluations_BL[:batch, place] = result.evaluations.view(batch, -1)
        self.teacher.append(state, tokens_Bn)

    def step_where_the_device_is(self) -> None:
        """The next group, its place read from the device: for teachers whose steps are alike."""
        self.step(self.state.length.long())


def decode(teacher: Teacher, labels: Tensor, noise: Tensor, sampling: Sampling, solver: Solver) -> Tensor:
    """Alg. 1, once: map each image's noise to its tokens.

    Args:
        labels: int64 [B], on the teacher's device.
        noise: float32 [B, L, C], standard normal.

    Returns:
        Tokens int64 [B, L].

    Raises:
        UserError: a label that is no class; the first image and position at which the teacher's logits overflowed.
    """
    decoder = Decoder(teacher, labels, sampling, solver)
    decoder.noise_BLC.copy_(noise)
    decoder.run()
    raise_bad_rows(decoder.evaluations_BL)  # once, since it waits for the device
    return decoder.tokens_BL


class PairDecoder:
    """Tokens of a manifest's pairs, ``batch`` consecutive ones at a time. Nothing here waits for the device.

    On a GPU a batch is a replay of CUDA graphs, recorded by the constructor; a smaller batch is then computed with
    surplus pairs beside it. Noise and labels are functions of the pair's index, taken inside the graph.

    Args:
        recorder: what records graphs; by default CUDA's on a GPU, none on a CPU.
    """

    def __init__(self, teacher: Teacher, manifest: Manifest, batch: int, recorder: Recorder | None = None) -> None:
        classes = range(manifest.num_classes) if manifest.labels is None else manifest.labels
        self.manifest, self.batch, device = manifest, batch, teacher.device
        self._classes = torch.tensor(classes, device=device)
        self._pairs_B = torch.arange(batch, device=device)
        self._labels_B = torch.zeros_like(self._pairs_B)
        sampling, solver = Sampling(**manifest.sampling), solver_from_dict(manifest.solver)
        self.decoder = Decoder(teacher, self._labels_B, sampling, solver)
        if recorder is None and device.type == "cuda":
            recorder = CudaRecorder(device)
        self._program: list[Replay] = [] if recorder is None else record_program(self.decoder, self._begin, recorder)

    @torch.inference_mode()
    def _begin(self, rows: int | None = None) -> None:
        """Labels and noise of the first ``rows`` of ``_pairs_B``, all by default; their batch has begun."""
        pairs, labels, m = self._pairs_B[:rows], self._labels_B[:rows], self.manifest
        torch.index_select(self._classes, 0, pairs % len(self._classes), out=labels)
        noise = ops.normal_noise(m.seed, pairs, 0, m.num_tokens, m.channels)
        self.decoder.noise_BLC[:rows].copy_(noise)
        self.decoder.begin(labels)

    @torch.inference_mode()
    def make(self, first: int, count: int) -> None:
        """Pairs first..first+count-1 into the first rows of the decoder's buffers."""
        rows = self.batch if self._program else count
        torch.arange(first, first + rows, out=self._pairs_B[:rows])
        if not self._program:
            self._begin(rows)
            self.decoder.run()
        for replay in self._program:
            replay()

    def pairs(self, first: int, count: int) -> Pairs:
        """Pairs first..first+count-1 as tensors of their own; waits for the device.

        Raises:
            UserError: the first image and position at which the teacher's logits overflowed.
        """
        self.make(first, count)
        decoder = self.decoder
        raise_bad_rows(decoder.evaluations_BL[:count])
        buffers = (self._labels_B, decoder.tokens_BL, decoder.noise_BLC)
        return Pairs(*(buffer[:count].clone() for buffer in buffers))
