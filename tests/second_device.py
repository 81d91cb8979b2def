"""A second device on a machine that has none: tensors of ``cpu:1``, which refuse to meet those of ``cpu``.

They hold a stock tensor each and compute with it, but only among themselves: an operation that mixes devices raises, as
it would on real ones (numbers, tensors without dimensions, are welcome everywhere). Everything made on or moved to
``cpu:1`` in a block of `second_device` is such a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from vlm_prune.kernels import plans

SECOND = torch.device("cpu:1")


class Elsewhere(torch.Tensor):
    """A tensor on the second device; ``inner`` is where its numbers are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> Elsewhere:
        if isinstance(inner, Elsewhere):  # accelerate makes its weights anew
            return inner
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=SECOND,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation; its result is on the second device if its tensors are, or if it was asked for there."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    target = kwargs.get("device")
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() and x.numel()]
    # on real devices, indices may stay on the host; transformers and we never rely on that
    if there and here and not moves:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cpu and cpu:1")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if func.is_view or not any(out is x for x in tree_iter(plain_args)):
        result_there = bool(there) if target is None else torch.device(target) == SECOND
        if result_there:
            out = tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, out)
        return out
    return args[0]  # an operation in place


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Constructors(TorchFunctionMode):
    """``torch.tensor`` forgets the number of a CPU before it gets to an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        target = (kwargs or {}).get("device")
        if func in (torch.tensor, torch.as_tensor) and target is not None and torch.device(target) == SECOND:
            return made.to(SECOND)
        if func is torch.Tensor.new_tensor and target is None:
            return made.to(args[0].device)
        return made


@contextmanager
def second_device() -> Iterator[None]:
    """While active, ``device="cpu:1"`` is a device of its own."""
    made_here = patch.object(
        plans, "_disable_current_modes", nullcontext
    )  # else tensors of a plan would be stock ones
    with Operations(), Constructors(), made_here:
        yield


def move(module: torch.nn.Module) -> None:
    """Put a module's weights and buffers on the second device."""
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(Elsewhere(weight.data), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)
