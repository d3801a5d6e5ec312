"""Plans and the sampler: every way of drawing against another that must agree, and ordinary draws by distribution."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CHANNELS, CLASSES, VOCAB
from torch import Tensor

from ddfast import ops
from ddfast.cli import main
from ddfast.errors import UserError
from ddfast.flow import make_solver
from ddfast.models import Distilled, Sampling, Teacher, load_student, load_teacher
from ddfast.models.base import decode_embeddings
from ddfast.pairs import PairDataset, decode
from ddfast.sampling import (
    MARGINALS,
    STUDENT,
    TEACHER,
    Drawing,
    Leg,
    Marginals,
    Sampler,
    few_step,
    few_step_plan,
    involved_plan,
    onestep_plan,
    passes,
    teacher_plan,
    uniform,
)


def test_plans_follow_one_another_from_group_0() -> None:
    assert few_step_plan((0, 5), 10) == (Leg(STUDENT, 0, 5), Leg(STUDENT, 5, 10))
    assert few_step_plan((0,), 10) == (Leg(STUDENT, 0, 10),)
    assert teacher_plan(10) == involved_plan(0, 10, 10) == (Leg(TEACHER, 0, 10),)
    assert teacher_plan(10, skip=2) == (Leg(TEACHER, 0, 8),)
    assert involved_plan(3, 5, 10) == (Leg(STUDENT, 0, 3), Leg(TEACHER, 3, 5), Leg(STUDENT, 5, 10))
    assert involved_plan(0, 5, 10) == (Leg(TEACHER, 0, 5), Leg(STUDENT, 5, 10))
    assert onestep_plan(10) == (Leg(MARGINALS, 0, 10),)


def test_passes_are_those_of_the_paper() -> None:
    """Table 1: pre-trained-4-6 of VAR has 4 steps, 5-6 has 3, 1-6 has 6; of LlamaGen 41-81 has 42."""
    var = [involved_plan(first - 1, stop - 1, 10) for first, stop in ((4, 6), (5, 6), (1, 6))]
    assert [passes(plan) for plan in var] == [4, 3, 6]
    assert passes(involved_plan(40, 80, 256)) == 42
    assert [passes(p) for p in (teacher_plan(10), teacher_plan(10, 2), few_step_plan((0, 5), 10))] == [10, 8, 2]
    assert passes(onestep_plan(10)) == 1


@pytest.fixture
def student(student_file: Path) -> Distilled:
    """Groups before 2 by logits, the others by the embedding head."""
    return load_student(student_file)


def drawing(teacher: Teacher, guidance: float = 2.0, **how: bool) -> Drawing:
    return Drawing(teacher, Sampling(guidance, 12, teacher.plain_sampling().top_p), **how)


@pytest.fixture
def batch(teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Labels [4] and noise [4, L, C]."""
    noise = ops.normal_noise(7, torch.arange(4), 0, teacher.num_tokens, CHANNELS)
    return torch.tensor([0, 4, 2, 4]), noise


def test_steps_that_end_early_are_the_beginning_of_the_whole(student: Distilled, batch: tuple[Tensor, Tensor]) -> None:
    labels, noise = batch
    model, starts = student.student, student.student.starts()
    for t in (0, 1):
        whole = model.predict(labels, noise, t, student.codebook, 1)
        for stop in range(t + 1, len(model.groups) + 1):
            part = model.predict(labels, noise, t, student.codebook, 1, stop)
            assert part.shape[1] == starts[stop]
            torch.testing.assert_close(part, whole[:, : starts[stop]], rtol=1e-5, atol=1e-5)


def test_a_plan_of_the_students_legs_is_few_step_sampling(student: Distilled, batch: tuple[Tensor, Tensor]) -> None:
    labels, noise = batch
    for timesteps in ((0,), (0, 2), (0, 1, 2)):
        want = few_step(student.student, labels, noise, student.codebook, timesteps, student.split)
        got = Sampler(student).embeddings(labels, noise, few_step_plan(timesteps, len(student.student.groups)))
        assert torch.equal(got, want)


