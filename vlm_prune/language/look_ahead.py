"""The attention inputs that a decoder layer would have if no rows were cut before it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from ..cache.storage import read, stored_rows
from ..errors import UnsupportedModelError
from ..versions import CACHE


class SeenError(Exception):
    """Ends an attention call that is made for its queries and keys alone, before its softmax."""


class EarlierTurns:
    """Replaces a cache: prepends the rows that one ``layer`` of it stores to new ones, and stores nothing."""

    def __init__(self, layer: Any):
        self.layer = layer

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored and new keys and values ``(batch, heads, rows, head_dim)``."""
        rows = stored_rows(self.layer)
        if rows == 0:
            return keys, values
        old_keys, old_values = read(getattr(self.layer, "inner", self.layer), rows)
        return (
            torch.cat([old_keys.to(keys.device), keys], 2),
            torch.cat([old_values.to(values.device), values], 2),
        )


def look_ahead(
    layer: Any, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...], stored: Any | None
) -> None:
    """Start the attention of decoder ``layer`` on rows ``hidden`` ``(batch, rows, channels)``.

    The module's site must end the call with `SeenError` once it has recorded the inputs. Costs the projections to
    queries, keys and values.

    Args:
        layer: the decoder layer's module.
        hidden: what would enter the layer.
        position_embeddings: of these rows, in this layer.
        stored: the layer's part of the cache, ``None`` if there is no cache.

    Raises:
        UnsupportedModelError: the layer has no norm of the usual name before its attention.
    """
    norm = getattr(layer, "input_layernorm", None)
    if norm is None:
        raise UnsupportedModelError(
            f"The decoder layers {type(layer).__name__} have no `input_layernorm`, so the inputs of their attention "
            "cannot be computed ahead: choose a policy that ranks by the layer before a cut, such as fastv."
        )
    earlier = {} if stored is None else {CACHE: EarlierTurns(stored)}
    with suppress(SeenError):
        layer.self_attn(
            hidden_states=norm(hidden),
            position_embeddings=position_embeddings,
            attention_mask=None,
            **earlier,
        )
