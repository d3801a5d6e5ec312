"""Students and their trainer on CUDA, against the CPU; and FlexAttention's rule, as far as a CPU can tell."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import make, manifest_of, needs_gpu
from safetensors.torch import load_file
from torch import Tensor
from train_helpers import checkpoints, curve, new_trainer, settings

from ddfast import ops
from ddfast.cli import main
from ddfast.models import Teacher, load_student, load_teacher
from ddfast.models.attention import Attend, _flex, group_mask, grouped, masked
from ddfast.models.var import Block, VARConfig
from ddfast.pairs import PairDataset, Pairs
from ddfast.sampling import few_step
from ddfast.training import Run, Trainer
from ddfast.training.source import OnlinePairs

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GROUPS = {"uneven": (1, 3, 130, 2), "var": (1, *(n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))}
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}  # float32 sums in another order


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """torch.compile stops after a number of variants of one function; each test has its own."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def dataset(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    """200 pairs of ``teacher``, made on the CPU."""
    folder = tmp_path_factory.mktemp("pairs")
    make(folder, teacher, manifest_of(teacher, num=200, shard_size=64), batch=64)
    return PairDataset(folder)


@pytest.fixture(scope="module")
def on_gpu(bundle: str) -> Teacher:
    """``teacher`` on the GPU."""
    return load_teacher(bundle, device=CUDA)


# Attention


def dense_rule(groups: tuple[int, ...], device: torch.device) -> Tensor:
    """What ``_flex`` lets a query see, bool [L, L], from its rule and from its blocks."""
    attend: Any = _flex(groups, device)
    kept = dict(zip(attend.__code__.co_freevars, (c.cell_contents for c in attend.__closure__), strict=True))
    blocks, index = kept["blocks"], torch.arange(sum(groups), device=device)
    assert blocks.shape[-2:] == (len(index), len(index))
    rule = blocks.mask_mod(index[0], index[0], index[:, None], index[None, :])
    size = blocks.BLOCK_SIZE[0]
    seen = blocks.to_dense()[0, 0].bool().repeat_interleave(size, 0).repeat_interleave(size, 1)
    assert not (rule & ~seen[: len(index), : len(index)]).any()
    return rule


@pytest.mark.parametrize("name", GROUPS)
def test_the_rule_of_flex_attention_is_the_group_mask(name: str) -> None:
    assert torch.equal(dense_rule(GROUPS[name], CPU), group_mask(GROUPS[name], CPU))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_is_compiled_in_one_piece_with_its_attention(autocast: bool) -> None:
    """Without a graph break, and with queries and keys that normalisation left in another dtype than the values."""
    config = VARConfig(2, 32, 2, (1, 1, 2, 3), 5, 24, 4)
    block, x, mod = Block(config), torch.randn(2, 15, 32), torch.randn(2, 6, 32)
    n_d = torch.randint(2, (2, 15)), torch.randn(2, 32)
    dtypes = []

    def watched(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        dtypes.append([t.dtype for t in (q, k, v)])
        return masked(group_mask(config.groups, CPU))(q, k, v, scale)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = block(x, mod, watched, n_d)
        got = torch.compile(block, backend="eager", fullgraph=True)(x, mod, _flex(config.groups, CPU), n_d)
    assert (len(set(dtypes[0])) > 1) == autocast
    torch.testing.assert_close(got, want, rtol=0, atol=0.1 if autocast else 1e-5)


def test_what_attention_keeps_takes_part_in_gradients_whoever_asked_first() -> None:
    groups = (1, 2, 5)
    with torch.inference_mode():
        attend: Any = _flex(groups, CPU)
    for cell in attend.__closure__:
        for part in getattr(cell.cell_contents, "as_tuple", tuple)():
            assert not (isinstance(part, Tensor) and part.is_inference())


def run_attention(attend: Attend, qkv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of ``qkv`` [3, B, H, L, d]."""
    leaf = qkv.detach().requires_grad_()
    out = attend(*leaf.unbind(0), 0.2)
    out.backward(gradient)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "width", "dtype"),
    [
        ("uneven", 32, torch.float32),
        ("uneven", 64, torch.bfloat16),
        ("var", 64, torch.float32),
        ("var", 32, torch.bfloat16),
    ],
)
def test_flex_attention_equals_the_dense_mask(name: str, width: int, dtype: torch.dtype) -> None:
    """Forwards and backwards: it errs at most four times as far from float64 as the dense mask does."""
    groups, generator = GROUPS[name], torch.Generator().manual_seed(1)
    qkv = torch.randn(3, 2, 3, sum(groups), width, generator=generator).mul_(2).to(CUDA, dtype)
    gradient = torch.randn(qkv.shape[1:], generator=generator).to(CUDA, dtype)
    dense = masked(group_mask(groups, CUDA))
    results = run_attention(grouped(groups, CUDA), qkv, gradient)
    plain = run_attention(dense, qkv, gradient)
    exact = run_attention(dense, qkv.double(), gradient.double())
    for got, other, want in zip(results, plain, exact, strict=True):
        assert got.dtype == dtype
        error, bound = (got - want).abs().max(), (other - want).abs().max()
        assert error <= 4 * bound + 1e-4, (float(error), float(bound))