def test_the_teachers_plan_is_its_map_from_noise_to_tokens(teacher: Teacher, batch: tuple[Tensor, Tensor]) -> None:
    labels, noise = batch
    d, groups = drawing(teacher), len(teacher.groups)
    want = decode(teacher, labels, noise, d.sampling, make_solver())
    sampler = Sampler(drawing=d)
    for plan in (teacher_plan(groups), involved_plan(0, groups, groups)):
        assert torch.equal(sampler.embeddings(labels, noise, plan), teacher.codebook[want])
    torch.testing.assert_close(sampler.images(labels, noise, teacher_plan(groups)), teacher.images(want))
    few = sampler.embeddings(labels[:2], noise[:2], teacher_plan(groups))  # fewer images in the buffers of more
    assert torch.equal(few, teacher.codebook[want[:2]])


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_teacher_goes_on_from_its_own_tokens(teacher: Teacher, batch: tuple[Tensor, Tensor], ordinary: bool) -> None:
    """A second leg begins with a prefill of what the first one drew."""
    sampler, groups = Sampler(drawing=drawing(teacher, ordinary=ordinary)), len(teacher.groups)
    whole = sampler.embeddings(*batch, teacher_plan(groups))
    for k in range(1, groups):
        assert torch.equal(sampler.embeddings(*batch, (Leg(TEACHER, 0, k), Leg(TEACHER, k, groups))), whole)


