"""Pair generation and the shard store: what is stored is right, reproducible, and survives whatever happens to it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import contents
from tiny import CLASSES, VOCAB, tiny_bundle
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from ddfast import ops
from ddfast.errors import UserError
from ddfast.flow import make_solver
from ddfast.models import Sampling, Teacher, load_teacher
from ddfast.pairs import (
    Manifest,
    PairDataset,
    Plan,
    decode,
    describe,
    engine,
    execute,
    read_manifest,
    read_shard,
    store,
)


def manifest_of(teacher: Teacher, num: int = 50, shard_size: int = 16, **changes: object) -> Manifest:
    sampling = teacher.plain_sampling()
    return describe(teacher, sampling, make_solver(), num=num, shard_size=shard_size, **changes)  # type: ignore[arg-type]


def make(folder: Path, teacher: Teacher, manifest: Manifest, batch: int = 8, shards: range | None = None) -> None:
    plan = Plan(folder, manifest, range(manifest.num_shards) if shards is None else shards)
    execute(plan, teacher, batch)


def test_shards_hold_what_the_engine_gives(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher, labels=(3, 1), store_noise=True, seed=2**40 + 1)
    make(tmp_path, teacher, manifest)
    assert sorted(contents(tmp_path)) == ["manifest.json", *(f"shard-{i:05d}.safetensors" for i in range(4))]
    assert read_manifest(tmp_path) == manifest
    dataset = PairDataset(tmp_path)
    everything = dataset[range(50)]
    assert everything.labels.tolist() == [3, 1] * 25
    noise = ops.normal_noise(2**40 + 1, torch.arange(50), 0, manifest.num_tokens, manifest.channels)
    assert torch.equal(everything.noise, noise)
    for start in range(0, 50, 16):  # shard by shard, in batches of eight, as `make` did
        for first in range(start, min(start + 16, 50), 8):
            rows = slice(first, min(first + 8, start + 16, 50))
            want = decode(teacher, everything.labels[rows], noise[rows], teacher.plain_sampling(), make_solver())
            assert torch.equal(everything.tokens[rows], want)


def test_tokens_follow_the_teacher(teacher: Teacher) -> None:
    """Alg. 1 draws from the teacher: frequencies of the first token and, given it, of the second against softmax."""
    n, sampling = 20000, Sampling(guidance=1.5, top_k=6, top_p=teacher.plain_sampling().top_p)
    labels = torch.full((n,), 2)
    noise = ops.normal_noise(5, torch.arange(n), 0, teacher.num_tokens, teacher.codebook.shape[1])
    tokens = torch.cat(
        [
            decode(teacher, *part, sampling, make_solver())
            for part in zip(labels.split(5000), noise.split(5000), strict=True)
        ]
    )
    state = teacher.decode_state(torch.tensor([2]), 1.5)
    first = distribution(teacher, state, sampling)[0]
    check_frequencies(tokens[:, 0], first)
    most = int(first.argmax())
    teacher.append(state, torch.tensor([[most]]))
    second = distribution(teacher, state, sampling)[0]
    check_frequencies(tokens[tokens[:, 0] == most, 1], second)


def distribution(teacher: Teacher, state: object, sampling: Sampling) -> torch.Tensor:
    """Probabilities [n, V] of the next group, by plain torch."""
    weight = state.weight  # type: ignore[attr-defined]
    cond, uncond = teacher.logits(state)  # type: ignore[arg-type]
    logits = cond if uncond is None else uncond + weight * (cond - uncond)
    kept = logits >= logits.topk(sampling.top_k).values[..., -1:]
    return logits.masked_fill(~kept, -torch.inf).softmax(-1)[0]


def check_frequencies(drawn: torch.Tensor, p: torch.Tensor) -> None:
    counts = torch.bincount(drawn, minlength=VOCAB).double()
    assert counts[p == 0].sum() == 0
    distance = (counts / counts.sum() - p).abs().sum() / 2
    rng = np.random.default_rng(0)
    p64 = p.double().numpy()
    draws = rng.multinomial(len(drawn), p64 / p64.sum(), size=400) / len(drawn)
    floor = np.abs(draws - p64).sum(1) / 2
    assert distance < floor.mean() + 5 * floor.std()


def test_batches_and_order_change_only_rounding(teacher: Teacher) -> None:
    labels = torch.arange(96) % CLASSES
    noise = ops.normal_noise(0, torch.arange(96), 0, teacher.num_tokens, teacher.codebook.shape[1])
    whole = decode(teacher, labels, noise, teacher.plain_sampling(), make_solver())
    parts = [
        decode(teacher, labels[i : i + 7], noise[i : i + 7], teacher.plain_sampling(), make_solver())
        for i in range(0, 96, 7)
    ]
    assert (torch.cat(parts) == whole).float().mean() > 0.995
    back = decode(teacher, labels.flip(0), noise.flip(0), teacher.plain_sampling(), make_solver()).flip(0)
    assert (back == whole).float().mean() > 0.995


def test_overflowing_logits_are_an_error_naming_image_and_position(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked once a batch, though the tokens after the first bad one cannot be right."""
    labels, noise = torch.arange(3) % CLASSES, torch.randn(3, teacher.num_tokens, teacher.codebook.shape[1])
    plain, calls = type(teacher).logits, []

    def overflow(self: Teacher, state: Any) -> Any:
        cond, uncond = plain(self, state)
        calls.append(None)
        if len(calls) == 2:  # the second group
            cond[2, 0, 1] = torch.inf
        return cond, uncond

    monkeypatch.setattr(type(teacher), "logits", overflow)
    with pytest.raises(UserError, match="row 2, position 1 of the guided logits .* overflow"):
        decode(teacher, labels, noise, teacher.plain_sampling(), make_solver())
    assert len(calls) == len(teacher.groups)


