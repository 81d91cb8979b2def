"""Attention sites: observing the inputs of an attention module without changing how it computes.

transformers dispatches attention by a name in each module's config. A site gives one module a shallow copy of its
config that names our function; the function shows the site's owner its arguments and then calls the
implementation that the model's own config names at that moment, so sdpa stays sdpa and eager stays eager. The name is
entered in transformers' table with the first site and leaves it with the last: importing this module registers
nothing.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .call.forward_call import RESUME, resumed
from .errors import UnsupportedModelError

NAME = "vlm_prune"
PACKED_FLASH = "vlm_prune_flash"
"""Modules that attend over packed sequences look for "flash" in the name to decide whether to pass sequence ends."""

Observer = Callable[..., "torch.Tensor | None"]
"""Called with (layer, query, key, value, scaling); returns a mask of keys ``(batch, keys)`` to use, or None."""

Editor = Callable[..., "torch.Tensor"]
"""Called with (layer, query, key, value, scaling, output); returns the output ``(batch, queries, heads, dim)``."""

_open_sites: weakref.WeakSet[Site] = weakref.WeakSet()


class Site:
    """One attention module whose calls ``observer`` sees and whose output ``editor`` may replace, until `close`.

    ``packed`` modules attend over several sequences laid end to end.
    """

    def __init__(
        self, module: Any, layer: int, observer: Observer, editor: Editor | None = None, packed: bool = False
    ):
        config: Any = getattr(module, "config", None)
        if not hasattr(config, "_attn_implementation"):
            raise UnsupportedModelError(
                f"The attention module {type(module).__name__} of layer {layer} does not choose its implementation "
                "by config, so its scores cannot be read (fused or replaced module?). Load the model with stock "
                "attention modules, or choose a policy that reads no attention, such as uniform or random."
            )
        self.module, self.layer, self.observer, self.editor = module, layer, observer, editor
        self.stock_config = config
        module.config = copy.copy(config)
        flash = packed and "flash" in (config._attn_implementation or "")
        module.config._attn_implementation_internal = PACKED_FLASH if flash else NAME
        module.vlm_prune_site = self
        self._open()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a pruned model is pruned too, and stays so when the original no longer is."""
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        _open_sites.add(self)
        weakref.finalize(self, _leave_table).atexit = False
        ALL_ATTENTION_FUNCTIONS[NAME] = ALL_ATTENTION_FUNCTIONS[PACKED_FLASH] = attend

    def close(self) -> None:
        """Restore the module's own config."""
        self.module.config = self.stock_config
        del self.module.vlm_prune_site
        _open_sites.discard(self)
        _leave_table()


def _leave_table() -> None:
    """Remove our names from transformers' table when no site is open: all are closed, or freed with their models."""
    # by iteration, which skips freed sites: the weak set may still count them
    if not any(True for _ in _open_sites):
        ALL_ATTENTION_FUNCTIONS.pop(NAME, None)
        ALL_ATTENTION_FUNCTIONS.pop(PACKED_FLASH, None)


class _Stock:
    """An attention module with its stock config: flash attention reads from it which implementation it is."""

    def __init__(self, module: Any, config: Any):
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of a module with a site: show the inputs, then compute as the stock model would."""
    site: Site = module.vlm_prune_site
    real = _implementation(module, site.stock_config._attn_implementation)
    scaling = kwargs.get("scaling")
    with resumed(kwargs.pop(RESUME, None)):
        live = site.observer(site.layer, query, key, value, scaling)
        if live is not None:
            attention_mask = _key_mask(live, query, site.stock_config._attn_implementation)
        output, weights = real(_Stock(module, site.stock_config), query, key, value, attention_mask, **kwargs)
        if site.editor is not None:
            output = site.editor(site.layer, query, key, value, scaling, output)
    return output, weights


def _implementation(module: Any, name: str) -> Callable[..., Any]:
    if name == "eager":
        # eager is not in the table: each modeling file has its own, and its attention class falls back to it
        for cls in type(module).__mro__:
            if eager := getattr(sys.modules[cls.__module__], "eager_attention_forward", None):
                return eager
    return ALL_ATTENTION_FUNCTIONS[name]


def _key_mask(live: torch.Tensor, query: torch.Tensor, implementation: str) -> torch.Tensor:
    """Keys ``(batch, tokens)`` that may be attended, in the form that the implementation takes."""
    if (
        "flash" in implementation
    ):  # its own names, and kernels from the hub such as kernels-community/flash-attn
        return live
    mask = live[:, None, None]  # the same for all queries: never as large as an attention map
    if implementation == "eager":
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return mask
