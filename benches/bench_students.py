"""Digits students from nothing: pairs, training, and what their images are worth, by the commands of the README.

CPU seconds are of this process and all its threads. Accuracy and Frechet distances (FD to the real data, FD_T to the
teacher's ordinary samples) are those of ``ddfast digits eval --student``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import RESULTS, finish, hardware

from ddfast.cli import main as ddfast
from ddfast.digits.train import measure_students
from ddfast.training.monitor import read_metrics

SIZES = {"20k": 21_000, "60k": 61_000, "120k": 121_000}  # pairs, of which 1,000 are held out
CASES = [  # with options in place of the recipe's values
    ("digits-var", "20k", ""),
    ("digits-llamagen", "20k", ""),
    ("digits-var", "120k", "--steps 8000"),
    ("digits-var", "120k", "--steps 7000 --timesteps 0"),
    ("digits-llamagen", "60k", "--steps 6000"),
]


def command(*words: str) -> float:
    """Run a command of ddfast; CPU seconds."""
    begin = time.process_time()
    code = ddfast(words)
    if code:
        raise SystemExit(f"ddfast {' '.join(words)} failed with {code}")
    return time.process_time() - begin


def measured(teacher: str, size: str, options: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """One student's way from nothing, as a row; ``pairs_cpu_s`` is null where the pairs were there already."""
    num = SIZES[size]
    pairs, run = folder / f"{teacher}-pairs-{size}", folder / "-".join([teacher, size, *options, str(seed)])
    there = pairs.exists()
    making = command("pairs", "--teacher", teacher, "--num", str(num), "--out", str(pairs))
    words = ["train", "--teacher", teacher, "--pairs", str(pairs), "--out", str(run), "--seed", str(seed), *options]
    begin = time.perf_counter()
    training = command(*words)
    seconds = time.perf_counter() - begin
    config = json.loads((run / "config.json").read_text())
    lines = read_metrics(run)
    report = {
        way.replace(str(run), "student"): v for way, v in measure_students([run])[teacher].items() if way != "samples"
    }
    return {
        "teacher": teacher,
        "size": size,
        "seed": seed,
        "pairs": num,
        "options": options,
        "steps": config["config"]["steps"],
        "batch": config["config"]["batch"],
        "precision": config["run"]["precision"],
        "pairs_cpu_s": None if there else making,
        "training_cpu_s": training,
        "training_s": seconds,
        "holdout": lines[-1],
        "quality": report,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["digits-var", "digits-llamagen"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, help="keep pairs and runs here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS / "students-digits.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for teacher, size, options in CASES:
            for seed in args.seeds if args.only in (None, teacher) else ():
                rows.append(measured(teacher, size, options.split(), seed, args.folder or Path(temporary)))
                print(json.dumps(rows[-1]), flush=True)
    finish({"bench": "students", "hardware": hardware(), "samples": 5000, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
