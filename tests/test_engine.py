"""The engine that makes pairs: its buffers, its graphs, the thread that writes, and the batch it chooses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import full_size
import gpu
import gpu_cases
import gpu_pairs
import project
import pytest
import torch
from tiny import tiny_bundle
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ddfast import ops
from ddfast.cli import main
from ddfast.errors import UserError
from ddfast.flow import LogitFilter, make_solver
from ddfast.models import TEACHERS, Sampling, Teacher, load_teacher
from ddfast.models.zoo import blueprint
from ddfast.pairs import Manifest, PairDecoder, Plan, decode, describe, engine, execute, memory, read_shard, store
from ddfast.pairs.decoder import Decoder
from ddfast.pairs.graphs import Replay, record_program
from ddfast.pairs.store import Run
from ddfast.pairs.writer import Writer

FAMILIES = ("var", "llamagen")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny_bundle(folder / f"{family}.safetensors", family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Teacher:
    return load_teacher(str(bundles[request.param]))


def manifest_of(teacher: Teacher, num: int = 50, shard_size: int = 16, **changes: Any) -> Manifest:
    plain = teacher.plain_sampling()
    sampling = Sampling(1.5, 6, plain.top_p, guidance_interval=changes.pop("interval", -1))
    return describe(teacher, sampling, make_solver(), num=num, shard_size=shard_size, **changes)


def make(folder: Path, teacher: Teacher, manifest: Manifest, batch: int = 8, **options: Any) -> None:
    execute(Plan(folder, manifest, range(manifest.num_shards)), teacher, batch, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def at_once(teacher: Teacher, manifest: Manifest, first: int, count: int) -> torch.Tensor:
    """Tokens of some pairs by the plain function."""
    pairs = torch.arange(first, first + count, device=teacher.device)
    noise = ops.normal_noise(manifest.seed, pairs, 0, manifest.num_tokens, manifest.channels)
    sampling = Sampling(**manifest.sampling)
    return decode(teacher, manifest.pair_labels(pairs), noise, sampling, make_solver())


# Graphs


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

    def decode_state(self, labels: torch.Tensor, guidance: float, interval: int) -> Any:
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


# Buffers


def test_buffers_stay_where_they_are(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across batches and shards, the last and smaller ones too."""
    places: set[tuple[int, ...]] = set()
    hosts: set[int] = set()
    real = engine.fill

    def watched(decoder: PairDecoder, shard: int, buffer: engine.ShardBuffer, *rest: Any) -> None:
        inner = decoder.decoder
        for _ in range(2):
            tensors = (inner.noise_BLC, inner.tokens_BL, inner.evaluations_BL, inner.state.cache.data_N2RHLd)
            places.add(tuple(t.data_ptr() for t in tensors))
            hosts.add(buffer.tokens.data_ptr())
            real(decoder, shard, buffer, *rest)

    monkeypatch.setattr(engine, "fill", watched)
    make(tmp_path, teacher, manifest_of(teacher, num=150, shard_size=16), batch=7)
    assert len(places) == 1 and len(hosts) <= engine.BUFFERS


