"""The projector as a plain function, for policies that apply it to other features."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Projection:
    """Calls a projector without its hooks, so that nothing is pruned or recorded.

    ``pieces`` is how many rows of the projector's input make one token of the language model, where it merges patches.
    """

    def __init__(self, module: nn.Module, pieces: int = 1):
        self.module, self.pieces = module, pieces
        self.twins: dict[torch.dtype, nn.Module] = {}

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """``(batch, units, channels)`` as in `FeaturesView.features`, to ``(batch, units, width)``, in their dtype."""
        module = self._in(features.dtype)
        weight = next((p for p in module.parameters() if p.is_floating_point()), features)
        rows = features.to(weight.dtype)
        if self.pieces > 1:
            rows = rows.reshape(-1, features.shape[-1] // self.pieces)
        projected: torch.Tensor = module.forward(rows)
        return projected.reshape(*features.shape[:2], -1).to(features.dtype)

    def _in(self, dtype: torch.dtype) -> nn.Module:
        """The projector with weights of ``dtype``, where possible: not if they are quantised or offloaded."""
        weights = list(self.module.parameters())
        plain = all(p.is_floating_point() and not p.is_meta for p in weights)
        wrapped = any("forward" in vars(module) for module in self.module.modules())
        if wrapped or not plain or all(p.dtype == dtype for p in weights):
            return self.module
        if dtype not in self.twins:
            self.twins[dtype] = _twin(self.module, dtype)
        return self.twins[dtype]


def _twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module that computes the same with weights of ``dtype``, without hooks. The original stays as it is."""
    twin = copy.copy(module)
    own = vars(twin)
    own.update(
        {name: type(x)() for name, x in own.items() if name.endswith(("_hooks", "_hooks_with_kwargs"))}
    )
    own["_forward_hooks_always_called"] = type(own["_forward_hooks_always_called"])()
    own["_parameters"] = {
        n: None if p is None else nn.Parameter(p.detach().to(dtype), False)
        for n, p in module._parameters.items()
    }
    own["_modules"] = {n: None if m is None else _twin(m, dtype) for n, m in module._modules.items()}
    return twin
