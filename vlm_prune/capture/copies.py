"""Copies of what a recorded part returned: callers never get the buffers of a graph."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


def _tensors(value: Any, found: dict[int, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif isinstance(value, dict):
        for part in value.values():
            _tensors(part, found)
    elif isinstance(value, list | tuple):
        for part in value:
            _tensors(part, found)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _tensors(getattr(value, field.name), found)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, dicts, tuples and dataclasses, each once."""
    found: dict[int, torch.Tensor] = {}
    _tensors(value, found)
    return list(found.values())


def rebuilt(value: Any, known: dict[int, torch.Tensor], device: torch.device) -> Any:
    """``value`` with a copy of every tensor on ``device``, in new lists, dicts, tuples and dataclasses.

    ``known`` maps the ``id`` of a tensor to the one that replaces it. Tensors on the host are constants and shared.
    """
    new = dict(known)
    copied = [x for x in tensors_in(value) if id(x) not in new and x.device == device]
    by_type: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for x in copied:
        new[id(x)] = twin = torch.empty_like(x)
        to, of = by_type.setdefault(x.dtype, ([], []))
        to.append(twin)
        of.append(x)
    for to, of in by_type.values():
        torch._foreach_copy_(to, of)  # one launch for all
    return _with(value, new)


def _with(value: Any, new: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return new.get(id(value), value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _with(x, new) for name, x in value.items()})
    if type(value) is dict:
        return {name: _with(x, new) for name, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with(x, new) for x in value)
    if is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for field in fields(value):
            object.__setattr__(twin, field.name, _with(getattr(value, field.name), new))
        return twin
    return value