PEAK = """
import sys
from pathlib import Path
from ddfast.flow import make_solver
from ddfast.models import load_teacher
from ddfast.pairs import Plan, describe, execute
teacher = load_teacher(sys.argv[1])
manifest = describe(teacher, teacher.plain_sampling(), make_solver(), num=32 * int(sys.argv[3]), shard_size=32)
execute(Plan(Path(sys.argv[2]), manifest, range(manifest.num_shards)), teacher, 16)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_hundred_shards_take_no_more_memory_than_two(tmp_path: Path, bundles: dict[str, Path]) -> None:
    peaks = {}
    for count in (2, 100):
        command = [sys.executable, "-c", PEAK, str(bundles["var"]), str(tmp_path / str(count)), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout)
    assert peaks[100] < peaks[2] + 8 * 1024, peaks  # KiB; libraries load their parts when first used


# The thread that writes


def test_a_slow_disk_is_waited_for_with_three_shards_in_memory(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(teacher, num=160, shard_size=16)
    make(tmp_path / "quick", teacher, manifest)
    made: list[int] = []
    ahead: list[int] = []
    gate, real = threading.Semaphore(0), engine.write_shard

    def slow(folder: Path, manifest: Manifest, shard: int, *rest: Any) -> None:
        gate.acquire()
        ahead.append(sum(made) // 16 - shard)
        real(folder, manifest, shard, *rest)

    monkeypatch.setattr(engine, "write_shard", slow)
    work = threading.Thread(target=make, args=(tmp_path / "slow", teacher, manifest), kwargs={"done": made.append})
    work.start()
    for _ in range(manifest.num_shards):
        threading.Event().wait(0.05)
        gate.release()
    work.join(60)
    assert not work.is_alive() and len(ahead) == 10 and max(ahead) <= engine.BUFFERS
    assert contents(tmp_path / "slow") == contents(tmp_path / "quick")


def test_a_disk_that_fails_ends_the_run_soon(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next batch, and not only before the next shard."""
    manifest = manifest_of(teacher, num=640, shard_size=64)
    made: list[int] = []
    going_on, real = threading.Event(), engine.write_shard

    def failing(folder: Path, manifest: Manifest, shard: int, *rest: Any) -> None:
        if shard == 2:
            going_on.wait(60)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert shard < 2, "nothing is written after an error"
        real(folder, manifest, shard, *rest)

    def done(count: int) -> None:
        made.append(count)
        if sum(made) == 3 * 64 + 8:  # one batch of the shard after the one that fails
            going_on.set()
            while any(thread.name == "ddfast-writer" for thread in threading.enumerate()):
                time.sleep(0.001)

    monkeypatch.setattr(engine, "write_shard", failing)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path, teacher, manifest, done=done)
    assert sum(made) == 3 * 64 + 8
    assert sorted(contents(tmp_path)) == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]


def test_ctrl_c_keeps_every_shard_that_is_complete(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that still waited for the disk; the one being made is dropped, and a rerun makes the rest."""
    manifest = manifest_of(teacher, num=160, shard_size=16)
    make(tmp_path / "quiet", teacher, manifest)
    made: list[int] = []
    pressed, real = threading.Event(), engine.write_shard

    def slow(*given: Any) -> None:
        pressed.wait(60)
        real(*given)

    def done(count: int) -> None:
        made.append(count)
        if sum(made) == 2 * 16 + 8:
            pressed.set()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_shard", slow)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "stopped", teacher, manifest, done=done)
    kept = contents(tmp_path / "stopped")
    assert sorted(kept) == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    make(tmp_path / "stopped", teacher, manifest)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "quiet")


def test_a_writer_hands_its_buffers_round() -> None:
    written: list[tuple[int, str]] = []
    with Writer(lambda number, buffer: written.append((number, buffer)), ["a", "b"]) as writer:
        taken = []
        for number in range(6):
            taken.append(writer.take())
            writer.put(number, taken[-1])
    assert written == list(enumerate(taken)) and set(taken) == {"a", "b"}
    with pytest.raises(ZeroDivisionError), Writer(lambda number, buffer: 1 // number, ["a"]) as failing:  # type: ignore[arg-type, return-value]
        failing.put(0, failing.take())
        failing.take()


def test_overflow_names_the_pair(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index in the folder, not its row in a batch; shards before it are kept."""
    manifest, plain, groups = manifest_of(teacher), type(teacher).logits, len(teacher.groups)
    calls: list[None] = []

    def overflow(self: Teacher, state: Any) -> Any:
        cond, uncond = plain(self, state)
        calls.append(None)
        if len(calls) == 4 * groups + 2:  # the second group of the first batch of shard 1
            cond[2, 0, 1] = torch.inf
        return cond, uncond

    monkeypatch.setattr(type(teacher), "logits", overflow)
    with pytest.raises(UserError, match=r"^pair 18, position 1 \(shard 1\): .*overflow.* wider --dtype"):
        make(tmp_path, teacher, manifest, batch=4)
    assert sorted(contents(tmp_path)) == ["manifest.json", "shard-00000.safetensors"]
    evaluations = torch.ones(5, 9, dtype=torch.int32)
    evaluations[3, 7] = -2
    with pytest.raises(UserError, match=r"pair 103, position 7 \(shard 6\): its noise is not finite"):
        engine.raise_bad_pairs(evaluations, 100, 6)


# The batch


@pytest.mark.parametrize(
    ("most", "shard", "batch"), [(130, 1024, 128), (130, 1000, 125), (7, 3, 3), (1, 99, 1), (100, 97, 97), (60, 97, 32)]
)
def test_a_batch_cuts_a_shard_into_few(most: int, shard: int, batch: int) -> None:
    assert memory.tidy(most, shard) == batch <= most


def zoo(name: str, cpu: bool, free: float, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """The batch chosen for a teacher at full size with so many GiB free."""
    teacher = blueprint(name)
    monkeypatch.setattr(type(teacher), "device", torch.device("cpu" if cpu else "cuda"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * 2**30))
    manifest = describe(teacher, teacher.preset(), make_solver(), num=10_000, **options)
    return memory.default_batch(teacher, manifest)


@pytest.mark.parametrize(
    ("name", "cpu", "free", "batch"),
    [
        ("var-d16", True, 1000, 8),  # 8 x 2 halves x 256 = 4,096 rows
        ("var-d16", False, 140, 128),  # 65,536 rows
        ("var-d16", False, 10, 32),
        ("var-d16", False, 0.1, 1),
        ("llamagen-l-256", False, 1000, 1024),
        ("llamagen-l-256", False, 100, 512),
    ],
)
def test_a_batch_is_as_large_as_helps_and_fits(
    name: str, cpu: bool, free: float, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert zoo(name, cpu, free, monkeypatch) == batch


def test_memory_is_counted_a_pair(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(teacher)
    each = memory.pair_bytes(teacher, manifest)
    largest = max(teacher.groups)
    assert each > teacher.cache_bytes(guided=True) + 2 * 4 * 24 * largest
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * each + 1)
    memory.check_batch(10, teacher, manifest)
    with pytest.raises(UserError, match=r"--batch 11 needs about 0.0 GiB \(0.. MiB a pair\), but .* use at most 10$"):
        memory.check_batch(11, teacher, manifest)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="are free on cpu for each of 4 ranks; use at most 10$"):
        memory.check_batch(11, teacher, manifest)


def test_ranks_share_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 700))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert (memory.free_bytes(cpu), memory.free_bytes(cuda)) == (1000, 600)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (memory.free_bytes(cpu), memory.free_bytes(cuda)) == (125, 300)


