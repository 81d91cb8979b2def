"""The graphs of one pruned model: recorded when a shape is first seen, replayed from then on, limited in number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .device import RECORDERS, Graph, NotCapturable, Recorder

R = TypeVar("R")

LIMIT = 16
"""The most graphs that one model keeps; a further one replaces the least recently used."""


@dataclass
class Recorded:
    """A recorded part.

    Attributes:
        inputs: the buffers that it reads.
        result: what it returned; its tensors are buffers that every replay writes to.
        graph: the recording.
    """

    inputs: dict[str, torch.Tensor]
    result: Any
    graph: Graph


class Graphs:
    """Graphs by what they compute, the least recently used first.

    One thread at a time writes inputs, replays, and copies the result.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self._lock, self._busy = threading.RLock(), False
        self._recorders: dict[torch.device, Recorder] = {}
        self._recorded: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._refused: dict[Hashable, str] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        """A copied model has its weights elsewhere, so it starts without graphs."""
        return type(self)(self.limit)

    def run(
        self,
        key: tuple[Hashable, ...],
        inputs: Mapping[str, torch.Tensor],
        compute: Callable[[dict[str, torch.Tensor]], Any],
        take: Callable[[Recorded], R],
    ) -> R:
        """What ``take`` makes of ``compute(inputs)``, computed by a graph.

        Args:
            key: all that the computation depends on in addition to ``inputs``, their shapes and dtypes, and torch's
                settings.
            inputs: tensors on one device.
            compute: the part; reads nothing but its arguments and weights, and has no side effects.
            take: copies the result out of the graph's buffers.

        Raises:
            NotCapturable: it has to be computed eagerly.
        """
        device = next(iter(inputs.values())).device
        if (reason := _refusal(device)) is not None:
            raise NotCapturable(reason)
        key = (*key, *((name, x.shape, x.dtype, x.device) for name, x in inputs.items()), *settings(device))
        with self._lock:
            if self._busy:
                raise NotCapturable("it is called from inside a captured call")
            self._busy = True
            try:
                recorder = self._recorders.setdefault(device, RECORDERS[device.type](device))
                recorded = self._find(key, inputs, compute, recorder)
                with recorder.turn(), torch.no_grad():
                    for name, x in inputs.items():
                        recorded.inputs[name].copy_(x)
                    recorded.graph.replay()
                    return take(recorded)
            finally:
                self._busy = False

    def _find(
        self,
        key: Hashable,
        inputs: Mapping[str, torch.Tensor],
        compute: Callable[[dict[str, torch.Tensor]], Any],
        recorder: Recorder,
    ) -> Recorded:
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return self._recorded[key]
        if (reason := self._refused.get(key)) is not None:
            raise NotCapturable(reason)
        while len(self._recorded) >= self.limit:
            self._recorded.popitem(last=False)[1].graph.reset()
        # a graph outlives the call, whose mode may differ next time, and the casts of weights that autocast caches
        with torch.inference_mode(False), torch.no_grad(), _uncached_autocast():
            static = {name: x.detach().clone() for name, x in inputs.items()}
            try:
                result, graph = recorder.record(lambda: compute(static), list(static.values()))
            except NotCapturable as error:
                if len(self._refused) > 16 * self.limit:
                    self._refused.clear()
                self._refused[key] = str(error)
                raise
        self._recorded[key] = recorded = Recorded(static, result, graph)
        return recorded

    def clear(self) -> None:
        """Free all memory."""
        with self._lock:
            while self._recorded:
                self._recorded.popitem()[1].graph.reset()
            self._recorders.clear()
            self._refused.clear()


class _uncached_autocast:
    """Turns autocast's cache off: casts of weights would lie in a graph's memory, and be used outside of it."""

    def __enter__(self) -> None:
        self.before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *exception: object) -> None:
        torch.set_autocast_cache_enabled(self.before)


def _refusal(device: torch.device) -> str | None:
    """Why nothing on this device can be captured now, or ``None``."""
    if device.type not in RECORDERS:
        return f"captured calls need a CUDA device, this model is on {device.type}"
    if torch.is_grad_enabled():
        return "gradients are enabled: call the model under torch.inference_mode() or torch.no_grad()"
    if _get_current_dispatch_mode() is not None:
        return f"{type(_get_current_dispatch_mode()).__name__} looks at each operation"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "the caller is capturing the call already"
    return None


def settings(device: torch.device) -> tuple[Hashable, ...]:
    """The settings of torch that change what is computed, or how."""
    autocast = torch.is_autocast_enabled(device.type)
    return (
        torch.get_autocast_dtype(device.type) if autocast else None,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