def test_the_teacher_in_between_goes_on_from_the_students_tokens(
    student: Distilled, teacher: Teacher, batch: tuple[Tensor, Tensor]
) -> None:
    """Alg. 4, written out: the student's nearest codes, the teacher's tokens behind them, and the student's rest."""
    labels, noise = batch
    d, model, codebook = drawing(teacher), student.student, student.codebook
    a, b = model.starts()[1], model.starts()[2]
    prefix = ops.nearest_code(model.predict(labels, noise, 0, codebook, student.split)[:, :a], codebook)
    state = teacher.decode_state(labels, d.sampling.guidance)
    weight, (cond, _) = state.weight, teacher.logits(state)
    teacher.append(state, prefix)
    weight, (cond, uncond) = state.weight, teacher.logits(state)
    assert uncond is not None
    drawn = ops.flow_tokens(
        cond.flatten(0, 1),
        uncond.flatten(0, 1),
        noise[:, a:b].flatten(0, 1),
        codebook,
        guidance=weight,
        filter=teacher.filter(d.sampling),
        solver=make_solver(),
    )
    known = codebook[torch.cat([prefix, drawn.view(len(labels), -1)], dim=1)]
    want = model.predict(labels, torch.cat([known, noise[:, b:]], dim=1), 2, codebook, student.split)
    got = Sampler(student, d).embeddings(labels, noise, involved_plan(1, 2, len(model.groups)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_released_prefix_is_another_only_where_scales_have_several_tokens(
    student: Distilled, teacher: Teacher, batch: tuple[Tensor, Tensor]
) -> None:
    last = len(teacher.groups) - 1
    plan = involved_plan(2, last + 1, last + 1)
    own, released = (
        Sampler(student, drawing(teacher, released_prefix=released)).embeddings(*batch, plan)
        for released in (False, True)
    )
    assert torch.equal(own, released) == (max(teacher.groups) == 1)


def test_samples_do_not_depend_on_the_batch(student: Distilled, teacher: Teacher, batch: tuple[Tensor, Tensor]) -> None:
    labels, noise = batch
    sampler, groups = Sampler(student, drawing(teacher, ordinary=True)), len(teacher.groups)
    for plan in (few_step_plan((0, 2), groups), involved_plan(1, 2, groups), teacher_plan(groups)):
        alone = torch.cat([sampler.embeddings(labels[i : i + 1], noise[i : i + 1], plan) for i in range(4)])
        torch.testing.assert_close(sampler.embeddings(labels, noise, plan), alone, rtol=1e-4, atol=1e-4)


def test_noise_is_that_of_the_pairs(teacher: Teacher) -> None:
    samples = torch.tensor([3, 70, 5])
    want = ops.normal_noise(11, samples, 0, teacher.num_tokens, CHANNELS)
    assert torch.equal(Sampler(drawing=drawing(teacher)).noise(11, samples), want)


def close_to(counts: Tensor, probs: Tensor) -> bool:
    """Whether counts [V] could have been drawn by probs [V]: chi-squared below its mean plus five deviations."""
    kept = probs > 0
    assert counts[~kept].sum() == 0
    expected = probs[kept] * counts.sum()
    statistic = ((counts[kept] - expected).square() / expected).sum()
    degrees = int(kept.sum()) - 1
    return bool(statistic < degrees + 5 * (2 * degrees) ** 0.5)


def test_ordinary_tokens_have_the_guided_filtered_probabilities(teacher: Teacher) -> None:
    count, label = 20_000, 3
    d = drawing(teacher, ordinary=True)
    labels = torch.full((count,), label)
    noise = ops.normal_noise(1, torch.arange(count), 0, teacher.num_tokens, CHANNELS)
    drawn = Sampler(drawing=d).embeddings(labels, noise, (Leg(TEACHER, 0, 1),))
    tokens = ops.nearest_code(drawn, teacher.codebook)[:, 0]
    state = teacher.decode_state(labels[:1], d.sampling.guidance)
    weight, (cond, uncond) = state.weight, teacher.logits(state)
    logits = cond if uncond is None else uncond + weight * (cond - uncond)
    probs = ops.filter_logits(logits, teacher.filter(d.sampling))[0, 0].double().softmax(-1)
    assert 0 < int((probs == 0).sum()) < VOCAB - 1  # the filter left some out
    assert close_to(tokens.bincount(minlength=VOCAB).double(), probs)


def test_uniforms_are_uniform() -> None:
    u = uniform(ops.normal_noise(0, torch.arange(5000), 0, 4, CHANNELS))
    assert u.shape == (5000, 4) and u.dtype == torch.float64
    assert close_to(torch.histc(u.flatten(), 50, 0, 1), torch.full((50,), 1 / 50, dtype=torch.float64))


@pytest.fixture(scope="module")
def pairs(inputs: dict[str, list[str]]) -> dict[str, Path]:
    """150 pairs of each tiny teacher, in three shards."""
    return {name: Path(options[3]) for name, options in inputs.items()}


@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_marginals_have_the_frequencies_of_the_pairs(pairs: dict[str, Path], family: str) -> None:
    dataset = PairDataset(pairs[family])
    tokens = torch.cat([dataset[[i]].tokens for i in range(len(dataset))])
    marginals, count, label = Marginals(dataset), 20_000, 2
    u = torch.rand(count, dataset.manifest.num_tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = marginals.draw(torch.full((count,), label), u, 0)
    of_class = tokens[torch.arange(len(tokens)) % CLASSES == label]
    assert len(of_class) == 30
    for place in range(drawn.shape[1]):
        probs = of_class[:, place].bincount(minlength=VOCAB).double() / len(of_class)
        assert close_to(drawn[:, place].bincount(minlength=VOCAB).double(), probs)
    assert len({tuple(row) for row in drawn.tolist()}) > len(of_class)  # positions are drawn apart
    assert torch.equal(marginals.draw(torch.full((count,), label), u[:, 1:], 1), drawn[:, 1:])


def test_tokens_at_are_those_of_the_pairs(pairs: dict[str, Path]) -> None:
    dataset = PairDataset(pairs["var"])
    where, places = torch.tensor([0, 149, 64, 63, 149]), torch.tensor([13, 0, 2, 5, 13])
    want = [int(dataset[int(i)].tokens[p]) for i, p in zip(where, places, strict=True)]
    assert dataset.tokens_at(where, places).tolist() == want
    assert dataset.labels().tolist() == [i % CLASSES for i in range(150)]


def test_onestep_draws_from_the_marginals(teacher: Teacher, pairs: dict[str, Path]) -> None:
    family = teacher.name.removeprefix("tiny-")
    sampler = Sampler(drawing=drawing(teacher), marginals=Marginals(PairDataset(pairs[family])))
    noise = ops.normal_noise(1, torch.arange(200), 0, teacher.num_tokens, CHANNELS)
    labels = torch.arange(200) % CLASSES
    got = sampler.embeddings(labels, noise, onestep_plan(len(teacher.groups)))
    assert sampler.marginals is not None
    assert torch.equal(got, teacher.codebook[sampler.marginals.draw(labels, uniform(noise), 0)])


def test_skipped_groups_add_nothing(teacher: Teacher, batch: tuple[Tensor, Tensor]) -> None:
    sampler, groups = Sampler(drawing=drawing(teacher)), len(teacher.groups)
    whole = sampler.embeddings(*batch, teacher_plan(groups))
    part = sampler.embeddings(*batch, teacher_plan(groups, skip=1))
    assert torch.equal(part, whole[:, : -teacher.groups[-1]])
    quantizer = teacher.tokenizer.quantizer  # type: ignore[union-attr]
    if max(teacher.groups) == 1:
        want = torch.cat([part, torch.zeros_like(part[:, :1])], dim=1).transpose(1, 2).unflatten(2, (3, 3))
    else:
        want = quantizer.empty_f_hat(4)
        for scale, h_BnC in enumerate(part.split(list(teacher.groups[:-1]), dim=1)):
            want, _ = quantizer.step(scale, h_BnC, want)
    images = teacher.tokenizer.decode_latent(want)  # type: ignore[operator]
    torch.testing.assert_close(sampler.images(*batch, teacher_plan(groups, skip=1)), images)


def test_images_are_decoded_a_few_at_a_time(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, teacher.num_tokens, CHANNELS, generator=torch.Generator().manual_seed(0))
    want, sizes = decode_embeddings(teacher.tokenizer, x), []
    inner = teacher.tokenizer.decode_embeddings

    def watched(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return inner(part)  # type: ignore[operator]

    monkeypatch.setattr("ddfast.models.base.PIXELS_CPU", 3 * teacher.image_size**2)
    monkeypatch.setattr(teacher.tokenizer, "decode_embeddings", watched)
    torch.testing.assert_close(decode_embeddings(teacher.tokenizer, x), want)
    assert sizes == [3, 3, 1]


def test_what_does_not_belong_together_is_refused(
    student: Distilled, teacher: Teacher, bundles: dict[str, Path], pairs: dict[str, Path]
) -> None:
    family = teacher.name.removeprefix("tiny-")
    other = {"var": "llamagen", "llamagen": "var"}[family]
    with pytest.raises(UserError, match=f"tiny-{other} is not the teacher of tiny-dd, which is tiny-{family}"):
        Sampler(student, drawing(load_teacher(str(bundles[other]))))
    with pytest.raises(
        UserError, match=f"were made by tiny-{other}, another teacher than tiny-{family}: .*groups, not"
    ):
        Sampler(student, marginals=Marginals(PairDataset(pairs[other])))
    with pytest.raises(UserError, match="needs a student or a teacher"):
        Sampler()


def test_pairs_without_a_class_are_refused(teacher: Teacher, bundles: dict[str, Path], tmp_path: Path) -> None:
    source = str(bundles[teacher.name.removeprefix("tiny-")])
    assert main(["pairs", "--teacher", source, "--num", "8", "--labels", "1,3", "--out", str(tmp_path / "p")]) == 0
    marginals = Marginals(PairDataset(tmp_path / "p"))
    with pytest.raises(UserError, match="holds no pairs of class 2"):
        marginals.draw(torch.tensor([1, 2]), torch.full((2, teacher.num_tokens), 0.5, dtype=torch.float64), 0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((), "does not go on from group 0"),
        ((Leg(TEACHER, 1, 3),), "does not go on from group 0"),
        ((Leg(TEACHER, 0, 1), Leg(TEACHER, 2, 3)), "does not go on from group 0"),
        ((Leg(TEACHER, 0, 99),), "ends at group 99"),
        ((Leg(STUDENT, 0, 3),), "groups 0:3 are to be drawn by the student, and none is given"),
        ((Leg(TEACHER, 0, 1), Leg(MARGINALS, 1, 3)), "by the marginals, and none is given"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    teacher: Teacher, batch: tuple[Tensor, Tensor], plan: tuple[Leg, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(drawing=drawing(teacher)).embeddings(*batch, plan)


def test_plans_of_no_groups_are_refused() -> None:
    with pytest.raises(UserError, match="skip 10 leaves nothing of 10 groups; use 0 to 9"):
        teacher_plan(10, 10)
    for first, stop in ((5, 5), (-1, 3), (2, 11)):
        with pytest.raises(UserError, match=f"teacher groups {first}:{stop} are no groups"):
            involved_plan(first, stop, 10)


def test_a_label_that_is_no_class_is_refused(
    student: Distilled, teacher: Teacher, batch: tuple[Tensor, Tensor]
) -> None:
    labels, noise = batch
    groups = len(teacher.groups)
    for plan in (teacher_plan(groups), few_step_plan((0,), groups)):
        with pytest.raises(UserError, match="label 5 is not a class of tiny-dd; use 0 to 4"):
            Sampler(student, drawing(teacher)).embeddings(labels + 1, noise, plan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_plan_on_a_gpu(student: Distilled, teacher: Teacher, batch: tuple[Tensor, Tensor]) -> None:
    """As on the CPU, up to the rounding of float32: nearly all tokens, and finite images."""
    labels, noise = batch
    groups = len(teacher.groups)
    parts = {"student": deepcopy(student.student).cuda(), "tokenizer": deepcopy(student.tokenizer).cuda()}
    there, theirs = replace(student, **parts), deepcopy(teacher).cuda()
    for ordinary in (False, True):
        cpu = Sampler(student, drawing(teacher, ordinary=ordinary))
        gpu = Sampler(there, drawing(theirs, ordinary=ordinary))
        for plan in (few_step_plan((0, 2), groups), involved_plan(1, 2, groups), teacher_plan(groups)):
            got = gpu.embeddings(labels.cuda(), noise.cuda(), plan).cpu()
            assert ((got - cpu.embeddings(labels, noise, plan)).abs() < 1e-2).float().mean() > 0.95
            assert gpu.images(labels.cuda(), noise.cuda(), plan).isfinite().all()
