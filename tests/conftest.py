from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import FAMILIES
from safetensors import safe_open
from shared import shared_folder, traced_once
from tiny import tiny_bundle, tiny_student
from train_helpers import Launcher, share_modulation

from ddfast.cli import main
from ddfast.models import Teacher, load_teacher

HERE = Path(__file__).parent
LONG = ("export", "export_aoti", "report_cli", "train_cli", "kernels_aot", "layers_cuda", "kernels", "digits")
"""Files of tests that take longest. They come first, so that no worker is left with one of them at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=HERE / "golden", help="outputs of the official code")


def golden_files(config: pytest.Config, pattern: str) -> list[Path]:
    """The golden files of one kind in the folder chosen by --golden."""
    return sorted(Path(config.getoption("--golden")).glob(pattern + ".safetensors"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"test_{name}.py": place - len(LONG) for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.name, 0))


def settle() -> None:
    """What is alive here stays: no later collection, which some of what is tested asks for, looks through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session: pytest.Session) -> None:
    settle()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        settle()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.golden("var_teacher_*", …)`` runs a test that takes ``golden`` once per file of these kinds."""
    mark = metafunc.definition.get_closest_marker("golden")
    if mark is None:
        return
    files = [path for pattern in mark.args for path in golden_files(metafunc.config, pattern)]
    params = files or [Path(mark.args[0])]  # an absent kind is one failing test, not a silent skip
    metafunc.parametrize("golden", params, ids=[p.stem for p in params], indirect=True)


@pytest.fixture
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden"))


class Golden:
    """One golden file: ``config``, tensors by full name, and weights with their int8 scaling undone."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as f:
            self.config: dict[str, Any] = json.loads(f.metadata()["config"])
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}
        self.path = path

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def weights(self, prefix: str = "weights.") -> dict[str, torch.Tensor]:
        exponents = self.config.get("int8_weight_exponent", {})
        out = {}
        for key, value in self.tensors.items():
            if key.startswith(prefix):
                name = key[len(prefix) :]
                exponent = exponents.get(name, exponents.get(key))
                out[name] = value if exponent is None else value.float() * 2.0**-exponent
        return out

    def close(self, got: torch.Tensor, key: str) -> None:
        """Assert |got - want| <= atol + rtol |want| with the tolerances stored in the file."""
        torch.testing.assert_close(got, self[key].to(got.dtype), rtol=self.config["rtol"], atol=self.config["atol"])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    if not request.param.exists():
        pytest.fail(f"no file {request.param}.safetensors in {request.config.getoption('--golden')}", pytrace=False)
    return Golden(request.param)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what all workers of this run share: see ``shared.once``."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def trace_once(run_folder: Path) -> Iterator[None]:
    """The same module is exported to ONNX once a run: each takes seconds, and many tests are about what comes after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", traced_once(run_folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What ddfast remembers of programs made on this machine stays within the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny teacher of each family, as a file."""
    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny_bundle(folder / f"{family}.safetensors", family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Teacher:
    """Each of ``bundles``, loaded."""
    return load_teacher(str(bundles[request.param]))


@pytest.fixture(scope="module")
def bundle(teacher: Teacher, bundles: dict[str, Path]) -> str:
    """The file of ``teacher``, as a command is given it."""
    return str(bundles[teacher.name.removeprefix("tiny-")])


@pytest.fixture(scope="module")
def student_file(teacher: Teacher, bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student of ``teacher``: ``tiny_student``."""
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    return tiny_student(path, bundle, teacher.name.removeprefix("tiny-"))


@pytest.fixture(scope="module")
def pyramid_student_file(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student of several scales, where one family is enough."""
    return tiny_student(tmp_path_factory.mktemp("pyramid") / "student.safetensors", str(bundles["var"]), "var")


@pytest.fixture(scope="module")
def raster_student_file(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student of the family that is exported fastest, where one family is enough."""
    return tiny_student(tmp_path_factory.mktemp("raster") / "student.safetensors", str(bundles["llamagen"]), "llamagen")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of a tiny teacher of each family, and of one whose blocks share their modulation: --teacher and --pairs."""
    folder, options = tmp_path_factory.mktemp("inputs"), {}
    for name in ("var", "llamagen", "shared"):
        bundle = folder / f"{name}.safetensors"
        tiny_bundle(bundle, "var" if name == "shared" else name)
        if name == "shared":
            share_modulation(bundle)
        pairs = folder / f"{name}-pairs"
        assert main(["pairs", "--teacher", str(bundle), "--num", "150", "--shard-size", "64", "--out", str(pairs)]) == 0
        options[name] = ["--teacher", str(bundle), "--pairs", str(pairs)]
    return options


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()
