"""What each kernel moves and computes, and the least time that takes: ``python -m vlm_prune.kernels.roofline``.

Bytes are counted, not estimated: the kernels run in Triton's interpreter, and every element that a load or store
touches is counted. *Unique* bytes, each address once, must come from memory; repeated ones come from the L2
cache. The times are computed from the data sheet of an H100 (SXM), not measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = (
    "1"  # read when the kernels are imported, which happens with the first launch
)

import numpy as np
import torch

from .cases import SHAPES, cases

MEMORY, CACHE, FLOPS, LAUNCH = 3.35e12, 5.5e12, 989e12, 3e-6
"""Bytes a second of HBM3 and (measured by others) of the L2 cache, dense bf16 FLOPs a second, seconds of a launch."""


class Traffic:
    """Bytes touched, with and without counting an address twice."""

    def __init__(self) -> None:
        self.total = 0
        self.spans: list[Any] = []

    def note(self, pointers: Any, mask: Any, size: int) -> None:
        """Elements of ``size`` bytes at ``pointers`` where ``mask``."""
        touched = np.asarray(pointers)[np.asarray(mask).astype(bool)]
        self.total += touched.size * size
        self.spans.append(np.unique(touched) * 8 + {1: 0, 2: 1, 4: 2, 8: 3}[size])

    @property
    def unique(self) -> int:
        """Bytes at different addresses."""
        if not self.spans:
            return 0
        tagged = np.unique(np.concatenate(self.spans))
        return int((1 << (tagged & 7).astype(np.int64)).sum())


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what the kernels in the block load and store."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size_of(pointers: Any) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.note(pointers.data, mask.data, size_of(pointers))
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.note(pointers.data, mask.data, size_of(pointers))
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", loading),
        mock.patch.object(InterpreterBuilder, "create_masked_store", storing),
    ):
        yield traffic


def main() -> int:
    """Print the table for the first shape of `cases`, as Markdown."""
    shape = SHAPES[0]
    print("| op | least MB | unique MB | touched MB | MFLOP | launches | H100 us, computed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in cases(shape, torch.bfloat16, "cpu"):
        with counted() as traffic:
            case.launch()
        launches = 3 if case.op == "attention_mass" else 1
        seconds = max(traffic.unique / MEMORY, traffic.total / CACHE, case.flops / FLOPS) + launches * LAUNCH
        name = case.op + (f" ({case.args[2].shape[1]} rows)" if case.op == "attention_mass" else "")
        if case.op == "overwrite_rows":  # the copy that it writes into, made by torch
            seconds += 2 * case.args[0].nbytes / MEMORY + LAUNCH
        print(
            f"| {name} | {case.least / 1e6:.2f} | {traffic.unique / 1e6:.2f} | {traffic.total / 1e6:.2f} "
            f"| {case.flops / 1e6:.0f} | {launches} | {seconds * 1e6:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
