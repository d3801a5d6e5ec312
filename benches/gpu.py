"""Tests marked gpu, every operation against its ceiling and plain torch, then whole programs: ``make gpu``.

Needs torch for CUDA, Triton and pytest; no network. Writes benches/results/gpu-NAME.json after each figure, prints a
table last, and exits with 1 if a test or a case failed, after all the others. Times are medians (the JSON has p20 and
p80, too) on a cold cache. A ceiling is the time to move the least bytes at the rate of a device-to-device copy, or to
do the arithmetic at that of a bfloat16 matrix product, whichever is longer; both rates are measured in the same run.

    make gpu                                        # within 8 minutes
    make gpu GPU_FLAGS="--only tune --seconds 580"  # what configurations of the kernels are fastest here
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_export
import gpu_pairs
import gpu_sample
import gpu_train
import torch
from _common import RESULTS, finish, free, hardware
from gpu_cases import Case, Ceilings, Clock, all_cases, measure_case, measure_ceilings

from ddfast import _native

ROOT = Path(__file__).parent.parent
STAGES = ("tests", "benches", "pairs", "train", "sample", "export", "tune")
OUT_OF_TIME = "out of time"
_TEST_SECONDS, _CASE_SECONDS = 180, 90  # the most that all tests, and one case, may take
_KEPT = {"pairs": 100, "train": 70, "sample": 50, "export": 60}  # seconds that the stages before leave to these
_WHOLE: dict[str, Any] = {
    "pairs": gpu_pairs,
    "train": gpu_train,
    "sample": gpu_sample,
    "export": gpu_export,
}  # stages of whole programs
_SHOWN = 40  # failures in the table
_BROKEN = 3  # exit status of a process in which the device takes no more work

Figures = dict[str, Any]

# What configurations are searched for: arguments of ddfast.kernels.tune.tune, the most telling first.
_VAR, _TOP_2000 = {"top_k": 900, "top_p": 0.95}, {"top_k": 2000, "rule": "llamagen"}
TUNED: tuple[Figures, ...] = (
    {"operation": "flow", "rows": 43_520, "vocab": 4096, "channels": 32, "filter": _VAR, "dtype": "bfloat16"},
    {"operation": "flow", "rows": 512, "vocab": 16_384, "channels": 8, "filter": {}, "dtype": "bfloat16"},
    {"operation": "flow", "rows": 512, "vocab": 16_384, "channels": 8, "filter": _TOP_2000, "dtype": "bfloat16"},
    {"operation": "nearest", "rows": 43_520, "vocab": 4096, "channels": 32},
    {"operation": "filter", "rows": 43_520, "vocab": 4096, "filter": _VAR},
    {"operation": "flow", "rows": 16_384, "vocab": 16_384, "channels": 8, "filter": {}, "dtype": "bfloat16"},
)


def slug(name: str) -> str:
    """A device's name as part of a file name.

    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def output_of(command: list[str], pattern: str = r"(.*)") -> str | None:
    """What ``pattern`` finds in the output of a command; None if there is no such program, or it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, run.stdout)
    return found[1].strip() if run.returncode == 0 and found else None


def about(device: str) -> Figures:
    """Hardware, versions and commit."""
    facts = hardware(device)
    facts["driver"] = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    try:
        facts["versions"]["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        facts["versions"]["triton"] = None
    facts["versions"]["nvcc"] = output_of(["nvcc", "--version"], r"release ([\d.]+)")
    changed = output_of(["git", "status", "--porcelain", "--untracked-files=no"])
    return facts | {"commit": output_of(["git", "rev-parse", "HEAD"]), "commit_is_changed": bool(changed)}


# Tests


def test_files() -> list[Path]:
    """Those with tests marked gpu."""
    return [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]


def run_tests(seconds: float, files: Sequence[Path] | None = None, options: Sequence[str] = ("-m", "gpu")) -> Figures:
    """Run pytest on each file, by default of ``test_files``, in a process of its own, all at once.

    So a test that breaks the device for its process ends the tests of one file, and one that hangs none. What takes
    more than the seconds is interrupted, and the tests it has finished are counted.

    Returns counts, the failures' names and messages, seconds; ``problem`` where a file did not finish.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"problem": "pytest is not installed"}
    files, until = test_files() if files is None else files, time.monotonic() + seconds
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, len(files))))}
    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), []
        for path in files:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *options]
            # Not in the root folder: python -m would then import ddfast from its sources, where nothing is compiled.
            command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(path)]
            command += [f"--junitxml={folder / path.stem}.xml"]
            with (folder / f"{path.stem}.txt").open("w") as output:
                runs.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output))
        counts: Figures = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "seconds": {}}
        problems = []
        for path, run in zip(files, runs, strict=True):
            begin = time.monotonic()
            late = _wait(run, until)
            print(f"{path.name}: {(folder / path.stem).with_suffix('.txt').read_text()[-4000:]}", flush=True)
            report = folder / f"{path.stem}.xml"
            found = parse_junit(report.read_text()) if report.exists() else {}
            for key in ("passed", "failed", "skipped", "failures"):
                counts[key] += found.get(key, type(counts[key])())
            counts["seconds"][path.stem] = found.get("seconds", round(time.monotonic() - begin, 1))
            if late:
                problems.append(f"{path.name} took more than {seconds:.0f} s")
            elif run.returncode not in (0, 1) or not report.exists():  # such as 5: no tests ran
                problems.append(f"{path.name}: pytest ended with {run.returncode}")
    return counts | ({"problem": "; ".join(problems)} if problems else {})