@needs_gpu
@pytest.mark.gpu
def test_queries_in_float32_meet_values_in_bfloat16() -> None:
    groups, generator = GROUPS["uneven"], torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2, 2, sum(groups), 32, generator=generator).to(CUDA)
    got = grouped(groups, CUDA)(q, k, v.bfloat16(), 0.2)
    want = masked(group_mask(groups, CUDA))(q, k, v, 0.2)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.1)


@needs_gpu
@pytest.mark.gpu
def test_training_after_sampling_in_the_same_process(teacher: Teacher, dataset: PairDataset, on_gpu: Teacher) -> None:
    """What ``predict`` makes in inference mode serves gradients later."""
    student = on_gpu.new_student(torch.Generator().manual_seed(0))
    _flex.cache_clear()
    labels, tokens, noise = (t.to(CUDA) for t in dataset[range(4)])
    codebook = on_gpu.codebook.clone()
    assert student.predict(labels, noise, 0, codebook, 2).isfinite().all()
    embeddings, logits = student(labels, noise, 0)
    (embeddings.sum() + logits.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


# The student


@needs_gpu
@pytest.mark.gpu
def test_a_student_says_on_cuda_what_it_says_on_the_cpu(
    teacher: Teacher, dataset: PairDataset, on_gpu: Teacher
) -> None:
    pairs, t_B, said = dataset[range(4)], torch.tensor([0, 2, 1, 0]), []
    for of in (teacher, on_gpu):
        student = of.new_student(torch.Generator().manual_seed(0)).eval()
        labels, noise, t = (x.to(of.device) for x in (pairs.labels, pairs.noise, t_B))
        with torch.no_grad():
            said.append([*student(labels, noise, t), student.predict(labels, noise, 0, of.codebook, 2)])
    for got, want in zip(said[1], said[0], strict=True):
        torch.testing.assert_close(got.cpu(), want, **CLOSE)


# Training


@needs_gpu
@pytest.mark.gpu
def test_steps_on_cuda_are_those_on_the_cpu(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset, on_gpu: Teacher
) -> None:
    """Losses, the gradient and its norm of the first step; losses of two more, which follow from the updates."""
    trainers = [new_trainer(tmp_path / t.device.type, t, dataset, settings()) for t in (teacher, on_gpu)]
    figures = []
    for trainer in trainers:
        trainer.step(0)
        figures.append(trainer.figures(1))
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    for name, p in trainers[0].parameters.items():
        got, want = trainers[1].parameters[name].grad, p.grad
        assert got is not None and want is not None
        torch.testing.assert_close(got.cpu(), want, **CLOSE, msg=name)
    for step in (1, 2):
        losses = []
        for trainer in trainers:
            trainer.step(step)
            losses.append(trainer.figures(step + 1)["loss"])
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def three_losses(folder: Path, teacher: Teacher, dataset: PairDataset, run: Run) -> list[float]:
    trainer = new_trainer(folder, teacher, dataset, settings(), run)
    losses = []
    for step in range(3):
        trainer.step(step)
        losses.append(trainer.figures(step + 1)["loss"])
    return losses


@needs_gpu
@pytest.mark.gpu
def test_compiled_and_recomputed_blocks_learn_alike(tmp_path: Path, dataset: PairDataset, on_gpu: Teacher) -> None:
    want = three_losses(tmp_path / "plain", on_gpu, dataset, Run())
    for i, run in enumerate(
        (Run(compile=True), Run(activation_checkpointing=True, micro_batch=8), Run(precision="bfloat16"))
    ):
        got = three_losses(tmp_path / str(i), on_gpu, dataset, run)
        assert got == pytest.approx(want, rel=1e-3 if run.precision == "float32" else 0.05), run


def prefetched(trainer: Trainer) -> Any:
    """A source of one batch that is on the device already."""
    pairs = trainer.source.batch(0, range(trainer.micro))

    class Ready:
        def batch(self, step: int, part: range) -> Pairs:
            return pairs

        holdout = batch

    return Ready()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "run", [Run(), Run(precision="bfloat16", activation_checkpointing=True)], ids=["float32", "bfloat16"]
)
def test_a_step_waits_for_no_device(tmp_path: Path, dataset: PairDataset, on_gpu: Teacher, run: Run) -> None:
    trainer = new_trainer(tmp_path, on_gpu, dataset, settings(), run)
    trainer.source = prefetched(trainer)
    trainer.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.check_finite()


