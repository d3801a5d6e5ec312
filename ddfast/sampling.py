"""Sampling by a plan: few-step (Alg. 3 of arXiv 2412.17153), teacher-involved (Alg. 4), the teacher, and the baselines
of Sec. 5.

A plan says who draws which groups. All of them start from the same noise, which is a function of the seed and the
sample's index, so that pictures by different plans show the same sample.

Axes: B images, L tokens of an image, l tokens drawn so far, V codebook size, C codebook channels, K groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import ops
from .errors import UserError
from .flow import Solver, make_solver
from .flow.tokens import raise_bad_rows
from .models import TEACHERS, Distilled, Sampling, Teacher
from .models.base import check_labels, decode_embeddings
from .models.groups import starts
from .models.student import Student
from .pairs import Decoder, PairDataset
from .pairs.manifest import Shape, check_origin

STUDENT, TEACHER, MARGINALS = "student", "teacher", "marginals"


@dataclass(frozen=True)
class Leg:
    """Groups ``first`` to ``stop`` - 1, drawn by ``who``: the student in one pass, the teacher group after group, or
    the marginals of its tokens all at once."""

    who: str
    first: int
    stop: int


Plan = tuple[Leg, ...]
"""Legs that follow one another from group 0. What the last one leaves out is not drawn."""


def few_step_plan(timesteps: Sequence[int], groups: int) -> Plan:
    """Alg. 3: the student from each timestep to the next, e.g. (0, 5) of 10 groups."""
    return tuple(Leg(STUDENT, t, stop) for t, stop in zip(timesteps, [*timesteps[1:], groups], strict=True))


def teacher_plan(groups: int, skip: int = 0) -> Plan:
    """The teacher itself; with ``skip`` the baseline skip-n, which leaves the last n groups out.

    Raises:
        UserError: nothing would be left.
    """
    if not 0 <= skip < groups:
        raise UserError(f"skip {skip} leaves nothing of {groups} groups; use 0 to {groups - 1}")
    return (Leg(TEACHER, 0, groups - skip),)


def involved_plan(first: int, stop: int, groups: int) -> Plan:
    """Alg. 4: student, teacher in groups ``first`` to ``stop`` - 1, student. The paper counts from 1:
    pre-trained-4-6 is (3, 5).

    Raises:
        UserError: these are no groups.
    """
    if not 0 <= first < stop <= groups:
        raise UserError(f"teacher groups {first}:{stop} are no groups; use A:B with 0 <= A < B <= {groups}")
    legs = Leg(STUDENT, 0, first), Leg(TEACHER, first, stop), Leg(STUDENT, stop, groups)
    return tuple(leg for leg in legs if leg.first < leg.stop)


def onestep_plan(groups: int) -> Plan:
    """The baseline onestep*: every token from its own distribution over the pairs of the class, as if independent."""
    return (Leg(MARGINALS, 0, groups),)


def passes(plan: Plan) -> int:
    """Forward passes of ``plan``: one a leg of the student, one a group of the teacher (its prefix included)."""
    return sum({STUDENT: 1, TEACHER: leg.stop - leg.first, MARGINALS: 1}[leg.who] for leg in plan)


def plan_name(plan: Plan, groups: int) -> str:
    """What the paper calls ``plan``: skip-n, onestep*, pre-trained-n-m (counted from 1); else teacher or "2 steps"."""
    who = [leg.who for leg in plan]
    if who == [MARGINALS]:
        return "onestep*"
    if who == [TEACHER]:
        return f"skip-{groups - plan[-1].stop}" if plan[-1].stop < groups else "teacher"
    if who.count(TEACHER) == 1:
        leg = plan[who.index(TEACHER)]
        return f"pre-trained-{leg.first + 1}-{leg.stop + 1}"
    return f"{len(plan)} step" + "s" * (len(plan) > 1)


def sample_noise(seed: int, samples: Tensor, length: int, channels: int) -> Tensor:
    """Noise float32 [B, length, channels] of the ``samples`` int64 [B], on their device: that of the same pairs."""
    return ops.normal_noise(seed, samples, 0, length, channels)


def uniform(noise_BLC: Tensor) -> Tensor:
    """float64 [B, L] in (0, 1): the quantile of each token's first channel. Independent, as the noise is."""
    return torch.special.ndtr(noise_BLC[:, :, 0].double())


@torch.inference_mode()
def few_step(
    student: Student, labels: Tensor, noise: Tensor, codebook: Tensor, timesteps: Sequence[int], split: int
) -> Tensor:
    """Alg. 3. One forward pass a timestep, over the groups up to the next one; later groups start from their own noise.

    The released code computes the groups behind the next timestep too, and then draws them again; no position sees a
    later group, so the outcome is the same.

    Args:
        labels: int64 [B].
        noise: float32 [B, L, C], standard normal.
        codebook: [V, C].
        timesteps: begin at 0 and rise; (0,) is one step.
        split: see :meth:`Student.predict`.

    Returns:
        float32 [B, L, C], to be decoded.
    """
    student.check_timesteps(timesteps)
    x, ends = noise[:, :0], starts(student.groups)
    for leg in few_step_plan(timesteps, len(student.groups)):
        x = torch.cat([x, noise[:, ends[leg.first] : ends[leg.stop]]], dim=1)
        x = student.predict(labels, x, leg.first, codebook, split, leg.stop)
    return x