def test_a_codebook_that_is_not_finite_is_refused_before_anything_is_written(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, broken = manifest_of(teacher), teacher.codebook.clone()
    broken[3, 1] = torch.nan
    monkeypatch.setattr(type(teacher), "codebook", broken)
    with pytest.raises(UserError, match="codebook row 3 is not finite"):
        make(tmp_path, teacher, manifest)
    assert not contents(tmp_path)


def test_ranks_share_a_folder(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher)
    make(tmp_path / "one", teacher, manifest)
    for rank in (1, 2, 0):
        make(tmp_path / "three", teacher, manifest, shards=range(rank, manifest.num_shards, 3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_deleted_shard_comes_back_to_the_same_bytes(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher)
    make(tmp_path, teacher, manifest)
    before = contents(tmp_path)
    store.shard_path(tmp_path, 2).unlink()
    plan = Plan(tmp_path, manifest, range(4))
    assert plan.missing == [2] and plan.pairs_missing == 16
    execute(plan, teacher, 8)
    assert contents(tmp_path) == before


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from ddfast.flow import make_solver
from ddfast.models import load_teacher
from ddfast.pairs import Plan, describe, execute
bundle, folder, quiet = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
teacher = load_teacher(bundle)
manifest = describe(teacher, teacher.plain_sampling(), make_solver(), num=240, shard_size=4)
def work(out):
    execute(Plan(out, manifest, range(manifest.num_shards)), teacher, 4)
start = time.monotonic(); work(quiet); whole = time.monotonic() - start
random.seed(0)
kills = 0
while True:
    child = os.fork()
    if child == 0:
        try:
            work(folder)
        except BaseException as error:
            print(error, file=sys.stderr); os._exit(9)
        os._exit(0)
    if kills < 25:
        time.sleep(random.uniform(0, whole / 8))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        kills += 1
        visible = [p for p in folder.glob("*") if not p.name.startswith(".")] if folder.exists() else []
        for p in visible:
            assert p.read_bytes() == (quiet / p.name).read_bytes(), f"half a file: {p}"
    else:
        assert os.WEXITSTATUS(status) == 0, "a rerun failed"
        break
assert kills >= 5, kills
print(kills)
"""


@pytest.mark.parametrize("family", ["var", pytest.param("llamagen", marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_loses_nothing(tmp_path: Path, family: str) -> None:
    bundle = tiny_bundle(tmp_path / "tiny.safetensors", family)
    command = [sys.executable, "-c", KILLED, str(bundle), str(tmp_path / "killed"), str(tmp_path / "quiet")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a forked child has no threads to wait for
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "quiet")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_no_trace(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher, num=400, shard_size=200)
    undisturbed = tmp_path / "undisturbed"
    make(undisturbed, teacher, manifest)
    folder = tmp_path / "full"
    with largest_file(4000), pytest.raises(OSError, match="File too large"):  # a manifest fits, a shard does not
        make(folder, teacher, manifest)
    assert list(contents(folder)) == ["manifest.json"]
    make(folder, teacher, manifest)
    assert contents(folder) == contents(undisturbed)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_failing_system_calls_leave_no_trace(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    manifest = manifest_of(teacher)
    make(tmp_path, teacher, manifest, shards=range(1))
    before = contents(tmp_path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, full)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path, teacher, manifest)
    assert contents(tmp_path) == before


def test_no_room_is_noticed_before_work(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddfast.files.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="need about 1.* KiB, but .* has 1000 bytes free"):
        Plan(tmp_path / "new", manifest_of(teacher), range(4))
    assert not (tmp_path / "new").exists()


def test_abandoned_temporary_files_go_and_living_ones_stay(tmp_path: Path, teacher: Teacher) -> None:
    from ddfast.files import open_temporary

    with open_temporary(tmp_path / "shard-00000.safetensors") as living:
        dead = tmp_path / ".shard-00001.safetensors.01234567.tmp"
        dead.write_bytes(b"half")
        make(tmp_path, teacher, manifest_of(teacher))
        assert Path(living.name).exists() and not dead.exists()


def test_another_manifest_is_refused_naming_the_fields(tmp_path: Path, teacher: Teacher) -> None:
    make(tmp_path, teacher, manifest_of(teacher))
    with pytest.raises(UserError, match="num is 50, not 60; seed is 0, not 4"):
        Plan(tmp_path, manifest_of(teacher, num=60, seed=4), range(4))
    other = describe(
        teacher, Sampling(3.0, 0, teacher.plain_sampling().top_p), make_solver(nfe=8), num=50, shard_size=16
    )
    with pytest.raises(UserError, match=r"sampling.guidance is .*, not 3.0; solver"):
        Plan(tmp_path, other, range(4))


def test_every_damaged_byte_of_a_shard_is_noticed(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher, num=10, shard_size=10)
    make(tmp_path, teacher, manifest)
    path = store.shard_path(tmp_path, 0)
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x04]) + data[position + 1 :])
        with pytest.raises(UserError, match="shard-00000"):
            read_shard(tmp_path, manifest, 0)
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="shard-00000"):
            Plan(tmp_path, manifest, range(1))
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="shard-00000"):
        PairDataset(tmp_path)


def test_every_damaged_byte_of_a_manifest_is_noticed(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher, num=4, shard_size=4)
    make(tmp_path, teacher, manifest)
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x01]) + data[position + 1 :])
        with contextlib.suppress(UserError):
            assert read_manifest(tmp_path) == manifest  # a changed blank is no damage
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="manifest.json is damaged"):
        PairDataset(tmp_path)
    values = json.loads(data)
    path.write_text(json.dumps(values | {"seed": 1}))
    with pytest.raises(UserError, match="was changed"):
        PairDataset(tmp_path)
    path.write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(UserError, match="format 2"):
        PairDataset(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="holds shards but no manifest"):
        Plan(tmp_path, manifest, range(1))


def test_a_shard_of_other_pairs_is_refused(tmp_path: Path, teacher: Teacher) -> None:
    make(tmp_path / "a", teacher, manifest_of(teacher, seed=0))
    make(tmp_path / "b", teacher, manifest_of(teacher, seed=1))
    (tmp_path / "a" / "shard-00001.safetensors").write_bytes((tmp_path / "b" / "shard-00001.safetensors").read_bytes())
    with pytest.raises(UserError, match="shard-00001.safetensors belongs to other pairs"):
        PairDataset(tmp_path / "a")
    make(tmp_path / "c", teacher, manifest_of(teacher))
    (tmp_path / "c" / "shard-00001.safetensors").write_bytes((tmp_path / "c" / "shard-00000.safetensors").read_bytes())
    with pytest.raises(UserError, match="shard-00001.safetensors belongs to other pairs"):
        PairDataset(tmp_path / "c", verify=False)


def test_dataset_reads_at_random(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher)
    make(tmp_path, teacher, manifest)
    dataset = PairDataset(tmp_path)
    assert len(dataset) == 50
    everything = dataset[torch.arange(50)]
    assert everything.tokens.dtype == everything.labels.dtype == torch.int64 and everything.noise.dtype == torch.float32
    assert everything.labels.tolist() == [i % CLASSES for i in range(50)]
    for index in (0, 15, 16, 49, -1):
        one = dataset[index]
        assert all(torch.equal(a, b[index]) for a, b in zip(one, everything, strict=True))
    with pytest.raises(IndexError):
        dataset[[50]]
    sampler = BatchSampler(RandomSampler(dataset, generator=torch.Generator().manual_seed(0)), 7, drop_last=False)
    batches = list(DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=2))
    assert sum(len(b.labels) for b in batches) == 50
    order = [i for b in sampler for i in b]
    order_again = torch.cat([b.tokens for b in DataLoader(dataset, sampler=[order], batch_size=None)])
    assert torch.equal(order_again, everything.tokens[order])


def test_unfinished_folders(tmp_path: Path, teacher: Teacher) -> None:
    manifest = manifest_of(teacher)
    make(tmp_path, teacher, manifest, shards=range(2))
    with pytest.raises(UserError, match="unfinished: shard 2 of 4 is missing"):
        PairDataset(tmp_path)
    assert len(PairDataset(tmp_path, partial=True)) == 32
    with pytest.raises(UserError, match="holds no pairs"):
        PairDataset(tmp_path / "elsewhere")


def test_batches_never_cross_shards(teacher: Teacher) -> None:
    manifest = manifest_of(teacher, num=23, shard_size=10)
    sizes: list[int] = []
    for shard in range(3):
        engine.make_shard(teacher, manifest, shard, 4, sizes.append)
    assert sizes == [4, 4, 2, 4, 4, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 0}, "num is 0"),
        ({"shard_size": 0}, "shard-size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"labels": (5,)}, "label 5 is not a class of tiny-.*; use 0 to 4"),
        ({"labels": ()}, "labels is empty"),
    ],
)
def test_impossible_manifests(teacher: Teacher, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        manifest_of(teacher, **changes)  # type: ignore[arg-type]


def test_impossible_sampling(teacher: Teacher) -> None:
    for sampling in (
        {"top_p": 1.5},
        {"top_k": -1},
        {"temperature": 0.0},
        {"guidance": -1.0},
        {"guidance": float("nan")},
        {"top_k": 99},
    ):
        with pytest.raises(UserError, match=f"{next(iter(sampling)).replace('_', '.')}"):
            describe(
                teacher, Sampling(**({"guidance": 1.0, "top_k": 0, "top_p": 0.5} | sampling)), make_solver(), num=1
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_a_gpu_gives_the_tokens_of_the_cpu(name: str) -> None:
    tokens = {}
    for device in ("cpu", "cuda"):
        teacher = load_teacher(name, device=device)
        noise = ops.normal_noise(1, torch.arange(64, device=device), 0, teacher.num_tokens, teacher.codebook.shape[1])
        labels = torch.arange(64, device=device) % 10
        tokens[device] = decode(teacher, labels, noise, teacher.preset(), make_solver()).cpu()
    first = teacher.groups[0]
    assert (tokens["cpu"][:, :first] == tokens["cuda"][:, :first]).float().mean() > 0.98
    assert (tokens["cpu"] == tokens["cuda"]).float().mean() > 0.95  # a token that differs changes those after it
