"""Batches as graphs: on a CPU with recorders of its own, and CUDA's where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import full_size
import pytest
import torch
from engine_helpers import (
    at_once,
    make,
    manifest_of,
    needs_gpu,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ddfast import ops
from ddfast.flow import LogitFilter, make_solver
from ddfast.models import Sampling, Teacher, load_teacher
from ddfast.pairs import PairDecoder, decode, describe, read_shard
from ddfast.pairs.decoder import Decoder
from ddfast.pairs.graphs import Replay, record_program


class Calls:
    """A recorder for a CPU: a graph is the call itself. A step's must find the guidance and rows it was recorded at."""

    def __init__(self) -> None:
        self.played: list[int] = []
        self.recorded = self.warm_ups = 0

    def warm_up(self, run: Callable[[], None]) -> None:
        self.warm_ups += 1
        run()

    def record(self, run: Callable[[], None]) -> Replay:
        number, self.recorded = self.recorded, self.recorded + 1
        state = getattr(getattr(run, "__self__", None), "state", None)  # of a step
        stood = state and (state.weight, state.rows)

        def replay() -> None:
            self.played.append(number)
            assert stood == (state and (state.weight, state.rows))
            run()

        return replay


def test_batches_in_graphs_are_those_without(teacher: Teacher) -> None:
    """Also with labels of their own, and the last batch, which is smaller: surplus rows are computed and dropped."""
    manifest, calls = manifest_of(teacher, num=21, labels=(3, 1), seed=7), Calls()
    made = PairDecoder(teacher, manifest, 8, recorder=calls)
    assert calls.warm_ups == 1 and calls.played == []
    before = None
    for first, count in ((0, 8), (8, 8), (16, 5), (0, 8)):
        made.make(first, count)
        tokens = made.decoder.tokens_BL[:count].clone()
        assert torch.equal(tokens, at_once(teacher, manifest, first, 8)[:count])
        assert before is None or not torch.equal(tokens, before[:count])
        before = tokens


def test_a_batch_is_one_graph_where_groups_differ(bundles: dict[str, Path]) -> None:
    teacher, calls = load_teacher(str(bundles["var"])), Calls()
    PairDecoder(teacher, manifest_of(teacher), 4, recorder=calls).make(0, 4)
    assert calls.recorded == 1 and calls.played == [0]


@pytest.mark.parametrize(("interval", "played"), [(-1, [1] + 9 * [0]), (2, [2] + 4 * [0] + 5 * [1])])
def test_steps_share_a_graph_while_guidance_is_the_same(
    bundles: dict[str, Path], interval: int, played: list[int]
) -> None:
    teacher = load_teacher(str(bundles["llamagen"]))
    manifest, calls = manifest_of(teacher, interval=interval), Calls()
    made = PairDecoder(teacher, manifest, 4, recorder=calls)
    made.make(8, 4)
    assert calls.played == played
    assert torch.equal(made.decoder.tokens_BL, at_once(teacher, manifest, 8, 4))


