"""Tensors that follow from shapes and settings alone, made once and kept: the plan of a call, not a part of it.

A number that the host knows costs a launch and a copy each time that it is written to a device, and a pruned call needs
the same ones every time: row numbers, tables of patches, the row that marks a hole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

MOST = 256
"""Tensors kept; those that were not asked for the longest go first."""

_plans: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
_asked_for: ContextVar[list[torch.Tensor] | None] = ContextVar("vlm_prune_plans", default=None)


def planned(key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What ``make()`` returns, made when ``key`` is seen for the first time. Nobody may write into it.

    ``key`` has to name everything that the tensor depends on, its device included. Under fake tensors, in a traced call
    and while a CUDA graph is being recorded, it is made anew: what comes of these cannot be kept. Whoever watches the
    operations of a call does not see it made, since the next call will not make it.
    """
    if torch.compiler.is_compiling() or (
        torch._C._len_torch_dispatch_stack() and type(torch.empty(0)) is not torch.Tensor
    ):
        return make()
    try:
        found = _plans[key]
        _plans.move_to_end(key)
    except KeyError:
        with _disable_current_modes(), torch.inference_mode(False):  # autograd must be able to keep it
            found = make()
        if type(found) is not torch.Tensor or (found.is_cuda and torch.cuda.is_current_stream_capturing()):
            return found
        _plans[key] = found
        if len(_plans) > MOST:
            _plans.popitem(last=False)
    if (asked_for := _asked_for.get()) is not None:
        asked_for.append(found)
    return found


@contextmanager
def holding() -> Iterator[list[torch.Tensor]]:
    """The kept tensors that are asked for in a block, in a list: whoever reads them again later has to hold them.

    A CUDA graph reads memory, not tensors, and what is no longer kept here would be overwritten.
    """
    asked_for: list[torch.Tensor] = []
    token = _asked_for.set(asked_for)
    try:
        yield asked_for
    finally:
        _asked_for.reset(token)


def numbers(count: int, device: torch.device) -> torch.Tensor:
    """``0, 1, ... count - 1`` on a device: int64 ``(count,)``, which nobody may write into."""
    return planned(("numbers", count, device), lambda: torch.arange(count, device=device))
