"""Times that can be compared: the things to compare take turns in one process, warm, and medians are quoted."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Times:
    """Milliseconds of each round, in order."""

    rounds: list[float]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        ordered = sorted(self.rounds)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / 2 / self.median

    def over(self, other: Times) -> float:
        """Median of the ratios round by round: what slows the machine for a while slows both."""
        return median(ours / theirs for ours, theirs in zip(self.rounds, other.rounds, strict=True))


def synchronize() -> None:
    """Wait for the device, so that a clock sees its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    runs: Mapping[str, Callable[[], float | None]], rounds: int, warm: int = 1
) -> dict[str, Times]:
    """Time each of ``runs`` once a round, in alternating order. A run may return its own milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm + rounds):
        for name in runs if number % 2 else reversed(list(runs)):
            synchronize()
            begun = time.perf_counter()
            own = runs[name]()
            synchronize()
            spent = 1e3 * (time.perf_counter() - begun) if own is None else own
            if number >= warm:
                found[name].append(spent)
    return {name: Times(spent) for name, spent in found.items()}


def shortest(run: Callable[[], float | None], times: int) -> Callable[[], float]:
    """A run that repeats ``run`` and returns its shortest time: what interrupts the host for a moment is left out."""

    def turn() -> float:
        return min(interleaved({"run": run}, times, warm=0)["run"].rounds)

    return turn


@contextmanager
def timed(module: torch.nn.Module) -> Iterator[list[float]]:
    """Milliseconds of each call of a module inside the block, all of its hooks included."""
    begun, found = [0.0], []

    def begin(*call: Any) -> None:
        synchronize()
        begun[0] = time.perf_counter()

    def end(*call: Any) -> None:
        synchronize()
        found.append(1e3 * (time.perf_counter() - begun[0]))

    # in front of the hooks that are there, and after them
    handles = [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def spent_in(owner: type, names: tuple[str, ...]) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each call of some methods of a class inside the block, by the method's name."""
    found: dict[str, list[float]] = {name: [] for name in names}
    stock = {name: owner.__dict__.get(name) for name in names}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            begun = time.perf_counter()
            result = method(*args, **kwargs)
            synchronize()
            found[name].append(1e3 * (time.perf_counter() - begun))
            return result

        return call

    for name in names:
        setattr(owner, name, watched(name, getattr(owner, name)))
    try:
        yield found
    finally:
        for name, method in stock.items():
            if method is None:
                delattr(owner, name)
            else:
                setattr(owner, name, method)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations inside the block allocate, until the last tensor on them is gone.

    ``peak`` is the most there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self.users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note the tensors that it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (place := tensor.untyped_storage().data_ptr()):
                size = tensor.untyped_storage().nbytes() if place not in self.users else 0
                self.users[place] = self.users.get(place, 0) + 1
                self.held += size
                self.peak = max(self.peak, self.held)
                weakref.finalize(tensor, self._release, place, tensor.untyped_storage().nbytes())
        return result

    def _release(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place]
            self.held -= size


class _MovedBytes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            parts = tree_leaves((args, kwargs, result))
            self.moved += sum(x.nbytes for x in parts if isinstance(x, torch.Tensor))
        return result


def moved_bytes(run: Callable[[], Any]) -> int:
    """Bytes of all tensors that the operations of ``run`` take and return, views apart."""
    with _MovedBytes() as count:
        run()
    return count.moved


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most memory that ``run`` held at a time, above what was held before."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        run()
    return live.peak
