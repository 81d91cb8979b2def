"""Whether policies can act between a decoder's layers, or on their attention: checked when pruning starts.

The engine makes masks and rotary embeddings for the remaining rows there, as stock code makes them for all rows. That
works where layers take these and no other per-row arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..contract.policy import Policy
from ..errors import PolicyError, UnsupportedModelError
from .kinds import FULL, layer_kinds, shared_between_layers

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


def check_layers(
    decoder: Any,
    layers: Sequence[Any],
    policies: Iterable[Policy],
    watched: Mapping[int, Sequence[str]],
    blocks: bool,
) -> None:
    """Raise if a policy does something that a decoder's layers do not allow.

    Args:
        decoder: the language model, whose ``layers`` these are.
        policies: fitted to it.
        watched: layer -> names of the policies that read or edit its attention.
        blocks: whether tokens of an image may attend to each other in both directions.

    Raises:
        PolicyError: tokens cannot be dropped between these layers, or a layer has another kind of attention.
        UnsupportedModelError: per-row arguments that the engine cannot make, or a layer without attention.
    """
    for policy in policies:
        _check_between(decoder, layers, policy, blocks)
        _check_full_attention(decoder, layers, policy)
        if policy.prefill_layers(len(layers)):
            _check_cuts(decoder, layers, policy.name)
    for number, names in sorted(watched.items()):
        if getattr(layers[number], "self_attn", None) is None:
            raise UnsupportedModelError(
                f"{names[0]} looks at the attention of decoder layer {number}, which in {type(decoder).__name__} has "
                f"none: it keeps a state instead. {INSTEAD}"
            )


def _check_between(decoder: Any, layers: Sequence[Any], policy: Policy, blocks: bool) -> None:
    """Raise if layers share per-token data, and the policy drops tokens between them or edits attention."""
    kind, depth = type(decoder).__name__, len(layers)
    cut, whole = policy.prefill_layers(depth), shared_between_layers(decoder, list(layers))
    if (cut or policy.modulate_layers(depth)) and whole is not None:
        raise PolicyError(
            f"{policy.name} acts between the layers of {kind}, which need all tokens: {whole}. Choose a policy of the "
            "encode stage, which shortens the prompt before the first layer."
        )
    if cut and blocks:
        raise PolicyError(
            f"{policy.name} drops tokens between the layers of {kind}, where those of an image look at each other by "
            "a mask that the model makes for all layers at once. Choose a policy of the encode stage, which shortens "
            "the prompt before that."
        )


def _check_full_attention(decoder: Any, layers: Sequence[Any], policy: Policy) -> None:
    """Raise if the policy scores or edits attention in a layer that has no full attention."""
    kinds, depth = layer_kinds(decoder.config), len(layers)
    full = [n for n, kind in enumerate(kinds) if kind == FULL and hasattr(layers[n], "self_attn")]
    cut = policy.prefill_layers(depth) if policy.reads_attention else ()
    looked_at = {*policy.modulate_layers(depth), *policy.observed_layers(depth), *cut}
    if other := sorted(looked_at - set(full)):
        named = sorted({kinds[n].replace("_", " ") for n in other})
        raise PolicyError(
            f"{policy.name} looks at attention in layers {other} of {type(decoder).__name__}, which are of "
            f"{' and '.join(named)}. It can in layers of full attention only, which are {full}."
        )


def _check_cuts(decoder: Any, layers: Sequence[Any], name: str) -> None:
    """Raise unless the engine can make the arguments of these layers for a subset of the rows."""
    kind, rotary = type(decoder).__name__, getattr(decoder, "rotary_emb", None)
    takes = list(inspect.signature(rotary.forward).parameters) if rotary is not None else []
    if takes[:2] != ["x", "position_ids"] or not {*takes} <= {"x", "position_ids", "layer_type"}:
        why = "has no rotary embeddings" if rotary is None else "has rotary embeddings of a kind of its own"
        raise UnsupportedModelError(
            f"{name} drops rows between the layers of the decoder, and {kind} {why} that could be made again for what "
            f"is left. {INSTEAD}"
        )
    for layer in layers:
        if more := set(inspect.signature(layer.forward).parameters) - TAKES:
            raise UnsupportedModelError(
                f"{name} drops rows between the layers of the decoder, and those of {kind} are called with "
                f"{', '.join(sorted(more))} for all rows of the prompt. {INSTEAD}"
            )
