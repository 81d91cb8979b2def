"""Compile every kernel for GPUs that need not be present, and report the resources of each.

``python -m vlm_prune.kernels.compile`` prints for each kernel, dtype and architecture (sm_80, sm_90, sm_100) the
registers of a thread, the shared memory and the bytes spilled. A spill, or a failure to compile, is an error.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .cases import SHAPES, cases

ARCHITECTURES = (80, 90, 100)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel on an architecture. ``shared`` and ``spilled`` are bytes, ``registers`` counts those of a thread."""

    kernel: str
    dtype: str
    architecture: int
    registers: int
    shared: int
    spilled: int


@contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Launches inside do not run; each is noted as the kernel and its arguments by name."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, dict[str, Any]]] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, inspect.signature(kernel.fn).bind(*args, **kwargs).arguments))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def compile_launch(kernel: Any, arguments: dict[str, Any], architecture: int) -> tuple[int, int, int]:
    """Registers, bytes of shared memory and bytes spilled of a kernel as these arguments specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[(number,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if tensor else {int: "i32", float: "fp32"}[type(value)]
        if tensor or (type(value) is int and value % 16 == 0):  # as the launcher does for each call
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(built.asm["ptx"])
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={sm_arch_from_capability(architecture)}"]
        said = subprocess.run(
            [*command, str(ptx), "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
    registers = int(re.findall(r"Used (\d+) registers", said)[-1])
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return registers, built.metadata.shared, spilled


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Compiled]:
    """Every kernel, as the model shapes of `cases` launch it."""
    done = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in SHAPES:
            with recorded_launches() as launches:
                for case in cases(shape, dtype, "meta"):
                    case.launch()
            for kernel, arguments in launches:
                for architecture in architectures:
                    registers, shared, spilled = compile_launch(kernel, arguments, architecture)
                    name = str(dtype).removeprefix("torch.")
                    found = Compiled(kernel.__name__, name, architecture, registers, shared, spilled)
                    if found not in done:  # shapes that lead to the same code
                        done.add(found)
                        yield found


def main() -> int:
    """Print the table; 1 if anything spills."""
    print(f"{'kernel':18}{'dtype':10}{'target':>8}{'registers':>11}{'shared B':>10}{'spilled B':>11}")
    spilled = 0
    for c in compile_all():
        target = f"sm_{c.architecture}"
        print(f"{c.kernel:18}{c.dtype:10}{target:>8}{c.registers:11}{c.shared:10}{c.spilled:11}", flush=True)
        spilled += c.spilled
    if spilled:
        print(f"{spilled} bytes spilled: choose smaller blocks", file=sys.stderr)
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
