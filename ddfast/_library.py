"""The fused operations as operators ``torch.ops.ddfast.*``, and the path each takes on a device.

Registered with torch.library for every device and for shapes alone, so that torch.compile and torch.export keep each as
one node. An operator takes plain numbers and strings in place of settings, any strides, and checks nothing:
``ddfast.ops`` is the door. None has a gradient: results are cut from the graph of their inputs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor

from . import _native, _native_cuda, _native_layers, noise
from .errors import UserError
from .flow import LogitFilter, Solver, filter_logits, solver_from_dict
from .flow.multistep import AdamsSolver
from .flow.nearest import nearest_code
from .flow.tokens import solve_rows

Backend = Literal["native", "triton", "torch"]
Operation = Literal[
    "flow",
    "filter_logits",
    "nearest_code",
    "normal_noise",
    "add_layer_norm",
    "add_rms_norm",
    "append_normed",
    "append_rotated",
    "attention",
    "decode_attention",
    "swiglu",
    "quantizer_step",
    "quantize_rows",
    "scale_rows",
    "gelu",  # from here on with gradients: ddfast.models.fused runs them
    "modulated_norm",
    "gated_sum",
    "rms_norm",
    "rotated_heads",
    "normed_heads",
    "softmax_rows",
]
_forced: Backend | None = None

# The compiled and the Triton function of an operation take the same arguments, the outputs last. Modules with Triton
# kernels import Triton, so they are imported when first used.
_NATIVE: dict[Operation, Callable[..., None]] = {
    "flow": _native.flow_adams,
    "filter_logits": _native.filter_rows,
    "nearest_code": _native.nearest_code,
    "normal_noise": _native.normal_noise,
    "add_layer_norm": _native_layers.add_layer_norm,
    "add_rms_norm": _native_layers.add_rms_norm,
    "append_normed": _native_layers.append_normed,
    "append_rotated": _native_layers.append_rotated,
    "attention": _native_layers.attention,
    "decode_attention": _native_layers.decode_attention,
    "swiglu": _native_layers.swiglu,
    "quantizer_step": _native_layers.quantizer_step,
    "quantize_rows": _native_layers.quantize_rows,
    "scale_rows": _native_layers.scale_rows,
}
_CUDA: dict[Operation, Callable[..., None]] = {
    "normal_noise": _native.normal_noise,
    "add_layer_norm": _native_cuda.add_layer_norm,
    "add_rms_norm": _native_cuda.add_rms_norm,
    "append_normed": _native_cuda.append_normed,
    "append_rotated": _native_cuda.append_rotated,
    "decode_attention": _native_cuda.decode_attention,
    "swiglu": _native_cuda.swiglu,
    "quantizer_step": _native_cuda.quantizer_step,
    "quantize_rows": _native_cuda.quantize_rows,
}
_TRITON: dict[Operation, tuple[str, str]] = {
    "flow": ("ddfast.kernels.flow", "flow_adams"),
    "filter_logits": ("ddfast.kernels.filters", "filter_rows"),
    "nearest_code": ("ddfast.kernels.nearest", "nearest_code"),
}


def backends(device: torch.device, operation: Operation) -> tuple[Backend, ...]:
    """The paths an operation can take on tensors of ``device``, best first.

    "torch" is the readable twin and always there. On CPU tensors Triton comes last: there it needs its interpreter
    (TRITON_INTERPRET=1), which is for tests.
    """
    return _backends(operation, device.type)


def has_triton() -> bool:
    """Whether Triton is installed, and its kernels: they stand beside the sources of ddfast and join it when built."""
    if importlib.util.find_spec("ddfast.kernels") is None:
        return False
    return bool(importlib.import_module("ddfast.kernels").available())


@cache
def _backends(operation: Operation, device_type: str) -> tuple[Backend, ...]:
    native = {"cpu": _native.available(), "cuda": _native.cuda_built() and operation in _CUDA}
    there = {
        "native": native.get(device_type, False),
        "triton": device_type in native and operation in _TRITON and has_triton(),
        "torch": True,
    }
    ranked: tuple[Backend, ...] = (
        ("native", "torch", "triton") if device_type == "cpu" else ("native", "triton", "torch")
    )
    return tuple(name for name in ranked if there[name])


def backend(device: torch.device, operation: Operation) -> Backend:
    """The path taken: the best one, or the one ``forced``; UserError where that is absent."""
    found = backends(device, operation)
    if _forced is None:
        return found[0]
    if _forced not in found:
        raise UserError(
            f"{operation} has no path {_forced!r} for {device.type} tensors here, only {', '.join(found)}: native is "
            "ddfast._C, built with a C++ compiler at hand; triton needs the package of that name"
        )
    return _forced


@contextlib.contextmanager
def forced(name: Backend) -> Iterator[None]:
    """Run operations on one path, for tests and benches. An operation that does not have it is an error."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@cache
def kernel(operation: Operation, path: Backend, device: torch.device) -> Callable[..., None]:
    """What writes the outputs of an operation on the native or the Triton path."""
    if path == "native":
        return (_CUDA if device.type == "cuda" else _NATIVE)[operation]
    module, name = _TRITON[operation]
    return cast(Callable[..., None], getattr(importlib.import_module(module), name))


