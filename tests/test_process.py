"""The command line as a process: fast answers, signals, launchers, terminals, and what becomes of what it prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from ddfast import launcher
from ddfast.cli import COMMANDS, main, os_message, read
from ddfast.cli import progress as progress_module
from ddfast.cli.progress import console, progress_bar
from ddfast.errors import UserError
from ddfast.hardware import kernels, missing_kernels
from ddfast.launcher import Launch, torchrun

LIGHT = """
import sys
from ddfast.__main__ import main
sys.argv = ["ddfast", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert end.code in (0, 2), end.code
heavy = {"torch", "numpy", "rich", "PIL", "safetensors", "resource"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "words",
    [["--version"], ["--help"], ["nonsense"], *([name, "--help"] for name in COMMANDS), ["pairs", "show", "--help"]],
    ids=" ".join,
)
def test_what_needs_no_torch_imports_none(words: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pairs --teacher digits-var --guidence 2", "unrecognized arguments: --guidence 2, did you mean --guidance?"),
        ("pairs shwo pairs/", "unrecognized arguments: shwo pairs/, did you mean show?"),
        ("sampel", "no command is called 'sampel', did you mean sample?"),
        ("frobnicate", "no command is called 'frobnicate'; there are info, pairs"),
        ("digits", "say which of train, eval"),
        ("pairs --num many", "argument -n/--num: invalid int value: 'many'"),
        ("--verbose", "unrecognized arguments: --verbose"),
    ],
)
def test_a_slip_is_one_line_that_helps(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "--help` says more" in err


def test_actions_have_their_own_options() -> None:
    args = read(["pairs", "show", "folder", "--out", "x.png"])
    assert args is not None and args.work == "pairs:show_pairs" and args.folder == Path("folder")
    args = read(["pairs", "--teacher", "digits-var", "--num", "3"])
    assert args is not None and args.work == "pairs:make" and args.num == 3


# --- launchers


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*launcher.VARIABLES, *launcher.MEETING):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, Launch()),
        ({"RANK": "", "WORLD_SIZE": " "}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "0"}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(3, 8, 1, 2)),
    ],
)
def test_what_torchrun_says(variables: pytest.MonkeyPatch, given: dict[str, str], want: Launch) -> None:
    for name, value in given.items():
        variables.setenv(name, value)
    assert torchrun() == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set; .*`unset WORLD_SIZE`"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, r"RANK is 5 and WORLD_SIZE is 2; a rank lies in \[0, WORLD_SIZE\)"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1"),
        ({"RANK": "x"}, "the environment variable RANK is 'x', which is no number"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²', which is no number"),
        ({"LOCAL_RANK": "-2"}, "LOCAL_RANK is -2"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is 0"),
    ],
)
def test_variables_left_behind_are_named(variables: pytest.MonkeyPatch, given: dict[str, str], message: str) -> None:
    for name, value in given.items():
        variables.setenv(name, value)
    with pytest.raises(UserError, match=message):
        torchrun()


