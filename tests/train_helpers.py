"""Runs of the trainer on tiny teachers, in this process or in one that may be killed.

As a program: reads command lines of ``ddfast`` and runs each in processes forked for it, one a rank, so that a hundred
runs cost one import of torch.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import random_weights

from ddfast.cli import main
from ddfast.models import Teacher
from ddfast.models.checkpoints import load_bundle, make_part, read_safetensors, save_bundle
from ddfast.models.var import VARConfig, VARTransformer
from ddfast.pairs import PairDataset
from ddfast.training import Run, TrainConfig, Trainer
from ddfast.training.distance import L2
from ddfast.training.monitor import read_metrics
from ddfast.training.objective import Objective
from ddfast.training.parallel import Ranks
from ddfast.training.source import StoredPairs

PLAIN = (
    "--precision float32 --recipe digits --steps 6 --batch 16 --warmup 2 --holdout 17 --log-every 1 --eval-every 4 "
    "--samples 4"
)
SPEED = ("pairs_per_s", "mfu")
HANGS = 60  # seconds after which a forked run is given up


def settings(**changes: Any) -> TrainConfig:
    """A short run, of every pair three times."""
    plain: dict[str, Any] = dict(steps=6, batch=16, timesteps=(0, 2), lr=1e-2, distance="l2", ema=0.9, holdout=18)
    return TrainConfig(**plain | changes)


class Told:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, step: int, figures: dict[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        self.lines.append(text)


def new_trainer(
    folder: Path, teacher: Teacher, dataset: PairDataset, config: TrainConfig, run: Run | None = None
) -> Trainer:
    """As ``ddfast train`` makes it, on one rank; its student is kept nowhere."""
    student = teacher.new_student(torch.Generator().manual_seed(config.seed), config.layerwise)
    tokenizer: Any = teacher._tokenizer
    return Trainer(
        folder,
        config,
        Run(log_every=1, samples=4) if run is None else run,
        student,
        StoredPairs(dataset, config, teacher.device),
        Objective(student, L2(), teacher.codebook.clone(), config),
        {"teacher": teacher.name},
        images=tokenizer.decode_embeddings,
        keep_student=lambda weights, step: None,
        ranks=Ranks(),
        report=Told(),
    )


def train(out: Path, options: list[str], *more: str) -> list[str]:
    return ["train", *options, "--out", str(out), *PLAIN.split(), *more]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run a command that must be refused with exit code 2; returns what it said."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def curve(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in SPEED} for line in read_metrics(folder)]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").iterdir())


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves for good: its curve, and the bytes of its student, last checkpoint and last picture."""
    assert not [p for p in folder.rglob("*") if ".tmp" in p.name]
    files = [folder / "student.safetensors", checkpoints(folder)[-1], sorted((folder / "samples").iterdir())[-1]]
    return {"curve": curve(folder)} | {p.name: p.read_bytes() for p in files}


def share_modulation(path: Path) -> None:
    """Replace a bundle's transformer by one like VAR-d36's."""
    config = VARConfig(2, 32, 2, (1, 2, 3), 5, 24, 4, shared_aln=True)
    weights = random_weights(VARTransformer(config), 3)
    transformer = make_part("var-transformer", config, weights, "test")
    save_bundle(path, "tiny-shared", {**load_bundle(path)[1], "transformer": transformer})


def tree(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(checkpoints(folder)[-1])[1]


class Launcher:
    """The program below, and the folder for what its runs print."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def __call__(
        self,
        *argv: object,
        world: int = 1,
        kill_after: float | None = None,
        kill_at: int | None = None,
        ask_at: int | None = None,
    ) -> list[int]:
        """Exit codes of a command line's ranks; those of one that was killed are negative.

        Args:
            kill_after: seconds.
            kill_at: the process kills itself at this of its writes of a tensor, renamings and deletions.
            ask_at: the last rank gets SIGTERM in this step, the others nothing.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        task = {
            "argv": [str(a) for a in argv],
            "world": world,
            "kill_after": kill_after,
            "kill_at": kill_at,
            "ask_at": ask_at,
        }
        self.process.stdin.write(json.dumps(task | {"log": str(self.log)}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def said(self) -> str:
        """What the last command line printed."""
        return self.log.read_text()

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    import torch._dynamo  # what every run imports
    import torch.distributed.fsdp
    import torch.utils.tensorboard
    from PIL import Image

    Image.init()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # no run looks through all of this again, nor copies its pages
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        Path(task["log"]).write_bytes(b"")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        pids = [fork(task, rank, port) for rank in range(task["world"])]
        if task["kill_after"] is not None:
            time.sleep(task["kill_after"])
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def fork(task: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(task["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.alarm(HANGS)
        if task["world"] > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": task["world"], "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in place.items()}
        if task["kill_at"] is not None:
            die_at(task["kill_at"])
        if task["ask_at"] is not None and rank == task["world"] - 1:
            terminate_in(task["ask_at"])
        code = main(task["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def terminate_in(chosen: int) -> None:
    """Send this process SIGTERM before step ``chosen``."""
    plain = Trainer.step

    def step(self: Trainer, n: int) -> None:
        if n == chosen:
            signal.raise_signal(signal.SIGTERM)
        plain(self, n)

    Trainer.step = step  # type: ignore[method-assign]


def die_at(count: int) -> None:
    """Kill this process at its ``count``-th write of a tensor, renaming or deletion."""
    import ddfast.models.checkpoints
    import ddfast.training.checkpoint

    left = [count]

    def event() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda name, _: event() if name in ("os.rename", "os.remove") else None)
    for module in (ddfast.models.checkpoints, ddfast.training.checkpoint):
        plain = module.write_tensors

        def watched(file: Any, tensors: Any, note: str, plain: Any = plain) -> None:
            def write(data: Any) -> None:
                event()
                file.write(data)

            plain(SimpleNamespace(write=write), tensors, note)

        module.write_tensors = watched


if __name__ == "__main__":
    serve()
