"""kill -9 at thirty random moments of every command that writes: the rerun ends in the bytes of an undisturbed run, and
nothing else stays."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from train_helpers import Launcher, outcome, train

KILLS = {"pairs": 8, "samples": 6, "npz": 6, "grid": 2, "train": 6, "export": 2}


def everything(folder: Path) -> dict[str, bytes]:
    """All files by name, but for locks, and what clocks decide: TensorBoard's, and times in an export's manifest."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock" and "tensorboard" not in p.parts and p.name != "metrics.jsonl"
    }


@pytest.mark.slow
@pytest.mark.parametrize("what", KILLS)
def test_killed_at_any_moment_and_run_again(
    what: str,
    tmp_path: Path,
    launch: Launcher,
    inputs: dict[str, list[str]],
    bundles: dict[str, Path],
    raster_student_file: Path,
) -> None:
    assert sum(KILLS.values()) == 30
    teacher = ["--teacher", str(bundles["llamagen"])]

    def command(folder: Path) -> list[str]:
        return {
            "pairs": ["pairs", *teacher, "--num", "1500", "--shard-size", "50", "--out", str(folder / "out")],
            "samples": ["sample", *teacher, "--num", "150", "--batch", "10", "--out", str(folder / "out")],
            "npz": ["sample", *teacher, "--num", "2000", "--batch", "50", "--out", str(folder / "x.npz")],
            "grid": ["sample", *teacher, "--num", "300", "--batch", "20", "--out", str(folder / "x.png")],
            "train": train(
                folder / "out", inputs["llamagen"], "--steps", "60", "--save-every", "7", "--log-every", "3"
            ),
            "export": ["export", "--student", str(raster_student_file), "--to", "onnx", "--out", str(folder / "out")],
        }[what]

    whole = tmp_path / "whole"
    start = time.monotonic()
    assert launch(*command(whole)) == [0], launch.said()
    took, rng, want = time.monotonic() - start, random.Random(what), everything(whole)
    kills, tries = 0, 0
    while kills < KILLS[what]:
        tries += 1
        assert tries <= 5 * KILLS[what], "it is always done before it is killed"
        killed = tmp_path / f"killed-{tries}"
        for _ in range(rng.randrange(1, 3)):  # once, or twice in a row
            kills += launch(*command(killed), kill_after=rng.uniform(0.02, 0.9) * took) == [-signal.SIGKILL]
        code = launch(*command(killed))
        assert code == [0] or what == "export" and "is there already" in launch.said(), launch.said()
        got = everything(killed)
        assert got.keys() == want.keys(), "nothing more, and nothing less"
        if what == "export":  # its manifest says how long it took
            del got["out/manifest.json"]
        assert all(got[name] == want[name] for name in got)
        if what == "train":
            assert outcome(killed / "out") == outcome(whole / "out")
