"""What ``make gpu`` times: the fused operations at small and real sizes, with their ceilings and plain formulations.

On a CPU device everything runs too, at toy sizes, for tests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from statistics import quantiles
from typing import Any

import naive
import torch
from flow_cases import SETTINGS, Guided, Setting, count_work, guided_problem
from torch import Tensor

from ddfast import layers, ops
from ddfast.flow import LogitFilter, make_solver

Run = Callable[[], object]
_LEAST, _MOST, _SECONDS = 5, 50, 0.4  # repetitions, and how long they may take together
_COUNTED, _COMPARED = 64, 512  # rows whose work is counted, and whose tokens are compared with the CPU's


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best. copy_bytes: bytes read and written a second by a copy; flop: of a bf16 product."""

    copy_bytes_per_s: float
    bf16_flop_per_s: float


@dataclass(frozen=True)
class Prepared:
    """A case with its inputs on the device.

    run: the fused operation, without waiting for the device. plain: the same by other means.
    moved_bytes, flop: the least one call has to read and write, and to compute.
    check: how far the result is what the CPU gives.
    """

    run: Run
    plain: Mapping[str, Run]
    moved_bytes: float
    flop: float
    check: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """One line of the report. facts: what was measured, as the JSON has it."""

    name: str
    prepare: Callable[[torch.device], Prepared]
    facts: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Times calls on a device, each on a cold cache: a buffer larger than it is written before."""

    def __init__(self, device: torch.device, flush_megabytes: int = 256) -> None:
        self.device = device
        self._flush = torch.empty(flush_megabytes * 2**20, dtype=torch.int8, device=device)

    def spread(self, run: Run) -> dict[str, float]:
        """Microseconds a call: p20, p50 and p80 of as many calls as are quick to make, after three that do not count.

        On a GPU between events, so without the launch as far as it hides behind the flush; no call waits for another.
        """
        run()
        self._wait()
        begin = time.perf_counter()
        run(), run()
        self._wait()
        repeats = max(_LEAST, min(_MOST, int(_SECONDS / max(1e-9, (time.perf_counter() - begin) / 2))))
        cuts = quantiles(self._seconds(run, repeats), n=10, method="inclusive")
        return {name: 1e6 * cuts[i] for name, i in (("p20", 1), ("p50", 4), ("p80", 7))}

    def works(self) -> bool:
        """Whether the device still takes work."""
        try:
            self._flush.zero_()
            self._wait()
        except RuntimeError:
            return False
        return True

    def graphed(self, run: Run) -> dict[str, float]:
        """The same for a replay of the call captured in a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return self.spread(graph.replay)

    def _seconds(self, run: Run, repeats: int) -> list[float]:
        if self.device.type == "cpu":
            return [self._one_on_the_cpu(run) for _ in range(repeats)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            run()
            end.record()
        self._wait()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def _one_on_the_cpu(self, run: Run) -> float:
        self._flush.zero_()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_ceilings(clock: Clock, megabytes: int = 2048, size: int = 8192) -> Ceilings:
    """A copy of ``megabytes`` from the device to itself, and a bfloat16 product of square matrices of ``size``."""
    source = torch.randint(0, 100, (megabytes * 2**20,), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    copy = clock.spread(lambda: target.copy_(source))["p50"]
    multiply = clock.spread(lambda: torch.mm(a, b, out=product))["p50"]
    return Ceilings(2 * source.numel() / copy * 1e6, 2 * size**3 / multiply * 1e6)


def measure_case(case: Case, clock: Clock, ceilings: Ceilings) -> dict[str, Any]:
    """Everything about a case: times in microseconds, the ceiling, the ratios, agreement with the CPU."""
    made = case.prepare(clock.device)
    us = {"fused": clock.spread(made.run)} | {name: clock.spread(run) for name, run in made.plain.items()}
    fused, plain = us["fused"]["p50"], min(us[name]["p50"] for name in made.plain)
    moving = 1e6 * made.moved_bytes / ceilings.copy_bytes_per_s
    arithmetic = 1e6 * made.flop / ceilings.bf16_flop_per_s
    figures = {
        "name": case.name,
        **case.facts,
        "us": us,
        "read_once_us": moving,
        "arithmetic_us": arithmetic,
        "ceilings": {
            "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
            "bf16_tflop_per_s": ceilings.bf16_flop_per_s / 1e12,
        },
        "times_read_once": fused / moving,
        "times_ceiling": fused / max(moving, arithmetic),
        "times_plain": plain / fused,
        **made.check(),
    }
    if clock.device.type == "cuda":
        try:
            us["fused, in a CUDA graph"] = clock.graphed(made.run)
        except RuntimeError as error:
            figures["problem"] = f"in a CUDA graph: {error}"
    return figures


# Cases


def flow_case(name: str, setting: Setting, rows: int, dtype: torch.dtype, plain_rows: int = 16384) -> Case:
    """The whole flow, guided. plain_rows: rows a chunk of the plain formulation."""
    kind = str(dtype).removeprefix("torch.")
    facts = {"rows": rows, "dtype": kind, "setting": setting.describe()}
    return Case(f"flow {name} {rows} rows {kind}", partial(_flow, setting, rows, dtype, plain_rows), facts)


@lru_cache(maxsize=2)
def _few(family: str, rows: int, guidance: float) -> Guided:
    return guided_problem(family, rows, seed=1, guidance=guidance)


def _problem(setting: Setting, rows: int) -> Guided:
    return _few(setting.families[0], min(rows, 1024), setting.guidance).repeat(rows, seed=2)


def _flow(setting: Setting, rows: int, dtype: torch.dtype, plain_rows: int, device: torch.device) -> Prepared:
    solver, here = make_solver(), _problem(setting, rows)
    there = here.to(device, dtype)
    options: dict[str, Any] = {"guidance": setting.guidance, "filter": setting.filter}
    work = count_work(here.rows(_COUNTED), setting, solver)

    def check() -> dict[str, float]:
        sample = there.rows(_COMPARED)
        got = ops.flow_tokens(*sample.tensors, **options, solver=solver).cpu()
        want = ops.flow_tokens(*sample.to("cpu", dtype).tensors, **options, solver=solver)
        return {"agreement_percent": _percent(got == want)}

    return Prepared(
        run=partial(ops.flow_tokens, *there.tensors, **options, solver=solver, check=False),
        plain={"plain torch": partial(naive.flow_tokens, *there.tensors, **options, rows=plain_rows)},
        moved_bytes=there.cond.nbytes + there.uncond.nbytes + there.noise.nbytes,
        flop=rows * work.flop(setting.vocab, setting.channels),
        check=check,
    )


def filter_case(name: str, vocab: int, keep: LogitFilter, rows: int) -> Case:
    """The filter alone, of float32 logits."""
    facts = {"rows": rows, "vocab": vocab, "filter": keep.to_dict()}
    return Case(f"filter_logits {name} {rows} rows", partial(_filter, vocab, keep, rows), facts)


def _filter(vocab: int, keep: LogitFilter, rows: int, device: torch.device) -> Prepared:
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)).to(device)

    def check() -> dict[str, float]:
        some = logits[:_COMPARED]
        want = ops.filter_logits(some.cpu(), keep) > -torch.inf
        return {"agreement_percent": _percent(((ops.filter_logits(some, keep) > -torch.inf).cpu() == want).all(dim=1))}

    return Prepared(
        run=lambda: ops.filter_logits(logits, keep),
        plain={"plain torch": lambda: naive.filter_logits(logits, keep)},
        moved_bytes=2 * logits.nbytes,
        flop=0,
        check=check,
    )