def test_ranks_without_a_meeting_place_are_told(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("RANK", "0")
    variables.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but MASTER_ADDR and MASTER_PORT are not set"):
        launcher.check_meeting()
    variables.setenv("MASTER_ADDR", "host")
    with pytest.raises(UserError, match="but MASTER_PORT is not set"):
        launcher.check_meeting()


# --- signals and streams

WAITING = """
import sys, time
from ddfast.cli import main
import ddfast.cli.info
def run(args):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidied", flush=True)
ddfast.cli.info.run = run
sys.exit(main(["info"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_ends_a_command_lets_it_tidy_up(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "tidied\n"
    assert err == "ddfast: interrupted; what was finished is kept, and the same command goes on from there\n"


IMPORTING = """
import sys
print("ready", flush=True)
from ddfast.__main__ import main
sys.argv = ["ddfast", "info"]
sys.exit(main())
"""


def test_interrupted_while_importing_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # torch takes longer
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out and err.startswith("ddfast: interrupted"), err


PRINTING = """
import sys
from ddfast.cli import main
import ddfast.cli.info
def run(args):
    for _ in range(20000):
        print("a long line of a table,", chr(0xE9), chr(0x2501), chr(0xDCD6))
    return 0
ddfast.cli.info.run = run
sys.exit(main(["info"]))
"""


def printed(tail: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {tail}', sys.executable, PRINTING],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | environment,
    )


def test_what_is_printed_goes_wrong_in_a_sentence() -> None:
    full = printed("> /dev/full; echo rc=$?")
    assert full.stdout == "rc=1\n" and full.stderr == "ddfast: No space left on device\n"
    closed = printed("| head -1; echo rc=${PIPESTATUS[0]}")
    assert closed.stdout.endswith("rc=1\n") and not closed.stderr
    gone = printed(">&-; echo rc=$? >&2")
    assert gone.stderr == "rc=0\n"


def test_a_terminal_without_unicode_gets_escapes() -> None:
    plain = printed("| head -1", LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert plain.stdout == "a long line of a table, \\xe9 \\u2501 \\udcd6\n" and "Traceback" not in plain.stderr


def test_errors_of_the_system_name_their_file() -> None:
    assert os_message(OSError(28, "No space left on device")) == "No space left on device"
    assert os_message(OSError(28, "No space left on device", "x.npz")) == "No space left on device (x.npz)"
    assert os_message(OSError(2, "No such file or directory", b"x\xd6")) == "No such file or directory (x\udcd6)"


# --- what is said


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console(stderr=False)
    shown.print("pairs v1 [cfg] [/b] [red]", soft_wrap=True)
    with progress_bar(shown) as bar:
        bar.add_task("a[/b]c", total=1)
    assert "pairs v1 [cfg] [/b] [red]" in capsys.readouterr().out


def test_without_a_terminal_progress_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "FIRST", 0.05)
    monkeypatch.setattr(progress_module, "EVERY", 0.05)
    with progress_bar(console()) as bar:
        task, other = bar.add_task("pairs", total=2000), bar.add_task("other", total=1)
        bar.advance(task, 500)
        bar.advance(other)
        time.sleep(0.4)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pairs: 500 of 2,000 (25%)")]
    assert len(lines) >= 2, "a line now and then, though nothing moved"
    with progress_bar(console(), lines=False) as bar:
        bar.add_task("silent", total=1)
        time.sleep(0.2)
    with progress_bar(console(quiet=True)) as bar:
        bar.add_task("silent", total=1)
        time.sleep(0.2)
    assert "silent" not in capsys.readouterr().err


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    out = io.StringIO()
    with progress_bar(Console(file=out, force_terminal=True, width=100, markup=False)) as bar:
        bar.advance(bar.add_task("pairs", total=4), 4)
    assert "pairs" in out.getvalue() and "4/4" in out.getvalue()


def test_a_slow_path_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for native, triton, on_cpu, on_gpu in (
        (True, True, None, None),
        (True, False, None, "Triton: pip install 'ddfast"),
        (False, True, "install a C", "install the CUDA toolkit"),
        (False, False, "install a C", "nvcc"),
    ):
        monkeypatch.setattr("ddfast._native.available", lambda native=native: native)
        monkeypatch.setattr("ddfast._native.cuda_built", lambda native=native: native)
        monkeypatch.setattr("ddfast._library.has_triton", lambda triton=triton: triton)
        for device, want in ((cpu, on_cpu), (gpu, on_gpu)):
            said = missing_kernels(device)
            assert said is None if want is None else said is not None and want in said
        assert (
            kernels(gpu)
            == {
                (True, True): "CUDA and Triton",
                (True, False): "CUDA",
                (False, True): "Triton",
                (False, False): "none, plain torch",
            }[native, triton]
        )