def files(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_free_memory_is_the_least_that_anything_leaves(tmp_path: Path) -> None:
    files(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"})
    assert memory.free_host_bytes(tmp_path) == 4000 * 1024
    second = "sys/fs/cgroup/jobs"
    files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/mine one\n",
            f"{second}/mine one/memory.max": "max\n",
            f"{second}/mine one/memory.current": "500\n",
            f"{second}/memory.max": "3000000\n",
            f"{second}/memory.current": "1000000\n",
            f"{second}/memory.stat": "anon 900000\ninactive_file 100000\n",
        },
    )
    assert memory.free_host_bytes(tmp_path) == 2_100_000
    first = "sys/fs/cgroup/memory/mine"
    files(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,memory:/mine\n4:pids:/mine\n0::/\n",
            f"{first}/memory.limit_in_bytes": "1500000\n",
            f"{first}/memory.usage_in_bytes": "1600000\n",
            f"{first}/memory.stat": "total_inactive_file 300000\n",
        },
    )
    assert memory.free_host_bytes(tmp_path) == 200_000
    assert memory.free_host_bytes(tmp_path / "no linux") > 2**20


def test_memory_of_this_machine() -> None:
    assert 2**20 < memory.free_bytes(torch.device("cpu")) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The command


def command(bundle: Path, out: Path, *options: str) -> list[str]:
    return ["pairs", "--teacher", str(bundle), "-n", "70", "--shard-size", "10", "--out", str(out), *options]