def nearest_case(rows: int, vocab: int, channels: int) -> Case:
    """The nearest code to float32 vectors."""
    facts = {"rows": rows, "vocab": vocab, "channels": channels}
    return Case(f"nearest_code {rows} rows, V {vocab}, C {channels}", partial(_nearest, rows, vocab, channels), facts)


def _nearest(rows: int, vocab: int, channels: int, device: torch.device) -> Prepared:
    g = torch.Generator().manual_seed(4)
    x, codebook = (torch.randn(n, channels, generator=g).to(device) for n in (rows, vocab))

    def check() -> dict[str, float]:
        got = ops.nearest_code(x[:4096], codebook).cpu()
        return {"agreement_percent": _percent(got == ops.nearest_code(x[:4096].cpu(), codebook.cpu()))}

    return Prepared(
        run=lambda: ops.nearest_code(x, codebook),
        plain={
            "plain torch": partial(naive.nearest_matmul, x, codebook, rows),
            "cdist": partial(naive.nearest_cdist, x, codebook, rows),
        },
        moved_bytes=x.nbytes + codebook.nbytes + 8 * rows,
        flop=2 * rows * vocab * channels,
        check=check,
    )


def noise_case(pairs: int, positions: int, channels: int) -> Case:
    """Noise of some pairs; torch.randn, which gives other bits on every device, is the plain one."""
    facts = {"pairs": pairs, "positions": positions, "channels": channels}
    return Case(f"normal_noise {pairs} pairs", partial(_noise, pairs, positions, channels), facts)


