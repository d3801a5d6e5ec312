"""The trainer in this process: its loss, its steps, its order, its checkpoints, each against a few lines by hand."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import make, manifest_of
from safetensors.torch import load_file
from scipy.stats import chisquare
from torch import Tensor, nn
from train_helpers import checkpoints, curve, new_trainer, settings

from ddfast.errors import UserError, WorkError
from ddfast.models import Teacher
from ddfast.models.llamagen_student import LlamaGenStudent, LlamaGenStudentConfig
from ddfast.models.student import Student
from ddfast.models.var_student import VARStudent, VARStudentConfig
from ddfast.pairs import PairDataset, Pairs
from ddfast.training import Run, Trainer, recipe
from ddfast.training.distance import L2
from ddfast.training.monitor import flops_a_pair
from ddfast.training.objective import Losses, Objective
from ddfast.training.source import OnlinePairs, StoredPairs, draw_timesteps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    """200 pairs of ``teacher``."""
    folder = tmp_path_factory.mktemp("pairs")
    make(folder, teacher, manifest_of(teacher, num=200, shard_size=64), batch=64)
    return PairDataset(folder)


# The loss


class Remembered(nn.Module):
    """A student that keeps what it was given and what it gave."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, labels: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.x = x
        self.embeddings, self.logits = self.student(labels, x, t)
        return self.embeddings, self.logits


def objective(teacher: Teacher, **changes: Any) -> tuple[Objective, Remembered]:
    student = teacher.new_student(torch.Generator().manual_seed(0))
    codebook = teacher.codebook.clone()
    return Objective(student, L2(), codebook, settings(**changes)), Remembered(student)


@torch.no_grad()
def test_the_loss_by_hand(teacher: Teacher, dataset: PairDataset) -> None:
    """Cross entropy and squared distance over the tokens that were noise, weighted 0.1 and 1, a pair at a time."""
    loss, model = objective(teacher)
    pairs, t_B = dataset[range(4)], [0, 2, 1, 2]
    losses = loss(model, pairs, torch.tensor(t_B))
    codebook = teacher.codebook
    for b, t in enumerate(t_B):
        nll, squared, hits = [], [], 0
        first = sum(teacher.groups[:t])
        for i, token in enumerate(pairs.tokens[b].tolist()):
            x, logits = model.x[b, i], model.logits[b, i].detach().double()
            if i < first:
                assert torch.equal(x, codebook[token])
                continue
            assert torch.equal(x, pairs.noise[b, i])
            nll.append(math.log(float(logits.exp().sum())) - float(logits[token]))
            squared += [
                (float(e) - float(c)) ** 2
                for e, c in zip(model.embeddings[b, i].detach(), codebook[token], strict=True)
            ]
            hits += int(logits.argmax()) == token
        cross_entropy, distance = sum(nll) / len(nll), sum(squared) / len(squared)
        assert float(losses.cross_entropy[b]) == pytest.approx(cross_entropy, rel=1e-5)
        assert float(losses.distance[b]) == pytest.approx(distance, rel=1e-5)
        assert float(losses.total[b]) == pytest.approx(distance + 0.1 * cross_entropy, rel=1e-5)
        assert float(losses.agreement[b]) == pytest.approx(hits / len(nll))


