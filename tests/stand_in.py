"""A CPU in the part of a GPU that captures: it records each operation, and replays them on the very same buffers.

Before a replay all buffers that the part made are poisoned, so that only what comes through the static inputs can get
out again. What a graph cannot do fails while it is recorded: reading a value that depends on the inputs, or a result
whose size does.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_prune.capture import device
from vlm_prune.capture.device import READS, SIZED_BY_VALUES, NotCapturable

TO_HOST = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.__array__}


def storage(x: torch.Tensor) -> int:
    """What two views of the same memory have in common."""
    return x.untyped_storage()._cdata


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in arguments or results."""
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


class _Reads(TorchFunctionMode):
    """Sees what never becomes an operation on a CPU."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TO_HOST and self.tape.depends(args):
            raise NotCapturable(f"the host waits for {func.__name__}")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """The operations of a part, in order."""

    def __init__(self, inputs: list[torch.Tensor]):
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, torch.Tensor] = {}
        self.touched = {storage(x) for x in inputs}
        self.replays = 0
        self.released = False

    def depends(self, value: Any) -> bool:
        """Whether any tensor in ``value`` depends on the inputs."""
        return any(storage(x) in self.touched for x in tensors(value))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        depends = self.depends((args, kwargs))
        if depends and name in (*READS, *SIZED_BY_VALUES):
            raise NotCapturable(f"the host waits for aten.{name}")
        indexing = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if indexing and any(x.dtype == torch.bool and self.depends(x) for x in tensors(args[1])):
            raise NotCapturable(f"the host waits for aten.{name} by a mask")
        given = {storage(x) for x in tensors((args, kwargs))}
        out = func(*args, **kwargs)
        if kwargs.get("generator") is not None and not depends:
            return out  # drawn on the host: a constant, as `device.Watch` keeps it
        for x in tensors(out):
            if storage(x) not in given and storage(x) not in self.made:
                self.made[storage(x)] = x
            if depends:
                self.touched.add(storage(x))
        if depends:
            for argument, x in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.touched |= {storage(t) for t in tensors(x)}
        self.operations.append((func, args, kwargs, out))
        return out

    def poison(self) -> None:
        """Make all buffers unusable that the part itself has to fill."""
        for x in self.made.values():
            flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            flat.fill_(
                torch.nan
                if x.is_floating_point()
                else torch.iinfo(x.dtype).max // 2
                if x.dtype != torch.bool
                else 1
            )

    def replay(self) -> None:
        """Compute again, out of the same buffers into the same buffers."""
        assert not self.released
        self.replays += 1
        self.poison()
        for func, args, kwargs, out in self.operations:
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            given = {storage(x) for x in tensors((args, kwargs))}
            if all(storage(x) in given for x in tensors(out)):
                continue  # views see what is there
            for x, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                assert x.shape == new.shape, f"{func} has another shape"
                x.copy_(new)

    def reset(self) -> None:
        """Forget everything."""
        self.operations.clear()
        self.made.clear()
        self.released = True


class StandIn:
    """A `capture.device.Recorder` for the CPU."""

    def __init__(self, device: torch.device):
        self.graphs: list[Tape] = []

    def record(self, compute: Any, inputs: list[torch.Tensor]) -> tuple[Any, Tape]:
        """See `capture.device.Recorder.record`."""
        compute()  # what is made once for a shape is not made in a graph
        tape = Tape(inputs)
        with _Reads(tape), tape:
            result = compute()
        self.graphs.append(tape)
        return result, tape

    @contextmanager
    def turn(self) -> Any:
        """See `capture.device.Recorder.turn`."""
        with nullcontext():
            yield


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are captured on the CPU during a test."""
    monkeypatch.setitem(device.RECORDERS, "cpu", StandIn)
