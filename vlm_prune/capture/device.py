"""The device side of captured calls: a `Recorder` runs a part once and can replay it. On a GPU it makes CUDA graphs.

Tests add a recorder for the CPU to `RECORDERS`, which replays the operations and checks for what a graph cannot do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import holding

T = TypeVar("T")


class NotCapturable(Exception):
    """A part of a call has to run eagerly; the message is the reason, as a clause."""


class Graph(Protocol):
    """A recorded part."""

    def replay(self) -> None:
        """Compute again, from what the static inputs hold now."""

    def reset(self) -> None:
        """Free its memory."""


class Recorder(Protocol):
    """Records parts of calls on one device."""

    def record(self, compute: Callable[[], T], inputs: list[torch.Tensor]) -> tuple[T, Graph]:
        """Run ``compute``, which reads the static ``inputs``; its result holds the buffers that a replay writes to.

        Raises:
            NotCapturable: it needs the host.
        """

    def turn(self) -> Any:
        """A context for writing inputs, replaying a graph and copying outputs; one starts after the last has ended."""


READS = ("_local_scalar_dense", "equal", "is_nonzero")
"""Operations by which the host reads a value."""
SIZED_BY_VALUES = (
    *("nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
    *("bincount", "_linalg_eigh", "linalg_eig", "_linalg_svd"),
)
"""Operations for which the host waits: to learn the size of a result, or whether a solver converged."""


class Watch(TorchDispatchMode):
    """Checks the operations of a part on ``device`` before it is recorded.

    Raises `NotCapturable` where the host would wait, and keeps what is copied from the host to the device: its values
    are the same in every replay, but a graph would read them from host memory that has been reused by then. When the
    same operations run ``again``, they are given those copies.
    """

    def __init__(self, device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.constants: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.again: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Reuse the copies that were kept, in order."""
        self.again = iter(self.constants)
        with self:
            yield

    def _constant(self, source: torch.Tensor) -> torch.Tensor:
        """The copy on the device of ``source``, a tensor on the host."""
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
            return func(*args, **kwargs)  # nothing to copy: stock caches begin with empty tensors
        if here and name in (*READS, *SIZED_BY_VALUES):
            raise NotCapturable(f"the host waits for aten.{name}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            x.dtype == torch.bool for x in here[1:]
        ):
            raise NotCapturable(f"the host waits for aten.{name} by a mask")
        if here and name == "lift_fresh":
            raise NotCapturable("it makes a tensor on the device from numbers on the host")
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

    The next graph uses the memory that is free at the end of one. So no two may run at a time, and the outputs of one
    have to be copied before the next begins: `turn` orders them, whatever streams their callers use.
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
                compute()  # libraries create handles and workspaces, and choose kernels, at their first call
            torch.cuda.synchronize()
            gc.collect()  # a tensor collected during the capture would free its memory there
            torch._C._cuda_clearCublasWorkspaces()  # the graph gets a separate one, in its pool
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                try:
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    with watch.repeating(), holding() as plans:
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
        return result, _Kept(graph, [*watch.constants, *plans])

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed: make the stream usable again, and free the graph's memory."""
        try:
            graph.capture_end()
        except RuntimeError:  # it is invalid; torch then still counts the graph as a user of the pool
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
    """A CUDA graph with the constants that it reads."""

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
"""The recorder for each type of device."""