def test_a_pairs_loss_does_not_depend_on_the_batch(teacher: Teacher, dataset: PairDataset) -> None:
    loss, model = objective(teacher)
    t_B = torch.tensor([0, 2, 1, 0, 2])
    together = loss(model, dataset[range(5)], t_B).total
    alone = [loss(model, dataset[[i]], t_B[i : i + 1]).total for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro", [None, 4])
def test_gradients_are_those_of_the_batchs_mean(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset, micro: int | None
) -> None:
    """In one pass or in four; sums of float32 in another order, so rounding is all that may differ."""
    config = settings(clip_grad_norm=1e9)
    trainer = new_trainer(tmp_path, teacher, dataset, config, Run(micro_batch=micro))
    assert trainer.accumulate == (1 if micro is None else 4)
    trainer.step(0)
    loss, model = objective(teacher, clip_grad_norm=1e9)
    pairs = StoredPairs(dataset, config, CPU).batch(0, range(16))
    loss(model, pairs, draw_timesteps(config, 0)).total.mean().backward()
    for name, p in model.student.named_parameters():
        got = trainer.parameters[name].grad
        assert got is not None and p.grad is not None
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_clipped_by_their_common_norm(tmp_path: Path, teacher: Teacher, dataset: PairDataset) -> None:
    trainer = new_trainer(tmp_path, teacher, dataset, settings(clip_grad_norm=0.01))
    trainer.step(0)
    grads = torch.cat([p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None])
    assert float(grads.norm()) == pytest.approx(0.01, rel=1e-3) and float(trainer.norm) > 0.1


def test_recomputed_activations_change_no_bit(tmp_path: Path, teacher: Teacher, dataset: PairDataset) -> None:
    curves = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        new_trainer(
            folder, teacher, dataset, settings(), Run(log_every=1, activation_checkpointing=checkpointing)
        ).train()
        curves.append(curve(folder))
    assert curves[0] == curves[1] and len(curves[0]) == 7


def test_compiled_blocks_are_called(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``compile`` reaches every block, and they are what training runs."""
    compiled, ran = [], []

    def remember(block: nn.Module) -> None:
        compiled.append(block)
        block.register_forward_hook(lambda *_: ran.append(block))

    monkeypatch.setattr(nn.Module, "compile", remember)
    trainer = new_trainer(tmp_path, teacher, dataset, settings(), Run(compile=True))
    trainer.step(0)
    assert compiled == ran == list(trainer.student.stack)


# The step


def test_learning_rates_by_hand() -> None:
    linear = [0.25e-2, 0.5e-2, 0.75e-2, 1e-2]  # a warm-up of 4 steps
    constant = settings(steps=8, batch=256, lr=1e-2, warmup=4)
    assert [constant.rate(s) for s in range(8)] == pytest.approx([*linear, 1e-2, 1e-2, 1e-2, 1e-2])
    cosine = settings(steps=8, batch=256, lr=1e-2, warmup=4, schedule="cosine", final_lr_ratio=0.1)
    half = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert [cosine.rate(s) for s in range(8)] == pytest.approx([*linear, *(1e-2 * (0.1 + 0.9 * h) for h in half)])
    assert settings(batch=64, lr=1e-2).rate(0) == pytest.approx(1e-2 / 4)  # in proportion to the batch
    with pytest.raises(UserError, match="no recipe is called 'paper'; there are paper-var"):
        recipe("paper", (0,))


def test_the_optimizer_uses_each_steps_rate(tmp_path: Path, teacher: Teacher, dataset: PairDataset) -> None:
    config = settings(warmup=3, schedule="cosine", betas=(0.8, 0.7))
    trainer = new_trainer(tmp_path, teacher, dataset, config)
    for step in range(config.steps):
        trainer.step(step)
        assert [g["lr"] for g in trainer.optimizer.param_groups] == [config.rate(step)] * 2
    assert all(g["betas"] == (0.8, 0.7) for g in trainer.optimizer.param_groups)


def test_only_matrices_of_linear_layers_decay(tmp_path: Path, teacher: Teacher, dataset: PairDataset) -> None:
    """AdamW first multiplies a weight by 1 - lr * decay: that and nothing else differs after one step."""
    config = settings(weight_decay=0.5, batch=64)
    start = dict(teacher.new_student(torch.Generator().manual_seed(0)).named_parameters())
    after = []
    for i, c in enumerate((config, settings(weight_decay=0.0, batch=64))):
        trainer = new_trainer(tmp_path / str(i), teacher, dataset, c)
        trainer.step(0)
        after.append(trainer.parameters)
    linear = {f"{name}.weight" for name, m in trainer.student.named_modules() if isinstance(m, nn.Linear)}
    assert linear and len(linear) < len(start)
    for name, p in start.items():
        shrunk = p * config.rate(0) * 0.5 if name in linear else torch.zeros_like(p)
        torch.testing.assert_close(after[1][name] - after[0][name], shrunk, rtol=1e-3, atol=1e-6, msg=name)


def test_the_moving_average_by_hand(tmp_path: Path, teacher: Teacher, dataset: PairDataset) -> None:
    trainer = new_trainer(tmp_path, teacher, dataset, settings(ema=0.2))
    average = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    for step, decay in enumerate((0.1, 2 / 11, 0.2, 0.2)):  # (1 + n) / (10 + n) until that is more than 0.2
        trainer.step(step)
        for name, p in trainer.parameters.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
            torch.testing.assert_close(trainer.ema[name], average[name], msg=name)


def test_measuring_uses_the_average_and_leaves_training_as_it_was(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset
) -> None:
    config = settings()
    trainer = new_trainer(tmp_path, teacher, dataset, config)
    for step in range(3):
        trainer.step(step)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    figures = trainer.measure(3, None)
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())
    trainer.student.load_state_dict(trainer.ema, strict=False)
    with torch.no_grad():
        for t in config.timesteps:
            losses = trainer.objective(trainer.student, dataset[range(182, 200)], torch.full((18,), t))
            assert figures[f"holdout/loss_t{t}"] == pytest.approx(float(losses.total.mean()), rel=1e-5)
            assert figures[f"holdout/agreement_t{t}"] == pytest.approx(float(losses.agreement.mean()), rel=1e-5)


@pytest.mark.parametrize("unread", ["distance_weight", "ce_weight"])
def test_a_head_that_the_loss_does_not_read_stays_and_resumes(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset, unread: str
) -> None:
    config = settings(**{unread: 0.0}, split=0 if unread == "ce_weight" else None)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    new_trainer(whole, teacher, dataset, config).train()
    interrupted(new_trainer(parts, teacher, dataset, config), 3)
    new_trainer(parts, teacher, dataset, config).train()
    assert curve(parts) == curve(whole)
    assert checkpoints(parts)[-1].read_bytes() == checkpoints(whole)[-1].read_bytes()


# The order of the pairs


def watched(dataset: PairDataset, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Is filled with the indices of the pairs that are read."""
    read: list[int] = []
    rows = dataset.rows

    def remember(pairs: Tensor) -> tuple[Tensor, Tensor]:
        read.extend(pairs.tolist())
        return rows(pairs)

    monkeypatch.setattr(dataset, "rows", remember)
    return read


def test_every_pair_once_an_epoch_in_another_order_each(dataset: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read, config = watched(dataset, monkeypatch), settings(steps=91, batch=8)
    source = StoredPairs(dataset, config, CPU)
    for step in range(91):  # four epochs of 182 pairs
        source.batch(step, range(8))
    epochs = [read[i : i + 182] for i in range(0, 728, 182)]
    assert all(sorted(epoch) == list(range(182)) for epoch in epochs)  # and so none of the holdout
    assert len({tuple(epoch) for epoch in epochs}) == 4
    read.clear()
    source.holdout(range(18))
    assert read == list(range(182, 200))
    orders = set()
    for seed in range(8):
        read.clear()
        StoredPairs(dataset, settings(batch=182, seed=seed), CPU).batch(0, range(182))
        orders.add(tuple(read))
    assert len(orders) == 8


def test_ranks_and_micro_batches_do_not_change_the_order(dataset: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read, config = watched(dataset, monkeypatch), settings(batch=24)
    source = StoredPairs(dataset, config, CPU)
    for step in range(10):  # an epoch ends within step 7
        read.clear()
        source.batch(step, range(24))
        whole = list(read)
        for part in (range(12, 18), range(18, 24), range(6), range(6, 12)):
            read.clear()
            source.batch(step, part)
            assert read == whole[part.start : part.stop]


def test_timesteps_are_uniform_and_a_function_of_seed_and_step() -> None:
    config = settings(batch=500, timesteps=(0, 1, 3))
    draws = [draw_timesteps(config, step) for step in range(60)]
    counts = torch.bincount(torch.cat(draws), minlength=4).tolist()
    assert counts[2] == 0 and chisquare([counts[0], counts[1], counts[3]]).pvalue > 1e-4
    assert len({tuple(t.tolist()) for t in draws}) == 60
    assert all(torch.equal(t, draw_timesteps(config, step)) for step, t in enumerate(draws))
    others = {tuple(draw_timesteps(settings(batch=500, seed=seed), 5).tolist()) for seed in range(20)}
    assert len(others) == 20


def test_online_pairs_are_those_of_a_folder(tmp_path: Path, teacher: Teacher) -> None:
    """Step by step the manifest's pairs in order, the holdout after them: no pair twice."""
    config = settings(steps=3, batch=8, holdout=6)
    manifest = manifest_of(teacher, num=30)
    make(tmp_path, teacher, manifest)
    stored, source = PairDataset(tmp_path), OnlinePairs(teacher, manifest, config, 8)
    parts = [source.batch(step, part) for step in range(3) for part in (range(0, 2), range(2, 8))]
    made = Pairs(*(torch.cat(ts) for ts in zip(*parts, source.holdout(range(6)), strict=True)))
    want = stored[range(30)]
    assert torch.equal(made.labels, want.labels) and torch.equal(made.noise, want.noise)
    assert (made.tokens == want.tokens).float().mean() > 0.995  # batches of another size round differently
    assert len(made.noise.flatten(1).unique(dim=0)) == 30


# Stopping, going on, giving up


def interrupted(trainer: Trainer, after: int, number: int = signal.SIGINT) -> None:
    """Train until a signal that comes during the step ``after``."""
    plain = trainer.step

    def step(n: int) -> None:
        plain(n)
        if n + 1 == after:
            signal.raise_signal(number)

    trainer.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_run_stopped_at_any_step_goes_on_to_the_same_end(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset
) -> None:
    config, run = settings(steps=8), Run(log_every=3, eval_every=4, save_every=5, samples=4)
    new_trainer(tmp_path / "whole", teacher, dataset, config, run).train()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for stops in ((1, 2, 3, 4, 5, 6, 7), (4,)):
        folder = tmp_path / str(stops)
        for after in stops:
            number = signal.SIGTERM if after % 2 else signal.SIGINT
            interrupted(new_trainer(folder, teacher, dataset, config, run), after, number)
            assert checkpoints(folder)[-1].name == f"step-{after:08d}.safetensors"
        new_trainer(folder, teacher, dataset, config, run).train()
        assert curve(folder) == curve(tmp_path / "whole")
        assert checkpoints(folder)[-1].read_bytes() == checkpoints(tmp_path / "whole")[-1].read_bytes()
        assert len(checkpoints(folder)) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_finished_run_says_its_result_again_and_changes_nothing(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset
) -> None:
    measured = new_trainer(tmp_path, teacher, dataset, settings()).train()
    kept = curve(tmp_path)
    assert new_trainer(tmp_path, teacher, dataset, settings()).train() == measured
    assert curve(tmp_path) == kept


def poison_weights(trainer: Trainer, losses: Losses) -> Losses:
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(math.nan)
    return losses


def poison_loss(trainer: Trainer, losses: Losses) -> Losses:
    return Losses(losses.total * math.inf, losses.distance, losses.cross_entropy, losses.agreement)


def poison_gradient(trainer: Trainer, losses: Losses) -> Losses:
    """The loss is sound, its gradient is not: d sqrt(x) / dx at 0."""
    zero = losses.total - losses.total.detach()
    return Losses(losses.total + zero.square().sqrt(), losses.distance, losses.cross_entropy, losses.agreement)


@pytest.mark.parametrize("poison", [poison_weights, poison_loss, poison_gradient])
def test_what_is_not_finite_ends_the_run_with_the_step_named(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset, poison: Callable[[Trainer, Losses], Losses]
) -> None:
    """Poisoned in step 5; noticed at step 6, where a checkpoint is due; that of step 3 is the last."""
    run = Run(log_every=50, eval_every=50, save_every=3)
    trainer = new_trainer(tmp_path, teacher, dataset, settings(steps=9), run)
    students: list[dict[str, Tensor]] = []
    trainer.keep_student = lambda weights, step: students.append({k: t.clone() for k, t in weights.items()})
    plain, calls = trainer.objective, 0

    def objective(*inputs: Any) -> Losses:
        nonlocal calls
        calls += 1
        losses = plain(*inputs)
        return poison(trainer, losses) if calls == 5 else losses

    trainer.objective = objective  # type: ignore[assignment]
    bad = 6 if poison is poison_weights else 5  # the pass that poisons weights was computed with sound ones
    with pytest.raises(WorkError, match=f"not finite at step {bad}; the checkpoint of step 3 is sound"):
        trainer.train()
    (path,) = checkpoints(tmp_path)
    assert path.name == "step-00000003.safetensors" and len(students) == 1
    assert all(bool(t.isfinite().all()) for t in (load_file(path) | students[0]).values())


# What it says


def linear_flops(student: Student, positions: dict[str, int]) -> int:
    """6 x weights x positions; a layer is at 1 + L of them unless its name holds a key of ``positions``."""
    total = 0
    for name, module in student.named_modules():
        if isinstance(module, nn.Linear):
            place = next((n for key, n in positions.items() if key in name), 1 + student.num_tokens)
            total += 6 * module.weight.numel() * place
    return total


def test_flops_of_a_pair_by_hand() -> None:
    """Two products of attention, and backwards two for each: 12 D a query and key, of all keys where L is small. The
    noise/data embedding is a product with one-hot pairs: at the input, and in VAR in each block and before the heads.
    """
    var = VARStudent(VARStudentConfig(2, 32, 2, (1, 2, 3), 5, 24, 4))
    places = {"ada_lin": 1, "layerwise": 2, "word_embed": 14, "head": 14, "conti": 14}
    assert flops_a_pair(var) == linear_flops(var, places) + 2 * 12 * 32 * 15**2 + 4 * 12 * 32 * 15
    llamagen = LlamaGenStudent(LlamaGenStudentConfig(2, 2, 32, 9, 24, 5, multiple_of=32, codebook_dim=4))
    places = {"tok_embeddings": 9, "output": 9, "conti": 9}
    assert flops_a_pair(llamagen) == linear_flops(llamagen, places) + 2 * 12 * 32 * 10**2 + 12 * 32 * 10


def test_flops_of_attention_by_groups() -> None:
    """Where L is large, a query meets the keys of earlier groups alone."""
    scales = (1, 2, 4, 6, 9)
    student = VARStudent(VARStudentConfig(1, 32, 2, scales, 5, 24, 4, layerwise=False))
    length, seen, keys = sum(n * n for n in scales), 1, 0
    for n in scales:
        keys += n * n * seen
        seen += n * n
    assert length > 128
    places = {"ada_lin": 1, "word_embed": length, "head": length, "conti": length}
    assert flops_a_pair(student) == linear_flops(student, places) + 12 * 32 * keys + 3 * 12 * 32 * (1 + length)
