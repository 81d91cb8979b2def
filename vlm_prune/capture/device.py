"""The device side of captured calls: a `Recorder` runs a part once and can replay it. On a GPU it makes CUDA graphs.

Tests put a recorder for the CPU beside it in `RECORDERS`, which replays by hand and looks at what no graph may do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class NotCapturable(Exception):
    """A part of a call runs eagerly; the message is the reason, as half a sentence."""


class Graph(Protocol):
    """A recorded part."""

    def replay(self) -> None:
        """Compute again what is in the static inputs by now."""

    def reset(self) -> None:
        """Give its memory back."""


class Recorder(Protocol):
    """Records parts of calls on one device."""

    def record(self, compute: Callable[[], T], inputs: list[torch.Tensor]) -> tuple[T, Graph]:
        """Run ``compute``, which reads the static ``inputs``; what it returns holds the buffers a replay writes to.

        Raises:
            NotCapturable: the host takes part in it.
        """

    def turn(self) -> Any:
        """A context in which inputs are written, a graph replayed, and outputs copied, after those before it."""


READS = ("_local_scalar_dense", "equal", "is_nonzero")
"""Operations by which the host reads a value."""
SIZED_BY_VALUES = (
    *("nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
    *("bincount", "_linalg_eigh", "linalg_eig", "_linalg_svd"),
)
"""Operations for which the host waits: to learn the size of a result, or whether a solver converged."""


class Watch(TorchDispatchMode):
    """Looks at what a part does on ``device`` before it is recorded.

    Raises `NotCapturable` where the host would wait, and keeps what is copied to the device from the host: its values
    are the same in every replay, but a graph would read them out of host memory that is somebody else's by then. The
    same operations ``again`` are given those copies.
    """

    def __init__(self, device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.constants: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.again: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Hand out the copies that were kept, in their order."""
        self.again = iter(self.constants)
        with self:
            yield

    def _constant(self, source: torch.Tensor) -> torch.Tensor:
        """``source``, a tensor on the host, on the device."""
        if self.again is None:
            kept = source.to(self.device)
            self.constants.append((source, kept))
            return kept
        for known, kept in self.again:
            if known.shape == source.shape and torch.equal(known, source):
                return kept
            break
        raise NotCapturable("what it copies to the device differs from call to call")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        here = [
            x
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor) and x.device.type == self.device.type
        ]
        if name in ("lift_fresh", "_to_copy") and not args[0].numel():
            return func(*args, **kwargs)  # nothing to copy: stock caches begin with such
        if here and name in (*READS, *SIZED_BY_VALUES):
            raise NotCapturable(f"the host waits for aten.{name}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            x.dtype == torch.bool for x in here[1:]
        ):
            raise NotCapturable(f"the host waits for aten.{name} by a mask")
        if here and name == "lift_fresh":
            raise NotCapturable("it makes a tensor on the device of numbers that the host has")
        if name == "_to_copy" and kwargs.get("device") is not None:
            to = torch.device(kwargs["device"]).type
            if here and to != self.device.type:
                raise NotCapturable("it copies a tensor to the host")
            if not here and to == self.device.type:
                kept = self._constant(args[0])
                return func(kept, **{**kwargs, "device": kept.device, "non_blocking": False})
        if name == "copy_" and args[0].device.type != args[1].device.type:
            if args[1].device.type == self.device.type:
                raise NotCapturable("it copies a tensor to the host")
            return func(args[0], self._constant(args[1]), **kwargs)
        return func(*args, **kwargs)


class CudaRecorder:
    """Records CUDA graphs; all of them share one memory pool.

    Memory of a graph that is free when it ends is used by the next one, so no two may run at a time, and what a graph
    leaves has to be copied before the next begins: `turn` orders them, whatever streams their callers use.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.done: torch.cuda.Event | None = None

    def record(self, compute: Callable[[], T], inputs: list[torch.Tensor]) -> tuple[T, Graph]:
        """See `Recorder.record`."""
        watch = Watch(self.device)
        with torch.cuda.device(self.device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                with watch:
                    compute()
                compute()  # libraries make handles and workspaces, and choose kernels, when first called
            torch.cuda.synchronize()
            gc.collect()  # a tensor that goes in the middle would free its memory there
            torch._C._cuda_clearCublasWorkspaces()  # the graph gets one of its own, in its pool
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                try:
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    with watch.repeating():
                        result = compute()
                    graph.capture_end()
                except BaseException as error:
                    self._abandon(graph)
                    if isinstance(error, RuntimeError):
                        raise NotCapturable(f"CUDA: {str(error).splitlines()[0]}") from error
                    raise
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
            current.wait_stream(stream)
        return result, _Kept(graph, watch.constants)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed: the stream works again, and the graph's memory is free."""
        try:
            graph.capture_end()
        except RuntimeError:  # it is void; torch then still counts the graph among those that use the pool
            for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with suppress(RuntimeError):
                    undo(self.device.index, self.pool)
        graph.reset()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See `Recorder.turn`."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if self.done is not None:
                current.wait_event(self.done)
            try:
                yield
            finally:
                self.done = self.done or torch.cuda.Event()
                self.done.record(current)


class _Kept:
    """A CUDA graph, and the constants that it reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, constants: list[Any]):
        self.graph, self.constants = graph, constants

    def replay(self) -> None:
        """See `Graph.replay`."""
        self.graph.replay()

    def reset(self) -> None:
        """See `Graph.reset`."""
        self.graph.reset()
        self.constants.clear()


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""How parts are recorded on devices of a type."""
