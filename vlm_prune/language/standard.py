"""Whether policies can act between a decoder's layers, or at their attention: asked when pruning starts.

There the engine makes masks and rotary embeddings for the rows that are left, as stock code makes them for all rows.
That works where layers take these and nothing else that belongs to a row.
"""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import UnsupportedModelError

TAKES = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "cache",
    "past_key_values",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_router_logits",
    "kwargs",
}
"""Arguments of a decoder layer that the engine knows how to make for some of its rows."""

INSTEAD = "Choose a policy of the encode stage, such as divprune."


def check_cuts(decoder: Any, layers: list[Any], names: str) -> None:
    """Raise unless rows can be dropped between these layers. ``names`` are the policies that would.

    Raises:
        UnsupportedModelError: with what is in the way.
    """
    kind, rotary = type(decoder).__name__, getattr(decoder, "rotary_emb", None)
    takes = list(inspect.signature(rotary.forward).parameters) if rotary is not None else []
    if takes[:2] != ["x", "position_ids"] or not {*takes} <= {"x", "position_ids", "layer_type"}:
        why = "has no rotary embeddings" if rotary is None else "has rotary embeddings of a kind of its own"
        raise UnsupportedModelError(
            f"{names} drops rows between the layers of the decoder, and {kind} {why} that could be made again for what "
            f"is left. {INSTEAD}"
        )
    for layer in layers:
        if more := set(inspect.signature(layer.forward).parameters) - TAKES:
            raise UnsupportedModelError(
                f"{names} drops rows between the layers of the decoder, and those of {kind} are called with "
                f"{', '.join(sorted(more))} for all rows of the prompt. {INSTEAD}"
            )


def check_attention(decoder: Any, layers: list[Any], number: int, name: str) -> None:
    """Raise unless layer ``number`` attends by a stock attention function, which the policy ``name`` watches.

    Raises:
        UnsupportedModelError: it does not.
    """
    if getattr(layers[number], "self_attn", None) is None:
        raise UnsupportedModelError(
            f"{name} looks at the attention of decoder layer {number}, which in {type(decoder).__name__} has none: it "
            f"keeps a state instead. {INSTEAD}"
        )