def test_jobs_take_ranges_of_shards_and_ranks_share_them(
    tmp_path: Path, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "parts"
    assert main(command(bundles["var"], out, "--shards", ":2")) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "20 pairs in" in said and "pairs/s" in said and "5 of 7 shards are missing" in said and said.endswith("2:7")
    assert sorted(contents(out)) == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(command(bundles["var"], out, "--shards", "3:9")) == 0  # the last of an array may ask for more
    assert capsys.readouterr().err.rstrip().endswith("2:3, 4:5, 6:7")
    assert sorted(int(p.name[6:11]) for p in out.glob("shard-*")) == [0, 1, 3, 5]
    monkeypatch.setenv("RANK", "1")
    assert main(command(bundles["var"], out, "--shards", "3:9")) == 0
    assert sorted(int(p.name[6:11]) for p in out.glob("shard-*")) == [0, 1, 3, 4, 5, 6]
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert main(command(bundles["var"], out)) == 0
    assert main(command(bundles["var"], tmp_path / "whole")) == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["7:9", "3:3", "4:2", "3", "a:b", "-1:2", "1:2:3", ""])
def test_impossible_ranges_are_refused(
    tmp_path: Path, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert main(command(bundles["var"], tmp_path / "out", f"--shards={text}")) == 2
    assert "have shards 0:7" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_batch_that_cannot_fit_is_refused(
    tmp_path: Path, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it was asked for; that of the shards that are there is only kept where it fits."""
    assert main(command(bundles["var"], tmp_path / "out", "--batch", str(10**9))) == 2
    assert "GiB are free on cpu; use at most" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for text in ("0", "-3"):
        assert main(command(bundles["var"], tmp_path / "out", f"--batch={text}")) == 2
        assert f"--batch is {text}; it must be at least 1" in capsys.readouterr().err
    assert main(command(bundles["var"], tmp_path / "out", "--batch", "5", "--shards", "0:3")) == 0
    assert main(command(bundles["var"], tmp_path / "out", "--shards", "0:4")) == 0
    assert ", 5 at a time" in (said := capsys.readouterr().err) and "note:" not in said
    teacher = load_teacher(str(bundles["var"]))
    each = memory.pair_bytes(teacher, describe(teacher, teacher.preset(), make_solver(), num=70))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * each + 9)
    assert main(command(bundles["var"], tmp_path / "out", "--shards", "0:5")) == 0
    assert ", 2 at a time" in (said := capsys.readouterr().err) and "batch=5" in said


def test_a_batch_that_did_not_fit_after_all_is_told(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(engine, "PairDecoder", full)
    with pytest.raises(UserError, match=r"a batch of 8 does not fit on cpu: use a smaller --batch \(tried to"):
        make(tmp_path / "out", teacher, manifest_of(teacher))
    assert not (tmp_path / "out").exists()


def test_precision_is_recorded_and_a_rerun_says_so(
    tmp_path: Path, teacher: Teacher, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of(teacher)
    make(tmp_path, teacher, manifest, precision="int8")
    assert read_shard(tmp_path, manifest, 0).run == Run(8, "float32", "cpu", "int8")
    store.shard_path(tmp_path, 1).unlink()
    options = ["--guidance", "1.5", "--top-k", "6", "--solver", "adams", "-n", "50", "--shard-size", "16"]
    bundle = str(bundles[teacher.name.removeprefix("tiny-")])
    assert main(["pairs", "--teacher", bundle, "--out", str(tmp_path), *options]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "precision='int8'), the missing ones will be with Run(batch=8," in said and "precision='native')" in said
    assert "slightly different teacher" in said


def test_shards_from_before_precision_was_recorded_are_read(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher)
    make(tmp_path, teacher, manifest)
    arrays = {name: t.numpy() for name, t in read_shard(tmp_path, manifest, 0).tensors.items()}
    run = {"batch": 8, "dtype": "float32", "device": "cpu"}
    note: dict[str, Any] = {"manifest": manifest.checksum, "shard": 0, "run": run}
    note["sha256"] = store.digest(note, arrays)
    data = store.packed(note, arrays)
    store.shard_path(tmp_path, 0).write_bytes(data)
    assert read_shard(tmp_path, manifest, 0).run == Run(8, "float32", "cpu", "native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_fp8_needs_a_gpu_and_is_refused_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["pairs", "--teacher", "var-d16", "--num", "5", "--out", str(tmp_path / "out"), "--precision", "fp8"]
    assert main(argv) == 2
    assert "fp8" in (said := capsys.readouterr().err) and "weights" not in said


# What make gpu runs, and what is projected from it


@pytest.mark.parametrize("family", FAMILIES)
def test_work_is_what_the_transformer_multiplies(bundles: dict[str, Path], family: str) -> None:
    """Against torch's own count, of one row at once: all products with weights but VAR's embedding of codes."""
    teacher = load_teacher(str(bundles[family]))
    config, length = teacher.transformer.config, teacher.num_tokens
    work = gpu_pairs.count_work(config, rows=1)
    inputs = torch.zeros(1, length - 1, 4) if family == "var" else torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        teacher.transformer(torch.tensor([1]), inputs)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    embedding = 2 * (length - 1) * 4 * 32 if family == "var" else 0
    assert work.gemm_flop == counts.pop("aten.addmm", 0) + counts.pop("aten.mm", 0) - embedding
    ends = [1, 5, 14] if family == "var" else list(range(1, 10))
    seen = sum(n * end for n, end in zip(teacher.groups, ends, strict=True))
    assert work.attention_flop / seen == sum(counts.values()) / length**2  # which counts masked scores, too
    both = gpu_pairs.count_work(config)
    assert both.flop == 2 * work.flop and both.weights == work.weights and both.steps == len(ends)
    assert both.cached * 4 * length == teacher.cache_bytes(guided=True) * sum(ends)
    assert both.read_bytes(2, 4) == 4 * (work.weights * len(ends) / 2 + both.cached)


def test_var_d16_takes_what_the_bench_counted() -> None:
    rows = json.loads((project.RESULTS / "pairs-cpu.json").read_text())["rows"]
    counted = {row["gemm_gflop_per_pair"] for row in rows if row["teacher"] == "var-d16"}
    assert counted and all(
        count == pytest.approx(gpu_pairs.count_work(TEACHERS["var-d16"].config).gemm_flop / 1e9, 0.01)
        for count in counted
    )


def test_pair_rates_have_every_figure(teacher: Teacher) -> None:
    ceilings = gpu_cases.Ceilings(copy_bytes_per_s=1e10, bf16_flop_per_s=1e12)
    work = gpu_pairs.count_work(teacher.transformer.config)
    row = gpu_pairs.measure_pairs(teacher, work, "plain", 4, ceilings, precision="native", batches=5)
    assert row["pairs"] == 16 and row["pairs_per_s"] > 0 and row["s_before_second_batch"] > 0
    assert row["share_of_matmul_peak"] == pytest.approx(row["pairs_per_s"] * work.flop / 1e12)
    assert row["share_of_copy_bandwidth"] == pytest.approx(row["pairs_per_s"] * work.read_bytes(4, 4) / 1e10)
    text = gpu_pairs.line({"name": "pairs tiny"} | row)
    assert "pairs/s" in text and "of the matmul peak" in text
    json.dumps(row)


@pytest.mark.parametrize("name", ["var-d16", "llamagen-b-256"])
def test_random_teachers_have_logits_of_a_teacher(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At a toy size: two layers."""
    change = {"depth": 2} if name == "var-d16" else {"n_layer": 2}
    entry = TEACHERS[name]
    small = replace(
        entry,
        config=replace(entry.config, embed_dim=128, num_heads=2, **change)
        if name == "var-d16"
        else replace(entry.config, dim=128, n_head=2, **change),
    )
    monkeypatch.setattr(full_size, "TEACHERS", {name: small})
    teacher = full_size.random_teacher(name, torch.bfloat16, torch.device("cpu"))
    state = teacher.decode_state(torch.tensor([1, 2]), 2.0)
    assert teacher.dtype == torch.bfloat16 and 1 < teacher.logits(state)[0].float().std() < 4
    assert teacher.preset("paper").guidance == 2.0


def test_pair_cases_and_their_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = gpu_pairs.pair_cases()
    assert len({case.name for case in cases}) == len(cases) and {case.precision for case in cases} == {"native", "fp8"}
    kinds = [(case.teacher, case.precision) for case in cases]
    assert sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)) == len(set(kinds)) - 1
    figures = {"share_of_matmul_peak": 0.4, "share_of_copy_bandwidth": 0.7, "pairs_per_s": 1.0}
    rows = [{"name": c.name, "teacher": c.teacher, "precision": c.precision} | figures for c in cases]
    rows[1]["share_of_matmul_peak"] = 0.55
    rows[-2]["share_of_matmul_peak"] = 0.99  # fp8 is held to no bar of bf16
    rows.append({"name": "pairs late", "problem": "out of time"})
    assert [(bar["name"], bar["value"], bar["held"]) for bar in gpu_pairs.bars(rows)] == [
        ("pairs var-d16 batch 32 native: share_of_matmul_peak", 0.55, True),
        ("pairs llamagen-l-256 batch 256 native: share_of_copy_bandwidth", 0.7, True),
    ]
    assert gpu.failures({"pairs": rows})[-1] == "pairs late: out of time"
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_pairs, "measure_case", lambda case, ceilings, device: {"name": case.name, "note": "old"})
    arguments = cases[:2], None, torch.device("cpu")
    gpu_pairs.report_from(*arguments, time.monotonic() + 60, reported.append)  # type: ignore[arg-type]
    gpu_pairs.report_from(*arguments, 0.0, reported.append)  # type: ignore[arg-type]
    assert [row.get("note", row.get("problem")) for row in reported] == ["old", "old", "out of time", "out of time"]
    gpu_pairs.write_line(tmp_path / "rows", reported[0])
    assert json.loads((tmp_path / "rows").read_text()) == reported[0]


