"""Every Triton kernel compiled for sm_80 and sm_90, which needs no GPU: what it takes of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ddfast.flow import LogitFilter

pytest.importorskip("triton", reason="Triton is not installed (the extra 'triton')")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from triton_helpers import MMA, SHARED_LIMIT, SPILL, compile_kernel  # noqa: E402

from ddfast.kernels import configs, filters, flow, flow_tiles, nearest  # noqa: E402
from ddfast.kernels.flow_tables import HISTORY  # noqa: E402

VAR, LLAMAGEN = (4096, 32), (16384, 8)
VAR_FILTER = LogitFilter(top_k=900, top_p=0.95)


@dataclass(frozen=True)
class Case:
    """A kernel, the shape it serves, and whether its products must be on tensor cores."""

    name: str
    kernel: Any
    values: dict[str, Any]
    options: dict[str, int]
    tensor_cores: bool = False


def _block(count: int) -> int:
    return 1 << (count - 1).bit_length()


def flow_case(name: str, shape: tuple[int, int], keep: LogitFilter, dtype: str, guided: bool = True) -> Case:
    vocab, channels = shape
    config = configs.default_flow(vocab, channels, keep.top_k > 0 or keep.cuts_mass, 1024)
    assert isinstance(config, configs.RowsConfig)
    pointers = {name: "*fp32" for name in ("noise", "codebook", "tables", "x", "scratch")}
    numbers = dict.fromkeys(("temperature", "offset", "shrink", "certain", "pair", "log_prune"), "fp32")
    values = {
        **pointers,
        **numbers,
        "cond": dtype,
        "uncond": dtype,
        "tokens": "*i64",
        "evaluations": "*i32",
        **dict.fromkeys(("rows", "steps", "top_k"), "i32"),
        **dict.fromkeys(("guidance", "share"), "fp64"),
        **filters.filter_flags(keep),
        "GUIDED": guided,
        "VOCAB": vocab,
        "CHANNELS": channels,
        "HISTORY": HISTORY,
        "BLOCK_V": _block(vocab),
        "BLOCK_L": config.block_l,
        "BLOCK_K": config.block_k,
        "C_PAD": _block(channels),
    }
    return Case(name, flow.flow_kernel, values, {"num_warps": config.num_warps})


def tiles_case(name: str, shape: tuple[int, int], dtype: str, guided: bool = True, filtered: bool = False) -> Case:
    vocab, channels = shape
    config = configs.default_tiles(channels)
    values = {
        **dict.fromkeys(("noise", "codebook", "tables", "x", "slopes", "cuts"), "*fp32"),
        **dict.fromkeys(("temperature", "offset", "shrink", "certain", "pair"), "fp32"),
        "guidance": "fp64",
        "lasts": "*i32",
        "cond": dtype,
        "uncond": dtype,
        "tokens": "*i64",
        "evaluations": "*i32",
        **dict.fromkeys(("rows", "steps"), "i32"),
        "VOCAB": vocab,
        "CHANNELS": channels,
        "HISTORY": HISTORY,
        "GUIDED": guided,
        "HEATED": False,
        "FILTERED": filtered,
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "C_PAD": max(16, _block(channels)),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Case(name, flow_tiles.tiles_kernel, values, options, tensor_cores=True)


def filter_case(name: str, vocab: int, keep: LogitFilter) -> Case:
    config = configs.default_filter(vocab)
    values = {
        **dict.fromkeys(("logits", "out", "scratch"), "*fp32"),
        **dict.fromkeys(("rows", "top_k"), "i32"),
        "temperature": "fp32",
        "share": "fp64",
        "VOCAB": vocab,
        **filters.filter_flags(keep),
        "BLOCK_V": _block(vocab),
        "BLOCK_L": config.block_l,
    }
    return Case(name, filters.filter_kernel, values, {"num_warps": config.num_warps})


def cuts_case(name: str, vocab: int, keep: LogitFilter, dtype: str) -> Case:
    values = filter_case(name, vocab, keep).values
    values |= {"cond": dtype, "uncond": dtype, "cuts": "*fp32", "lasts": "*i32", "guidance": "fp64", "GUIDED": True}
    values = {name: value for name, value in values.items() if name not in ("logits", "out")}
    return Case(name, filters.cuts_kernel, values, {"num_warps": configs.default_filter(vocab).num_warps})


def nearest_case(name: str, shape: tuple[int, int], dtype: str) -> Case:
    vocab, channels = shape
    config = configs.default_nearest(channels)
    values = {
        "x": dtype,
        "codebook": "*fp32",
        "out": "*i64",
        "rows": "i32",
        "VOCAB": vocab,
        "CHANNELS": channels,
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "C_PAD": max(16, _block(channels)),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Case(name, nearest.nearest_kernel, values, options, tensor_cores=True)


CASES = [
    flow_case("flow rows VAR bf16", VAR, VAR_FILTER, "*bf16"),
    flow_case("flow rows VAR fp32", VAR, VAR_FILTER, "*fp32"),
    flow_case("flow rows LlamaGen top-k 2000", LLAMAGEN, LogitFilter(top_k=2000, rule="llamagen"), "*bf16"),
    flow_case("flow rows LlamaGen unfiltered", LLAMAGEN, LogitFilter(rule="llamagen"), "*fp32"),
    tiles_case("flow tiles LlamaGen fp32", LLAMAGEN, "*fp32"),
    tiles_case("flow tiles LlamaGen bf16 unguided", LLAMAGEN, "*bf16", guided=False),
    tiles_case("flow tiles VAR bf16", VAR, "*bf16", filtered=True),
    cuts_case("cuts VAR bf16", VAR[0], VAR_FILTER, "*bf16"),
    filter_case("filter VAR", VAR[0], VAR_FILTER),
    filter_case("filter LlamaGen", LLAMAGEN[0], LogitFilter(temperature=0.9, top_k=2000, top_p=0.8, rule="llamagen")),
    nearest_case("nearest VAR fp32", VAR, "*fp32"),
    nearest_case("nearest LlamaGen bf16", LLAMAGEN, "*bf16"),
]
SMALL = (filters.cuts_kernel, filters.filter_kernel, nearest.nearest_kernel)  # each compiled in less than a second


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(run_folder: Path) -> Iterator[None]:
    """Compile in earnest: nothing from an earlier run. In this one, a kernel is compiled only once for a machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(run_folder / "triton"))
        yield


def builds() -> Iterator[Any]:
    """Every case for both machines. The first case of each kernel for sm_90, and all small ones, are not slow."""
    seen = set()
    for case in CASES:
        for capability in (90, 80):
            quick = case.kernel in SMALL or case.kernel not in seen
            seen.add(case.kernel)
            name = f"{case.name.replace(' ', '-')}-{capability}"
            yield pytest.param(case, capability, id=name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("case", "capability"), list(builds()))
def test_fits_the_machine(case: Case, capability: int) -> None:
    built = compile_kernel(case.kernel, case.values, capability, case.options)
    print(f"\nsm_{capability} {case.name:34s} warps {case.options['num_warps']:2d}  {built}")
    assert built.count(SPILL) == 0 and built.stack == 0
    assert built.shared <= SHARED_LIMIT[capability]
    if case.tensor_cores:
        assert built.count(MMA) > 0
