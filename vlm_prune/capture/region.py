"""The modules of a captured part: whether they can be captured, and whether they are still those that were."""

from __future__ import annotations

import copy
from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .device import NotCapturable

COLLECTING = "transformers.utils.output_capturing"
"""The module whose hooks collect hidden states during a call; what they collect is part of its output."""


class Region:
    """The modules in ``roots``, and the parameters of ``holder`` itself.

    ``own`` are the ids of the engine's hooks, ``stand_ins`` the types of its forward methods.
    """

    def __init__(
        self,
        roots: list[nn.Module],
        own: Collection[int],
        holder: nn.Module | None = None,
        stand_ins: tuple[type, ...] = (),
    ):
        self.roots, self.own, self.holder, self.stand_ins = roots, own, holder, stand_ins
        self.version = 0
        self._state: tuple[Any, ...] | None = None  # modules are read when first needed

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """The same modules in a copied model, which may not be complete yet."""
        roots, holder = copy.deepcopy((self.roots, self.holder), memo)
        return type(self)(roots, self.own, holder, self.stand_ins)

    def _read(self) -> None:
        modules = list(dict.fromkeys(chain.from_iterable(root.modules() for root in self.roots)))
        self._modules = [vars(module) for module in modules]
        names = ("_parameters", "_buffers", "_modules")
        self._held = [x[name] for x in self._modules for name in names if x[name]]
        if self.holder is not None:
            self._held += [self.holder._parameters, self.holder._buffers]
        self._hooks = [x[name] for x in self._modules for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._weights = [x for x in chain.from_iterable(d.values() for d in self._held) if torch.is_tensor(x)]
        self._state = self._now()
        self._fixed = self._refusal(modules)

    def _now(self) -> tuple[Any, ...]:
        held = tuple(map(id, chain.from_iterable(d.values() for d in self._held)))
        return held, tuple(x.data_ptr() for x in self._weights)

    def check(self) -> int:
        """A number that changes with the modules and the memory of their weights.

        Raises:
            NotCapturable: a graph cannot compute them.
        """
        if self._state is None or self._now() != self._state:
            self.version += 1
            self._read()
        if self._fixed is not None:
            raise NotCapturable(self._fixed)
        if any(x["training"] for x in self._modules):
            raise NotCapturable("the model is in training mode: call model.eval()")
        if torch_module._has_any_global_hook():
            raise NotCapturable("there are hooks on all torch modules, which a replay would not call")
        for hooks in self._hooks:
            for number, hook in hooks.items() if hooks else ():
                if number not in self.own and getattr(hook, "__module__", "") != COLLECTING:
                    raise NotCapturable("its modules have hooks of other code, which a replay would not call")
        for x in self._modules:
            if "forward" in x and not isinstance(x["forward"], self.stand_ins):
                raise NotCapturable(
                    "a module's forward is replaced on the instance (offloaded by accelerate?)"
                )
        return self.version

    def _refusal(self, modules: list[nn.Module]) -> str | None:
        if any(type(module).__module__.startswith("peft.") for module in modules):
            return "PEFT adapters can be switched on and off at any time: call merge_and_unload() to capture"
        if any(x.is_meta for x in self._weights):
            return "weights are offloaded"
        weights = [x for x in self._weights if isinstance(x, nn.Parameter)]
        if any(not x.is_floating_point() or hasattr(x, "__tensor_flatten__") for x in weights):
            return "weights are quantised"
        if len({x.device for x in weights}) > 1:
            return "the model is spread over several devices"
        return None
