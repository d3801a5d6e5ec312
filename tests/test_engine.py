"""The engine that makes pairs: its buffers, the thread that writes, the batch it chooses, and its command."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import (
    contents,
    make,
    manifest_of,
)

from ddfast.cli import main
from ddfast.errors import UserError
from ddfast.flow import make_solver
from ddfast.models import Teacher, load_teacher
from ddfast.models.zoo import blueprint
from ddfast.pairs import Manifest, PairDecoder, describe, engine, memory, read_shard, store
from ddfast.pairs.store import Run
from ddfast.pairs.writer import Writer

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
    tmp_path: Path, teacher: Teacher, bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of(teacher)
    make(tmp_path, teacher, manifest, precision="int8")
    assert read_shard(tmp_path, manifest, 0).run == Run(8, "float32", "cpu", "int8")
    store.shard_path(tmp_path, 1).unlink()
    options = ["--guidance", "1.5", "--top-k", "6", "--solver", "adams", "-n", "50", "--shard-size", "16"]
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