def _noise(pairs: int, positions: int, channels: int, device: torch.device) -> Prepared:
    index = torch.arange(pairs, device=device)

    def draw(of: Tensor) -> Tensor:
        return ops.normal_noise(5, of, 0, positions, channels)

    return Prepared(
        run=partial(draw, index),
        plain={"torch.randn": lambda: torch.randn(pairs, positions, channels, device=device)},
        moved_bytes=4.0 * pairs * positions * channels,
        flop=0,
        check=lambda: {"agreement_percent": _percent(draw(index[:8]).cpu() == draw(index[:8].cpu()))},
    )


# What is between a transformer's matrix products: R rows of a batch, n positions, width D, H heads of width d.

Arguments = dict[str, Any]
_PATTERN = 2**20 + 1  # numbers that are drawn; tensors repeat them


@lru_cache(maxsize=1)
def _pattern() -> Tensor:
    return torch.randn(_PATTERN, generator=torch.Generator().manual_seed(6))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    count = math.prod(shape)
    return _pattern().to(dtype).repeat(-(-count // _PATTERN))[:count].view(shape)


def layer_case(
    operation: str, size: str, make: Callable[[int], Arguments], rows: int, moved: float, flop: float = 0, **plain: Any
) -> Case:
    """An operation of ddfast.layers, which is the plain formulation, and others by name that take the same arguments.

    make: arguments for a number of rows; "out" is left unwritten. moved: bytes.
    """
    facts = {"rows": rows, "size": size}
    return Case(f"{operation} {size}", partial(_layer, operation, make, rows, moved, flop, plain), facts)


def _layer(
    operation: str,
    make: Callable[[int], Arguments],
    rows: int,
    moved: float,
    flop: float,
    plain: dict[str, Callable[..., None]],
    device: torch.device,
) -> Prepared:
    fused, twin = getattr(ops, operation), getattr(layers, operation)

    def on(place: torch.device, given: Arguments) -> Arguments:
        return {name: value.to(place) if isinstance(value, Tensor) else value for name, value in given.items()}

    def check() -> dict[str, float]:
        """Of what a few rows write, the part that the CPU gives, too, within the rounding of the model's numbers."""
        got, want = (on(place, make(min(rows, 4))) for place in (device, torch.device("cpu")))
        fused(**got), fused(**want)
        same = []
        for name, value in want.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                rounding = 8 * torch.finfo(value.dtype).eps * float(value.float().abs().nan_to_num().max())
                same.append(torch.isclose(got[name].cpu(), value, rtol=0, atol=rounding, equal_nan=True).flatten())
        return {"agreement_percent": _percent(torch.cat(same))}

    given = on(device, make(rows))
    return Prepared(
        run=partial(fused, **given),
        plain={"plain torch": partial(twin, *given.values())}
        | {name: partial(run, **given) for name, run in plain.items()},
        moved_bytes=moved,
        flop=flop,
        check=check,
    )


def norm_case(rows: int, n: int, dim: int, dtype: torch.dtype) -> Case:
    """VAR's gate, sum, norm and modulation."""

    def make(rows: int) -> Arguments:
        mods, branch = normal(6, rows, dim), normal(rows, n, dim, dtype=dtype)
        of_mods = {"gate": mods[0], "scale": mods[1], "shift": mods[2], "eps": 1e-6}
        return {"x": normal(rows, n, dim), "branch": branch, **of_mods, "out": torch.full_like(branch, torch.nan)}

    moved = rows * n * dim * (8 + 2 * dtype.itemsize) + 12 * rows * dim
    return layer_case("add_layer_norm", f"[{rows}, {n}, {dim}] {_kind(dtype)}", make, rows, moved)


def rms_case(rows: int, dim: int, dtype: torch.dtype) -> Case:
    """LlamaGen's sum and norm, of one position."""

    def make(rows: int) -> Arguments:
        branch = normal(rows, 1, dim, dtype=dtype)
        given = {"x": normal(rows, 1, dim), "branch": branch, "weight": normal(dim), "eps": 1e-5}
        return given | {"out": torch.full_like(branch, torch.nan)}

    moved = rows * dim * (8 + 2 * dtype.itemsize) + 4 * dim
    return layer_case("add_rms_norm", f"[{rows}, 1, {dim}] {_kind(dtype)}", make, rows, moved)


def _cache(rows: int, heads: int, positions: int, width: int, dtype: torch.dtype) -> Tensor:
    return normal(2, rows, heads, positions, width, dtype=dtype)


def append_normed_case(rows: int, n: int, heads: int, width: int, start: int, dtype: torch.dtype) -> Case:
    """VAR's q and k norms, and what its last scale adds to the cache."""

    def make(rows: int) -> Arguments:
        return {
            "qkv": normal(rows, n, 3, heads, width, dtype=dtype),
            "scale": normal(heads).exp(),
            "cache": _cache(rows, heads, start + n, width, dtype),
            "length": torch.tensor([start], dtype=torch.int32),
        }

    moved = 2 * rows * n * 3 * heads * width * dtype.itemsize
    return layer_case("append_normed", f"[{rows}, {n}, 3, {heads}, {width}] {_kind(dtype)}", make, rows, moved)


def append_rotated_case(rows: int, heads: int, width: int, positions: int, dtype: torch.dtype) -> Case:
    """LlamaGen's RoPE, and the last position that its cache holds."""

    def make(rows: int) -> Arguments:
        return {
            "qkv": normal(rows, 1, 3 * heads, width, dtype=dtype),
            "heads": heads,
            "rope": normal(positions, width // 2, 2).clamp(-1, 1),
            "cache": _cache(rows, heads, positions, width, dtype),
            "length": torch.tensor([positions - 1], dtype=torch.int32),
        }

    moved = 2 * rows * 3 * heads * width * dtype.itemsize
    return layer_case("append_rotated", f"[{rows}, 1, {3 * heads}, {width}] {_kind(dtype)}", make, rows, moved)


def decode_case(
    rows: int,
    heads: int,
    width: int,
    positions: int,
    length: int,
    dtype: torch.dtype,
    cache: Callable[[int, int, int, int, torch.dtype], Tensor] = _cache,
) -> Case:
    """LlamaGen's attention to the filled part of its cache. The other plain one has its length as a number."""

    def make(rows: int) -> Arguments:
        q = normal(rows, heads, width, dtype=dtype)
        given = {"q": q, "cache": cache(rows, heads, positions, width, dtype), "scale": width**-0.5}
        given["length"] = torch.tensor([length], dtype=torch.int32)
        return {name: given[name] for name in ("q", "cache", "length", "scale")} | {
            "out": torch.full_like(q, torch.nan)
        }

    def at_known_length(q: Tensor, cache: Tensor, scale: float, out: Tensor, **_: Any) -> None:
        k, v = cache[:, :, :, : length + 1]
        layers.attention(q.unsqueeze(1), k, v, scale, out.unsqueeze(1))

    moved = dtype.itemsize * rows * heads * width * (2 * (length + 1) + 2)
    size = f"[{rows}, {heads}, {width}] at {length} of {positions} {_kind(dtype)}"
    return layer_case("decode_attention", size, make, rows, moved, **{"SDPA of the filled part": at_known_length})


def swiglu_case(rows: int, hidden: int, dtype: torch.dtype) -> Case:
    """LlamaGen's gate, of one position."""

    def make(rows: int) -> Arguments:
        out = torch.full((rows, 1, hidden), torch.nan, dtype=dtype)
        return {"gate_up": normal(rows, 1, 2 * hidden, dtype=dtype), "out": out}

    moved = 3 * rows * hidden * dtype.itemsize
    return layer_case("swiglu", f"[{rows}, 1, {2 * hidden}] {_kind(dtype)}", make, rows, moved)


def quantizer_case(batch: int, n: int, side: int, channels: int, outputs: int, vocab: int = 4096) -> Case:
    """A scale of VAR's residual quantizer. Its arithmetic is float32, so that the ceiling is far."""
    size = side * side

    def make(batch: int) -> Arguments:
        return {
            "tokens": torch.randint(0, vocab, (batch, n), generator=torch.Generator().manual_seed(7)),
            "codebook": normal(vocab, channels),
            "up": None if n == size else normal(size, n) / n,
            "taps": normal(9, channels, channels) / channels,
            "bias": normal(channels),
            "ratio": 0.5,
            "f_hat": normal(batch, size, channels),
            "down": normal(outputs, size) / size,
            "out": torch.full((batch, outputs, channels), torch.nan),
        }

    flop = 2 * batch * channels * size * (n * (n != size) + 9 * channels + outputs)
    moved = 4 * batch * channels * (2 * size + outputs) + 8 * batch * n
    return layer_case("quantizer_step", f"{batch} images, {n} tokens", make, batch, moved, flop)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layer_cases() -> Iterator[Case]:
    """VAR-d16 in its last scale and LlamaGen-L in its last step, guided: at batch 64, and at batch 1."""
    half = torch.bfloat16
    for rows in (128, 2):
        yield norm_case(rows, 256, 1024, half)
        yield append_normed_case(rows, 256, 16, 64, 424, half)
        yield decode_case(rows, 16, 64, 256, 255, half)
        yield append_rotated_case(rows, 16, 64, 256, half)
        yield rms_case(rows, 1024, half)
        yield swiglu_case(rows, 2816, half)
        yield quantizer_case(rows // 2, 169, 16, 32, 256)
    yield decode_case(128, 16, 64, 256, 31, half)
    yield decode_case(32, 32, 100, 256, 255, half)  # LlamaGen-3B
    yield norm_case(128, 256, 1024, torch.float32)
    yield decode_case(128, 16, 64, 256, 255, torch.float32)


def _percent(equal: Tensor) -> float:
    return 100 * float(equal.double().mean())


def all_cases() -> Iterator[Case]:
    """The most telling first. VAR at batch 64: all positions, the last scale, a middle one; LlamaGen: one position."""
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (43_520, 16_384, 2_304):
            yield flow_case("var", SETTINGS["var"], rows, dtype)
    for name in ("llamagen", "llamagen-k2000"):
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (512, 64):
                yield flow_case(name, SETTINGS[name], rows, dtype)
    yield from layer_cases()
    yield nearest_case(43_520, 4096, 32)
    yield nearest_case(256, 16_384, 8)
    yield filter_case("var", 4096, SETTINGS["var"].filter, 43_520)
    yield filter_case("llamagen-k2000", 16_384, SETTINGS["llamagen-k2000"].filter, 512)
    yield noise_case(64, 680, 32)
    yield noise_case(1024, 680, 32)
    yield flow_case("llamagen", SETTINGS["llamagen"], 16_384, torch.bfloat16)


def toy_cases() -> Iterator[Case]:
    """One of each kind, for tests on a CPU."""
    small = Setting(("small",), LogitFilter(top_k=20, top_p=0.9), 1.5)
    yield flow_case("small", small, 40, torch.bfloat16, plain_rows=16)
    yield filter_case("small", 64, small.filter, 30)
    yield nearest_case(30, 64, 8)
    yield noise_case(2, 5, 4)
    yield norm_case(2, 3, 16, torch.bfloat16)
    yield rms_case(2, 16, torch.bfloat16)
    yield append_normed_case(2, 3, 2, 8, 4, torch.bfloat16)
    yield append_rotated_case(2, 2, 8, 5, torch.bfloat16)
    yield decode_case(2, 2, 8, 20, 10, torch.bfloat16)
    yield swiglu_case(2, 24, torch.bfloat16)
    yield quantizer_case(2, 4, 4, 8, 9, vocab=20)
