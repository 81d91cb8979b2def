"""What a call asks of the host and of the device: operations, reads, and on CUDA launches, waits and device time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view"}
)
"""Operations that start nothing, beside views."""

READS = frozenset(
    {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "_unique2",
        "unique_dim",
        "bincount",
        "_linalg_eigh",
    }
)
"""Operations that hand the host a value or a size that depends on values, so that it waits for a GPU."""

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""Runtime calls, by the beginning of their names. A whole device is waited for by the profiler alone."""


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside the block: operations that start work, and reads that make the host wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.started = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation and run it."""
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if not func.is_view and name not in FREE:
            self.started += 1
            self.reads += name in READS or _by_mask(name, args) or _to_host(name, args, result)
        return result


def _by_mask(name: str, args: Any) -> bool:
    """Whether a mask says which elements are taken, which is a ``nonzero`` inside."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))


def _to_host(name: str, args: Any, result: Any) -> bool:
    """Whether it copies from a GPU into the host's memory."""
    if name not in ("_to_copy", "copy_"):
        return False
    source = args[0] if name == "_to_copy" else args[1]
    return bool(source.is_cuda and result.device.type == "cpu")


@dataclass(frozen=True)
class Counts:
    """Of one run.

    Attributes:
        operations, reads: see `Operations`.
        device_ms: milliseconds that the GPU worked: the sum over kernels, copies and fills. ``None`` without CUDA, as
            are the next two.
        launches: kernels and graphs that the host launched.
        waits: how often the host waited for a stream or an event.
    """

    operations: int
    reads: int
    device_ms: float | None = None
    launches: int | None = None
    waits: int | None = None


def counts(run: Callable[[], Any], device: str) -> Counts:
    """Count what ``run`` does. It is called once on a CPU and twice on CUDA, and should be warm."""
    with Operations() as seen:
        run()
    if torch.device(device).type != "cuda":
        return Counts(seen.started, seen.reads)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watch:
        run()
        torch.cuda.synchronize()
    events = watch.events() or ()
    busy = sum(x.time_range.elapsed_us() for x in events if x.device_type.name == "CUDA")
    names = [x.name for x in events]
    return Counts(
        seen.started,
        seen.reads,
        busy / 1e3,
        sum(name.startswith(LAUNCHES) for name in names),
        sum(name.startswith(WAITS) for name in names),
    )