class Marginals:
    """What each token is, class by class, in a folder of pairs: the best that one step of independent tokens can do
    (Prop. 3.1).

    A token is that of a pair of the class, drawn anew for each position: its frequencies, without counting them.
    """

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset, self.groups = dataset, dataset.manifest.groups
        labels = dataset.labels()
        self.order = labels.argsort(stable=True)
        self.counts = labels.bincount(minlength=dataset.manifest.num_classes)
        self.first = self.counts.cumsum(0) - self.counts

    def check_classes(self, classes: Iterable[int]) -> None:
        """Raise UserError for a class that the folder has no pairs of."""
        missing = next((label for label in classes if not self.counts[label]), None)
        if missing is not None:
            raise UserError(f"{self.dataset.folder} holds no pairs of class {missing}: onestep* needs some")

    def draw(self, labels: Tensor, uniform_Bl: Tensor, start: int) -> Tensor:
        """Tokens int64 [B, l] of the positions from ``start`` on.

        Args:
            labels: int64 [B].
            uniform_Bl: float64 in (0, 1).

        Raises:
            UserError: a class that the folder has no pairs of.
        """
        where = labels.cpu()
        self.check_classes(where.unique().tolist())
        counts = self.counts[where].unsqueeze(1)
        nth = (uniform_Bl.cpu() * counts).long().minimum(counts - 1)
        pairs = self.order[self.first[where].unsqueeze(1) + nth]
        places = torch.arange(start, start + uniform_Bl.shape[1]).expand_as(pairs)
        tokens = self.dataset.tokens_at(pairs.flatten(), places.flatten())
        return tokens.view_as(pairs).to(labels.device)


@dataclass(frozen=True)
class Drawing:
    """How a teacher draws its groups.

    Attributes:
        teacher, sampling: it, and its guidance and filter.
        solver: of the flow, by which a token follows from its noise.
        ordinary: draw tokens by their probabilities alone (inverse transform of one quantile a token), without a flow.
        released_prefix: see :meth:`Teacher.prefill`.
    """

    teacher: Teacher
    sampling: Sampling
    solver: Solver = field(default_factory=make_solver)
    ordinary: bool = False
    released_prefix: bool = False


def _origin(student: Distilled | None, drawing: Drawing | None) -> tuple[str, dict[str, str | None]]:
    """Name and content hashes of the teacher behind a sampler, as far as they are known."""
    if drawing is not None:
        weights = drawing.teacher.weights_sha256
        return drawing.teacher.name, {label: weights.get(label) for label in ("transformer", "tokenizer")}
    assert student is not None
    return student.teacher, {"transformer": student.teacher_sha256, "tokenizer": student.tokenizer_sha256}