def _wait(run: subprocess.Popen[bytes], until: float) -> bool:
    """Wait for a process until then, and end it. Returns whether it had to be ended."""
    for signal_, patience in ((None, until - time.monotonic()), (signal.SIGINT, 10.0), (signal.SIGKILL, 10.0)):
        if signal_ is not None:
            run.send_signal(signal_)  # pytest writes its report when it is interrupted
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(max(0.1, patience))
            return signal_ is not None
    return True


def parse_junit(text: str) -> Figures:
    """Counts of passed, failed (errors included) and skipped tests of a junit report, and of the failures the names,
    with what went wrong. A test that was interrupted has no name, and is not counted."""
    cases = [c for c in ElementTree.fromstring(text).iter("testcase") if c.get("name")]
    failed = [(c, part) for c in cases for part in c if part.tag in ("failure", "error")]
    skipped = [c for c in cases if c.find("skipped") is not None]
    bad = {id(c): f"{c.get('classname')}::{c.get('name')}: {_short(part.get('message'))}" for c, part in failed}
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "failures": list(bad.values()),
        "seconds": round(sum(float(c.get("time", 0)) for c in cases), 1),
    }


def _short(message: str | None) -> str:
    return " ".join((message or "").split())[:300]


# Benches


def measure_all(cases: Sequence[Case], clock: Clock, seconds: float, report: Callable[[Figures], None]) -> int:
    """Report each case's figures, or the error that ended it, in order.

    Returns an exit status, 0 or _BROKEN: after an access outside of its memory a GPU refuses this process all work. A
    case that takes too long ends the process.
    """
    until = time.monotonic() + seconds
    ceilings = measure_ceilings(clock)
    for case in cases:
        if time.monotonic() > until:
            report({"name": case.name, "problem": OUT_OF_TIME})
            continue
        faulthandler.dump_traceback_later(_CASE_SECONDS, exit=True, file=sys.__stderr__)
        try:
            report(measure_case(case, clock, ceilings))
        except Exception as error:  # noqa: BLE001 - recorded; the exit status tells
            traceback.print_exc()
            report({"name": case.name, "problem": f"{type(error).__name__}: {error}"[:500]})
        faulthandler.cancel_dump_traceback_later()
        if not clock.works():
            return _BROKEN
    return 0


