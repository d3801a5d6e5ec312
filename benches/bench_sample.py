"""`ddfast sample` at full size on random weights: its peak memory, and seconds an image, by plan.

Each row is a process of its own, as a user would start it: files read, 64 images drawn and decoded, an .npz written.
Its time counts all of that; ``memory_gb`` is the most it held.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, finish, hardware
from full_size import random_teacher

from ddfast.models import STUDENTS, save_student
from ddfast.models.checkpoints import make_part, save_bundle
from ddfast.models.zoo import TEACHERS, TOKENIZERS

CASES = {
    "var-dd-d16": ("--steps 1 --batch 64", "--teacher-groups 3:5 --batch 64"),
    "llamagen-dd-b": ("--steps 1 --batch 64", "--teacher-groups 60:80 --batch 64"),
}


def write_models(name: str, folder: Path) -> tuple[Path, Path]:
    """A student and its teacher at full size, in files of random weights."""
    entry = STUDENTS[name]
    teacher = random_teacher(entry.teacher, torch.float32)
    student = teacher.new_student(torch.Generator().manual_seed(0))
    known, vq = TEACHERS[entry.teacher], TOKENIZERS[str(TEACHERS[entry.teacher].tokenizer)]
    tokenizer = make_part(vq.kind, known.tokenizer_config, teacher.tokenizer.state_dict(), name)
    files = folder / "student.safetensors", folder / "teacher.safetensors"
    part = make_part(entry.kind, entry.config, student.state_dict(), name)
    save_student(files[0], name, part, tokenizer, entry.timesteps, entry.split, entry.teacher)
    transformer = make_part(str(known.kind), known.config, teacher.transformer.state_dict(), name)
    save_bundle(files[1], entry.teacher, {"transformer": transformer, "tokenizer": tokenizer})
    return files


def measured(student: Path, teacher: Path, options: str, num: int, folder: Path) -> dict[str, Any]:
    words = [sys.executable, "-m", "ddfast", "sample", "--student", str(student), "--out", str(folder / "out.npz")]
    words += ["--num", str(num), *options.split()]
    if "--teacher-groups" in options:
        words += ["--teacher", str(teacher), "--guidance", "2", "--top-k", "900"]
    begin = time.perf_counter()
    child = os.spawnv(os.P_NOWAIT, sys.executable, words)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(words[3:])} failed")
    return {
        "options": options,
        "images": num,
        "memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "s_per_image": round(seconds / num, 3),
        "cpu_s_per_image": round((usage.ru_utime + usage.ru_stime) / num, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), help="one student (default: all)")
    parser.add_argument("--options", help="one row's (default: all)")
    parser.add_argument("--num", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--out", type=Path, default=RESULTS / "sample.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in CASES if args.only is None else (args.only,):
        with tempfile.TemporaryDirectory() as temporary:
            files = write_models(name, Path(temporary))
            for options in CASES[name] if args.options is None else (args.options,):
                rows.append({"student": name} | measured(*files, options, args.num, Path(temporary)))
                print(json.dumps(rows[-1]), flush=True)
    finish({"bench": "sample", "hardware": hardware(), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