class Toy:
    """A teacher in plain torch operations: a token depends on the class, the place and every token before it."""

    def __init__(self, groups: tuple[int, ...], alike: bool) -> None:
        g = torch.Generator().manual_seed(3)
        self.groups, self.steps_alike, self.num_tokens, self.device = groups, alike, sum(groups), torch.device("cpu")
        self.codebook, self.classes, self.places, self.embedding = (
            2 * torch.randn(n, c, generator=g) for n, c in ((12, 4), (6, 12), (self.num_tokens, 12), (12, 12))
        )

    def filter(self, sampling: Sampling) -> LogitFilter:
        return LogitFilter()

    def decode_state(self, labels: torch.Tensor, guidance: float, interval: int, stop: int | None) -> Any:
        rows = 2 * len(labels)
        state = SimpleNamespace(length=torch.zeros(1, dtype=torch.int32), sum_RV=torch.zeros(rows, 12), group=0)
        self.restart(state, labels)
        return state

    def restart(self, state: Any, labels: torch.Tensor) -> None:
        state.batch, state.rows = len(labels), 2 * len(labels)
        self.stand(state, 0)
        state.length.zero_()
        state.sum_RV[: state.rows].copy_(self.classes[torch.cat([labels, torch.full_like(labels, 5)])])

    def stand(self, state: Any, group: int) -> None:
        state.group, state.weight = group, 1.5 if group < 2 else 2.0

    def logits(self, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        places = state.length.long() + torch.arange(self.groups[state.group])
        rows = state.sum_RV[: state.rows, None] + self.places[places]
        return rows[: state.batch], rows[state.batch :]

    def append(self, state: Any, tokens: torch.Tensor) -> None:
        added = self.embedding[tokens].sum(1)
        state.sum_RV[: state.rows] += torch.cat([added, added])
        state.length += tokens.shape[1]
        self.stand(state, min(state.group + 1, len(self.groups) - 1))


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: replays every operation of a call on the memory it had, without its Python."""

    def __init__(self) -> None:
        super().__init__()
        self._work: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        self._work.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, out in self._work:
                for old, new in zip(self._tensors(out), self._tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    @staticmethod
    def _tensors(out: Any) -> list[torch.Tensor]:
        return [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]


class Tapes:
    """A recorder whose graphs are tapes."""

    def warm_up(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Replay:
        tape = Tape()
        with tape:
            run()
        return tape.replay


@pytest.mark.parametrize(("groups", "alike"), [((1, 4, 9), False), ((1,) * 9, True)])
def test_a_recorded_program_needs_nothing_of_the_host(groups: tuple[int, ...], alike: bool) -> None:
    """Only the memory that it was recorded on: labels, noise, the place and the tokens so far."""
    toy: Any = Toy(groups, alike)
    labels, g = torch.tensor([0, 3, 1]), torch.Generator().manual_seed(4)
    noise = torch.randn(2, 3, toy.num_tokens, 4, generator=g)
    decoder = Decoder(toy, labels, Sampling(1.5, 0, 0.0), make_solver())
    program = record_program(decoder, lambda: decoder.begin(labels), Tapes())
    assert len(program) == (len(groups) + 1 if alike else 1) and len(set(map(id, program))) == (3 if alike else 1)
    for some in (noise[0], noise[1], noise[0]):
        decoder.noise_BLC.copy_(some)
        toy.stand(decoder.state, 1)  # as if the host were elsewhere
        decoder.tokens_BL.fill_(-1)
        decoder.evaluations_BL.fill_(-1)
        for replay in program:
            replay()
        assert torch.equal(decoder.tokens_BL, decode(toy, labels, some, Sampling(1.5, 0, 0.0), make_solver()))
        assert bool((decoder.evaluations_BL >= 0).all())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
@pytest.mark.parametrize("interval", [-1, 3])
def test_cuda_graphs_give_the_tokens_of_eager_batches(name: str, interval: int) -> None:
    """For the same pairs; replays with other pairs differ, and equal eager ones, too. Nothing waits for the device."""
    if name == "digits-var" and interval != -1:
        pytest.skip("VAR has no interval")
    teacher = load_teacher(name, device="cuda")
    manifest = manifest_of(teacher, num=200, shard_size=40, interval=interval)
    made = PairDecoder(teacher, manifest, 32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for first, count in ((0, 32), (32, 8), (64, 32), (0, 32)):
            made.make(first, count)
            results.append((first, made.decoder.tokens_BL[:count].clone()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(results[0][1], results[3][1]) and not torch.equal(results[0][1], results[2][1])
    for first, tokens in results:
        assert torch.equal(tokens, at_once(teacher, manifest, first, 32)[: len(tokens)])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("name", ["var-d16", "llamagen-l-256"])
def test_graphs_of_full_size_teachers_in_bfloat16(name: str, precision: str) -> None:
    """What users run, with random weights: the tokens of eager calls, which differ from pair to pair."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs capability 8.9")
    teacher = full_size.random_teacher(name, torch.bfloat16, "cuda")
    teacher.prepare(precision, release=True)
    manifest = describe(teacher, teacher.preset("paper"), make_solver(), num=16, shard_size=8)
    made = PairDecoder(teacher, manifest, 4)
    for first in (0, 8):
        made.make(first, 4)
        tokens = made.decoder.tokens_BL
        assert bool((made.decoder.evaluations_BL >= 0).all()) and len(tokens.unique()) > 100
        same = (tokens == at_once(teacher, manifest, first, 4)).float().mean()
        assert same > 0.999, float(same)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_a_gpu_fills_a_folder(tmp_path: Path, name: str) -> None:
    """Through graphs, pinned memory and the writer; every shard is what the plain function gives."""
    teacher = load_teacher(name, device="cuda")
    manifest = manifest_of(teacher, num=300, shard_size=70, store_noise=True)
    done: list[int] = []
    make(tmp_path, teacher, manifest, 32, done=done.append)
    assert done == 4 * [32, 32, 6] + [20]
    for shard in range(5):
        tensors = read_shard(tmp_path, manifest, shard).tensors
        pairs = manifest.shard_range(shard)
        for first in range(pairs.start, pairs.stop, 32):
            rows = slice(first - pairs.start, min(first - pairs.start + 32, len(pairs)))
            want = at_once(teacher, manifest, first, 32).cpu()
            assert torch.equal(tensors["tokens"][rows].long(), want[: len(tensors["tokens"][rows])])
        index = torch.arange(pairs.start, pairs.stop)
        noise = ops.normal_noise(manifest.seed, index, 0, manifest.num_tokens, manifest.channels)
        assert torch.equal(tensors["noise"], noise)