def run_benches(names: Sequence[str], until: float, save: Callable[[list[Figures]], None], command: list[str]) -> None:
    """Have ``command`` measure the cases, as often as it takes: it may die of one, and goes on with the next.

    command is given the number of the case to begin with, the seconds left, and a file to add a line of JSON a case to.
    """
    rows: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(rows) < len(names):
            path = Path(folder) / f"{len(rows)}.jsonl"
            left = max(0.0, until - time.monotonic())
            status = subprocess.run([*command, str(len(rows)), str(left), str(path)]).returncode
            rows += [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
            if status not in (0, _BROKEN):
                rows.append({"name": names[len(rows)], "problem": f"the process ended with {status}"})
            save(rows)


def bench_from(number: str, seconds: str, path: str) -> int:
    """What the command of ``run_benches`` does."""

    def report(row: Figures) -> None:
        write_line(path, row, line)
        torch.cuda.empty_cache()

    clock = Clock(torch.device("cuda", torch.cuda.current_device()))
    return measure_all(list(all_cases())[int(number) :], clock, float(seconds), report)


def whole_from(stage: str, number: str, seconds: str, path: str) -> int:
    """What the command of ``run_benches`` does for a stage of _WHOLE. An error ends the process, which is recorded."""
    until, device = time.monotonic() + float(seconds), torch.device("cuda", torch.cuda.current_device())
    cases = whole_cases(stage)[int(number) :]
    faulthandler.dump_traceback_later(float(seconds) + 30, exit=True, file=sys.__stderr__)
    done: list[Figures] = []

    def report(row: Figures) -> None:
        done.append(row)
        write_line(path, row, _WHOLE[stage].line)

    try:
        report_cases(_WHOLE[stage].measure_case, cases, measure_ceilings(Clock(device)), device, until, report)
    except Exception as error:  # noqa: BLE001 - recorded; the exit status tells
        traceback.print_exc()
        report({"name": cases[len(done)].name, "problem": f"{type(error).__name__}: {error}"[:500]})
        return _BROKEN
    return 0


def report_cases(
    measure: Callable[[Any, Ceilings, torch.device], Figures],
    cases: Sequence[Any],
    ceilings: Ceilings,
    device: torch.device,
    until: float,
    report: Callable[[Figures], None],
) -> None:
    """Report each case's figures in order, until it is too late. An error ends this: the device may be out of order."""
    for case in cases:
        late = time.monotonic() > until
        report({"name": case.name, "problem": "out of time"} if late else measure(case, ceilings, device))
        free(device)  # graphs and what they run on


def whole_cases(stage: str) -> list[Any]:
    """The cases of a stage of _WHOLE."""
    cases: dict[str, Any] = {
        "pairs": gpu_pairs.pair_cases,
        "train": gpu_train.train_cases,
        "sample": gpu_sample.sample_cases,
        "export": gpu_export.export_cases,
    }
    return list(cases[stage]())


def write_line(path: str, row: Figures, shown: Callable[[Figures], str]) -> None:
    """Show a row and add it to a file of JSON lines."""
    print(shown(row), flush=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def line(row: Figures) -> str:
    """A case as a line of the table."""
    problem = row.get("problem", "").partition("\n")[0][:80]
    if "us" not in row:
        return f"{row['name']:42} {problem}"
    return (
        f"{row['name']:42} {row['us']['fused']['p50']:10.1f} us {row['times_ceiling']:8.2f} x ceiling "
        f"{row['times_plain']:8.1f} x faster than plain {row['agreement_percent']:7.2f}% as on the CPU  {problem}"
    ).rstrip()


# Tuning


def tune_one(problem: Figures) -> Figures:
    """The fastest configuration for a problem of TUNED, as an entry of kernels/configs.json."""
    from ddfast.flow import LogitFilter
    from ddfast.kernels.tune import tune

    arguments = dict(problem)
    if "filter" in arguments:
        arguments["filter"] = LogitFilter(**arguments["filter"])
    arguments["dtype"] = getattr(torch, arguments.get("dtype", "float32"))
    return tune(device=torch.device("cuda"), **arguments)


def run_tuning(problems: Iterable[Figures], until: float, save: Callable[[list[Figures]], None]) -> None:
    """Tune problem after problem, each in a process that is ended when the time is over."""
    rows: list[Figures] = []
    for problem in problems:
        left = until - time.monotonic()
        if left < 60:
            return
        command = [sys.executable, __file__, "--tune-one", json.dumps(problem)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            rows.append({**problem, "problem": OUT_OF_TIME})
        else:
            lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines() or ["no output"]
            rows.append(json.loads(lines[-1]) if run.returncode == 0 else {**problem, "problem": lines[-1]})
        print("tuned", rows[-1], flush=True)
        save(rows)


# Report


def failures(figures: Figures) -> list[str]:
    """What went wrong, a line each. Running out of time while tuning is no failure."""
    found = []
    if not _native.cuda_built():
        found.append("ddfast._C has no CUDA kernels: see what cmake said above")
    tests = figures.get("tests", {})
    found += [f"tests: {tests['problem']}"] if "problem" in tests else []
    found += [f"failed: {name}" for name in tests.get("failures", ())]
    rows = [row for stage in ("benches", *_WHOLE) for row in figures.get(stage, ())]
    found += [f"{row['name']}: {row['problem']}" for row in rows if "problem" in row]
    tuned = [row for row in figures.get("tuned", ()) if row.get("problem", OUT_OF_TIME) != OUT_OF_TIME]
    return found + [f"tuning {row['operation']}: {row['problem']}" for row in tuned]


def bars(rows: Iterable[Figures]) -> list[Figures]:
    """What is asked of the VAR flow at batch 64, and whether it holds. A miss is no failure."""
    found = []
    for row in rows:
        if row["name"].startswith("flow var 43520") and "us" in row:
            for name, bar, held in (
                ("times_read_once", {"at most": 2.0}, row["times_read_once"] <= 2),
                ("times_plain", {"at least": 50.0}, row["times_plain"] >= 50),
            ):
                found.append({"name": f"{row['name']}: {name}", "value": row[name], **bar, "held": held})
    return found


def print_report(figures: Figures) -> None:
    """The table, a line a case, then the tests and what failed."""
    print(f"\n{figures['hardware'].get('gpu', 'no GPU')}")
    for row in figures.get("benches", ()):
        print(line(row))
    for stage, whole in _WHOLE.items():
        for row in figures.get(stage, ()):
            print(whole.line(row))
    for bar in figures.get("bars", ()):
        print("held  " if bar["held"] else "MISSED", f"{bar['name']} = {bar['value']:.2f}")
    if "passed" in figures.get("tests", {}):
        print("tests: {passed} passed, {failed} failed, {skipped} skipped".format(**figures["tests"]))
    for failure in figures["failures"][:_SHOWN]:
        print(failure[:160])
    if len(figures["failures"]) > _SHOWN:
        print(f"and {len(figures['failures']) - _SHOWN} more: see the file")


def main() -> int:
    """Run the stages, write the JSON, print the report; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, action="append", help="a stage; may be repeated (default: all)")
    parser.add_argument("--seconds", type=float, default=430.0, help="time for all (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default benches/results/gpu-NAME.json)")
    parser.add_argument("--tune-one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--bench-from", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--whole-from", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here", file=sys.stderr)
        return 1
    if options.tune_one:
        print(json.dumps(tune_one(options.tune_one)))
        return 0
    if options.bench_from:
        return bench_from(*options.bench_from)
    if options.whole_from:
        return whole_from(*options.whole_from)
    stages = options.only or STAGES
    until, kept = time.monotonic() + options.seconds, {k: v for k, v in _KEPT.items() if k in stages}
    name = slug(torch.cuda.get_device_name()) + ("" if not options.only else "-" + "-".join(options.only))
    out: Path = options.out or RESULTS / f"gpu-{name}.json"
    figures: Figures = {"bench": "gpu", "hardware": about("cuda"), "cuda_built": _native.cuda_built()}

    def save(key: str, value: Figures | list[Figures]) -> None:
        figures[key] = value
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n")

    if "tests" in stages:
        save("tests", run_tests(min(_TEST_SECONDS, options.seconds)))
    if "benches" in stages:
        again = [sys.executable, __file__, "--bench-from"]
        run_benches([case.name for case in all_cases()], until - sum(kept.values()), partial(save, "benches"), again)
    for stage in [stage for stage in _WHOLE if stage in stages]:
        names, again = [case.name for case in whole_cases(stage)], [sys.executable, __file__, "--whole-from", stage]
        kept.pop(stage)
        run_benches(names, until - sum(kept.values()), partial(save, stage), again)
    if {"benches", *_WHOLE} & set(stages):
        whole = [bar for stage, module in _WHOLE.items() for bar in module.bars(figures.get(stage, ()))]
        save("bars", bars(figures.get("benches", ())) + whole)
    if "tune" in stages:
        run_tuning(TUNED, until, partial(save, "tuned"))
    figures["failures"] = failures(figures)
    finish(figures, out)
    print_report(figures)
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