def test_the_projection_is_up_to_date() -> None:
    page = project.PAGE.read_text()
    text = project.projection(project.RESULTS, project.PRICE_GPU, project.PRICE_CPU)
    assert project.rewritten(page, text) == page, "run python benches/project.py"


def test_rates_scale_within_a_family(tmp_path: Path) -> None:
    """From the nearest one measured: VAR by arithmetic, LlamaGen by bytes; int8, with other pairs, is left out."""
    rows: list[dict[str, Any]] = [
        {"teacher": "var-d16", "dtype": "bfloat16", "batch": 4, "pairs_per_s": 1.0},
        {"teacher": "var-d16", "dtype": "bfloat16", "batch": 4, "pairs_per_s": 9.0, "precision": "int8"},
        {"teacher": "var-d30", "dtype": "bfloat16", "batch": 4, "pairs_per_s": 0.1},
        {"teacher": "llamagen-l-256", "dtype": "bfloat16", "batch": 64, "pairs_per_s": 2.0, "precision": "native"},
        {"teacher": "digits-var", "dtype": "float32", "batch": 1, "pairs_per_s": 80.0},
        {"name": "pairs var-d16 batch 1 native", "teacher": "var-d16", "note": "old"},
    ]
    measured = project.best(rows)
    assert project.rate("var-d16", measured, gpu=True) == (1.0, "measured: bfloat16, batch 4")
    flop = {name: gpu_pairs.count_work(TEACHERS[name].config).flop for name in ("var-d16", "var-d20", "var-d30")}
    assert project.rate("var-d20", measured, gpu=True) == (
        pytest.approx(flop["var-d16"] / flop["var-d20"]),
        "var-d16, by GFLOP",
    )
    read = [gpu_pairs.count_work(TEACHERS[f"llamagen-{x}-256"].config).read_bytes(64) for x in "bl"]
    assert project.rate("llamagen-b-256", measured, gpu=True) == (
        pytest.approx(2 * read[1] / read[0]),
        "llamagen-l-256, by GB read",
    )
    assert project.rate("digits-llamagen", measured, gpu=True) is None
    (tmp_path / "pairs-cpu.json").write_text(json.dumps({"hardware": {"cpu": "a CPU"}, "rows": rows}))
    (tmp_path / "gpu-toy.json").write_text(json.dumps({"hardware": {"gpu": "Toy GPU"}, "pairs": rows[:1]}))
    text = project.projection(tmp_path, 36.0, 1.0)
    assert "| var-d16 | 597 GFLOP | 1 | measured: bfloat16, batch 4 | 333 | $12,000 |" in text
    assert (
        "Toy GPU" in text and "GPU: not measured" not in text and "| digits-llamagen | small | not measured |" in text
    )
    with pytest.raises(SystemExit, match="marks"):
        project.rewritten("no marks", text)