@needs_gpu
@pytest.mark.gpu
def test_a_gradient_that_is_not_finite_is_noticed(tmp_path: Path, dataset: PairDataset, on_gpu: Teacher) -> None:
    trainer = new_trainer(tmp_path, on_gpu, dataset, settings())
    trainer.step(0)
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(float("nan"))
    for step in (1, 2):
        trainer.step(step)
    assert int(trainer.first_bad) == 2  # the second step, counted from 1


@needs_gpu
@pytest.mark.gpu
def test_a_run_on_cuda_goes_on_where_it_was(
    tmp_path: Path, teacher: Teacher, dataset: PairDataset, on_gpu: Teacher
) -> None:
    """Curve, weights, average and moments, up to the rounding of sums; the CPU can take it over, too."""
    whole, parts, config, run = tmp_path / "whole", tmp_path / "parts", settings(), Run(log_every=1, samples=4)
    measured = new_trainer(whole, on_gpu, dataset, config, run).train()
    stopped: Any = new_trainer(parts, on_gpu, dataset, config, run)
    stopped.report.step = lambda step, figures: signal.raise_signal(signal.SIGINT) if step == 2 else None
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = new_trainer(parts, on_gpu, dataset, config, run)
    assert resumed.done == 3
    assert all(state["step"].device == CUDA and float(state["step"]) == 3 for state in resumed.optimizer.state.values())
    near = {"rel": 1e-3, "abs": 0.005}  # abs: one token of another choice
    assert resumed.train() == pytest.approx(measured, **near)
    curves = [curve(folder) for folder in (parts, whole)]
    assert len(curves[0]) == len(curves[1]) == 7
    for line, other in zip(*curves, strict=True):
        assert line == pytest.approx(other, **near)
    saved = [load_file(checkpoints(folder)[-1]) for folder in (parts, whole)]
    assert saved[0].keys() == saved[1].keys()
    for name, want in saved[1].items():
        torch.testing.assert_close(saved[0][name], want, **CLOSE, msg=name)
    for folder in (whole, parts):
        assert (folder / "samples" / "step-00000006.png").stat().st_size > 0
    assert new_trainer(parts, teacher, dataset, config, run).train() == pytest.approx(measured, **near)


# Pairs made as they are needed


@needs_gpu
@pytest.mark.gpu
def test_pairs_made_for_a_step_stay_when_others_are_made(on_gpu: Teacher) -> None:
    """They are made in buffers of a CUDA graph, two times four at once, and are ordinary tensors afterwards."""
    config = settings()
    manifest = manifest_of(on_gpu, num=config.steps * config.batch + config.holdout)
    source = OnlinePairs(on_gpu, manifest, config, largest=4)
    first = source.batch(1, range(2, 8))
    kept = [t.clone() for t in first]
    other = source.holdout(range(5))
    assert all(map(torch.equal, first, kept)) and not torch.equal(first.noise[:5], other.noise)
    for pairs, start in ((first, config.batch + 2), (other, config.steps * config.batch)):
        index = torch.arange(start, start + len(pairs.labels), device=CUDA)
        noise = ops.normal_noise(manifest.seed, index, 0, manifest.num_tokens, manifest.channels)
        assert torch.equal(pairs.noise, noise)
        assert torch.equal(pairs.labels, manifest.pair_labels(index))
        assert not any(t.is_inference() for t in pairs)


@needs_gpu
@pytest.mark.gpu
def test_online_training_by_the_command_line(tmp_path: Path, bundle: str) -> None:
    """In bfloat16 and compiled, as by default on a GPU; the student it leaves can be sampled from there."""
    how = "--recipe digits --steps 4 --batch 8 --warmup 2 --holdout 5 --log-every 2 --samples 2 --timesteps 0,2"
    argv = [
        "train",
        "--teacher",
        bundle,
        "--online",
        "--out",
        str(tmp_path),
        *how.split(),
        "--activation-checkpointing",
    ]
    assert main([*argv, "--device", "cuda"]) == 0
    losses = [line["loss"] for line in curve(tmp_path) if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert (tmp_path / "samples" / "step-00000004.png").stat().st_size > 0
    made = load_student(tmp_path, device=CUDA)
    noise = torch.randn(3, made.student.num_tokens, made.student.channels, device=CUDA)
    x = few_step(made.student, torch.tensor([0, 1, 2], device=CUDA), noise, made.codebook, made.timesteps, made.split)
    assert made.images(x).isfinite().all()
