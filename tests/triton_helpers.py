"""Kernels compiled for a GPU that is not there, and what the machine code says about them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program can have


@dataclass(frozen=True)
class Compiled:
    """One kernel: registers a thread, bytes of stack a thread (spills live there), shared memory, its instructions."""

    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return len(re.findall(pattern, self.sass))

    def __str__(self) -> str:
        return (
            f"registers {self.registers:3d}  stack {self.stack:4d}  shared {self.shared:6d}  "
            f"STL/LDL {self.count(SPILL):3d}  MMA {self.count(MMA):4d}  instructions {self.count(';'):5d}"
        )


SPILL = r"\b(?:STL|LDL)\b"
MMA = r"\bH(?:G)?MMA\b"


def compile_kernel(kernel: Any, values: Mapping[str, Any], capability: int, options: Mapping[str, int]) -> Compiled:
    """Compile a jitted function for sm_80 or sm_90.

    values: for each argument a type ("*fp32", "i32", "fp64"), or the value of a compile-time constant. Pointers are
    taken to be aligned to 16 bytes, as torch's are.
    """
    names = [parameter.name for parameter in kernel.params]
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else values[name] for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(i,): values[name] for i, name in enumerate(names) if name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    usage, sass = _inspect(built.asm["cubin"])
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK"))  # type: ignore[union-attr]
    return Compiled(registers, stack, built.metadata.shared, sass)


def _inspect(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says about resources, and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        commands = ([TOOLS / "cuobjdump", "--dump-resource-usage", path], [TOOLS / "nvdisasm", "-c", path])
        usage, sass = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, sass