class Sampler:
    """Draws images by plans.

    Args:
        student: for the student's legs.
        drawing: for the teacher's.
        marginals: for those of onestep*; they need a student's or a teacher's codebook beside them.

    Raises:
        UserError: student, teacher and pairs do not belong together; nobody is given whose codebook it is.
    """

    def __init__(
        self, student: Distilled | None = None, drawing: Drawing | None = None, marginals: Marginals | None = None
    ) -> None:
        if student is not None:
            model: Student | Teacher = student.student
            self.name, self.tokenizer, self.codebook = student.name, student.tokenizer, student.codebook
        elif drawing is not None:
            model = drawing.teacher
            self.name, self.tokenizer, self.codebook = model.name, model.tokenizer, model.codebook
        else:
            raise UserError("a sampler needs a student or a teacher")
        self.student, self.drawing, self.marginals = student, drawing, marginals
        self.groups, self.num_classes, self.device = model.groups, model.num_classes, self.codebook.device
        self.starts = starts(self.groups)
        self._check(student, drawing, marginals)
        self._decoder: Decoder | None = None

    def _check(self, student: Distilled | None, drawing: Drawing | None, marginals: Marginals | None) -> None:
        if student is not None and drawing is not None:
            teacher = drawing.teacher
            what = ""
            if teacher.groups != self.groups or not torch.equal(teacher.codebook, self.codebook):
                what = "groups or its codebook are others"
            elif student.teacher_sha256 not in (
                None,
                teacher.weights_sha256.get("transformer", student.teacher_sha256),
            ):
                what = "weights are others"
            elif student.teacher_sha256 is None and {student.teacher, teacher.name} <= TEACHERS.keys():
                what = "name is another" if student.teacher != teacher.name else ""
            if what:
                raise UserError(
                    f"{teacher.name} is not the teacher of {student.name}, which is {student.teacher}: its {what}. "
                    "Name that one with --teacher (and its files)"
                )
        if marginals is not None:
            shape = Shape.of(self.groups, self.codebook, self.num_classes)
            check_origin(marginals.dataset.folder, marginals.dataset.manifest, *_origin(student, drawing), shape)

    def _check_finite(self, x_BlC: Tensor) -> None:
        """Raise UserError where a student computed what is no number: its pictures would all be one, of any noise."""
        if not bool(x_BlC.isfinite().all()):
            raise UserError(
                f"the outputs of {self.name} are not finite: its weights overflow in this type; use --dtype bfloat16 "
                "or float32"
            )

    def check(self, plan: Plan) -> None:
        """Raise UserError unless ``plan`` goes from group 0 on and its legs have who draws them."""
        joints = [0, *(leg.stop for leg in plan)]
        if not plan or any(leg.first != at or not at < leg.stop for leg, at in zip(plan, joints, strict=False)):
            raise UserError(f"the plan {plan} does not go on from group 0, leg after leg")
        if plan[-1].stop > len(self.groups):
            raise UserError(f"the plan ends at group {plan[-1].stop}, but there are {len(self.groups)}")
        have = {STUDENT: self.student, TEACHER: self.drawing, MARGINALS: self.marginals}
        for leg in plan:
            if have[leg.who] is None:
                raise UserError(f"groups {leg.first}:{leg.stop} are to be drawn by the {leg.who}, and none is given")

    @torch.inference_mode()
    def embeddings(self, labels: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """What ``plan`` draws from ``noise``.

        Args:
            labels: int64 [B].
            noise: float32 [B, L, C], standard normal.

        Returns:
            float32 [B, l, C], all groups of the plan: codebook rows, or what the student's embedding head said.

        Raises:
            UserError: a plan that cannot be; a label that is no class; logits that overflowed.
        """
        self.check(plan)
        check_labels(labels, self.num_classes, self.name)
        x = noise[:, :0]
        for leg in plan:
            start, stop = self.starts[leg.first], self.starts[leg.stop]
            if leg.who == STUDENT:
                assert self.student is not None
                x = torch.cat([x, noise[:, start:stop]], dim=1)
                x = self.student.student.predict(labels, x, leg.first, self.codebook, self.student.split, leg.stop)
                self._check_finite(x)
                continue
            before = ops.nearest_code(x, self.codebook) if start else labels.new_empty(len(labels), 0)
            if leg.who == TEACHER:
                tokens = self._by_teacher(labels, before, noise, leg)
                if leg is not plan[-1]:
                    self._decoder = None  # the student's activations take its memory
            else:
                assert self.marginals is not None
                tokens = self.marginals.draw(labels, uniform(noise[:, start:stop]), start)
            x = self.codebook[torch.cat([before, tokens], dim=1)]
        return x

    def _by_teacher(self, labels: Tensor, before_Bl: Tensor, noise_BLC: Tensor, leg: Leg) -> Tensor:
        """The tokens of a teacher's leg, int64 [B, n]."""
        assert self.drawing is not None
        d, start, stop = self.drawing, self.starts[leg.first], self.starts[leg.stop]
        decoder = self._decoder
        if decoder is None or decoder.state.capacity < len(labels) or decoder.state.cache.positions < stop:
            self._decoder = None  # before its successor takes memory
            decoder = self._decoder = Decoder(d.teacher, labels, d.sampling, d.solver, leg.stop)
        else:
            decoder.begin(labels)
        rows = slice(0, len(labels))
        decoder.noise_BLC[rows].copy_(noise_BLC)
        d.teacher.prefill(decoder.state, before_Bl, d.released_prefix)
        uniform_BL = uniform(noise_BLC) if d.ordinary else None
        for k in range(leg.first, leg.stop):
            place = slice(self.starts[k], self.starts[k + 1])
            if uniform_BL is None:
                decoder.step(place)
            else:
                decoder.tokens_BL[rows, place] = draw_ordinary(decoder, uniform_BL[:, place])
        if uniform_BL is None:
            raise_bad_rows(decoder.evaluations_BL[rows, start:stop])  # once, since it waits for the device
        return decoder.tokens_BL[rows, start:stop].clone()

    @torch.inference_mode()
    def images(self, labels: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """:meth:`embeddings`, decoded: float32 [B, 3, H, W] in [0, 1]."""
        return decode_embeddings(self.tokenizer, self.embeddings(labels, noise, plan))

    def noise(self, seed: int, samples: Tensor) -> Tensor:
        """:func:`sample_noise` of the ``samples`` int64 [B], for this sampler's models."""
        length, channels = self.starts[-1], self.codebook.shape[1]
        return sample_noise(seed, samples.to(self.device), length, channels)


def draw_ordinary(decoder: Decoder, uniform_Bn: Tensor) -> Tensor:
    """The next group, each token by inverse transform of its guided, filtered probabilities: int64 [B, n]."""
    weight = decoder.state.weight
    cond, uncond = decoder.teacher.logits(decoder.state)
    logits = cond if uncond is None else uncond + weight * (cond - uncond)
    kept = ops.filter_logits(logits.float(), decoder.filter)
    cdf_BnV = kept.double().softmax(-1).cumsum_(-1)
    threshold = uniform_Bn.unsqueeze(-1) * cdf_BnV[..., -1:]
    tokens = torch.searchsorted(cdf_BnV, threshold, right=True).squeeze(-1)
    decoder.teacher.append(decoder.state, tokens)
    return tokens