@lru_cache(maxsize=64)
def _encode_solver(solver: Solver) -> str:
    return json.dumps(solver.to_dict(), sort_keys=True)


def encode_solver(solver: Solver) -> str:
    """A solver as the operator ``flow`` takes it."""
    return _encode_solver(solver)


# To torch.compile the text is a constant of the solver. torch.compiler.assume_constant_result says so by this mark, but
# imports the compiler, for a second.
encode_solver._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _decode_solver(text: str) -> Solver:
    return solver_from_dict(json.loads(text))


_make_filter = lru_cache(maxsize=64)(LogitFilter)


def _float_type(tensor: Tensor) -> torch.dtype:
    """What an operation computes in: float64 for float64 input, float32 for any other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _flow_outputs(cond: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten tokens [N], x [N, C] and evaluations [N]."""
    rows = cond.shape[0]
    return (
        cond.new_empty(rows, dtype=torch.int64),
        cond.new_empty(rows, noise.shape[1], dtype=_float_type(cond)),
        cond.new_empty(rows, dtype=torch.int32),
    )


def _flow(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    codebook: Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float | None,
    rule: str,
    solver: str,
) -> tuple[Tensor, Tensor, Tensor]:
    keep, method, dtype = _make_filter(temperature, top_k, top_p, rule), _decode_solver(solver), _float_type(cond)
    path = backend(cond.device, "flow")
    noise, codebook = noise.to(dtype).contiguous(), codebook.to(dtype).contiguous()
    if path == "torch" or dtype == torch.float64 or not isinstance(method, AdamsSolver):
        result = solve_rows(cond, uncond, noise, codebook, guidance=guidance, filter=keep, solver=method)
        return result.tokens, result.x, result.evaluations
    cond, uncond = cond.contiguous(), None if uncond is None else uncond.contiguous()
    tokens, x, evaluations = _flow_outputs(cond, noise)
    kernel("flow", path, cond.device)(cond, uncond, noise, codebook, guidance, keep, method, tokens, x, evaluations)
    return tokens, x, evaluations


def _filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float | None, rule: str) -> Tensor:
    keep = _make_filter(temperature, top_k, top_p, rule)
    path = backend(logits.device, "filter_logits")
    if path == "torch" or logits.dtype == torch.float64:
        return filter_logits(logits.detach().contiguous(), keep)
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    kernel("filter_logits", path, logits.device)(rows, keep, out)
    return out.view(logits.shape)


def _nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    path = backend(x.device, "nearest_code")
    if path == "torch" or x.dtype == torch.float64:
        return nearest_code(x, codebook)
    out = x.new_empty(x.shape[:-1], dtype=torch.int64)
    if path == "native":  # Triton converts as it loads
        x = x.float()
    kernel("nearest_code", path, x.device)(x.contiguous(), codebook.float().contiguous(), out)
    return out


def _normal_noise(seed: int, pairs: Tensor, start: int, stop: int, channels: int) -> Tensor:
    seed %= 2**64
    path = backend(pairs.device, "normal_noise")
    if path == "torch":
        return noise.normal_noise(seed, pairs, start, stop, channels)
    out = pairs.new_empty(len(pairs), stop - start, channels, dtype=torch.float32)
    kernel("normal_noise", path, pairs.device)(seed, pairs.contiguous(), start, stop, channels, out)
    return out


# Schema, what runs, and what shapes come out.
_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "flow(Tensor cond, Tensor? uncond, Tensor noise, Tensor codebook, float guidance, float temperature, int top_k, "
    "float? top_p, str rule, str solver) -> (Tensor tokens, Tensor x, Tensor evaluations)": (
        _flow,
        lambda cond, uncond, noise, *_: _flow_outputs(cond, noise),
    ),
    "filter_logits(Tensor logits, float temperature, int top_k, float? top_p, str rule) -> Tensor": (
        _filter_logits,
        lambda logits, *_: logits.new_empty(logits.shape),
    ),
    "nearest_code(Tensor x, Tensor codebook) -> Tensor": (
        _nearest_code,
        lambda x, _: x.new_empty(x.shape[:-1], dtype=torch.int64),
    ),
    # seed: the unsigned 64 bits read as a signed number, the only kind an operator takes
    "normal_noise(int seed, Tensor pairs, SymInt start, SymInt stop, SymInt channels) -> Tensor": (
        _normal_noise,
        lambda seed, pairs, start, stop, channels: pairs.new_empty(
            pairs.shape[0], stop - start, channels, dtype=torch.float32
        ),
    ),
}


def _register() -> torch.library.Library:
    """Define the operators. They are gone when the library that is returned is."""
    library = torch.library.Library("ddfast", "DEF")
    for schema, (run, shapes) in _OPERATORS.items():
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, run, "CompositeExplicitAutograd")  # on every device
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"ddfast::{name}", shapes, lib=library)
    return library


_library = _register()
