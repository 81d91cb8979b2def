"""Calls that a pruned model refuses. Checked before tower and decoder compute anything."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..cache.masks import padding_mask
from ..cache.storage import check_cache
from ..call.encode_call import ride_of
from ..contract.anatomy import Anatomy
from ..errors import UnsupportedCallError
from ..versions import cache_of, takes_encoded

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments that give a model the type of each token."""

READ_AT_PRUNE = ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy")


def check_forward(anatomy: Anatomy, kwargs: dict[str, Any]) -> None:
    """Raise if a forward of the base model with these arguments could not keep what a pruned model promises."""
    config = anatomy.base.config
    asked = kwargs.get("output_attentions")
    if asked or any(getattr(c, "output_attentions", False) for c in (config, anatomy.decoder.config)):
        raise UnsupportedCallError(
            "output_attentions=True: attention maps of a pruned sequence do not have the shape that the prompt "
            "promises. Call the model without it, or unprune(model) first."
        )
    for name in READ_AT_PRUNE:
        given, known = kwargs.get(name), getattr(config, name, None)
        if given is not None and given != known:
            raise UnsupportedCallError(
                f"{name}={given!r}: this model was pruned for {known!r}. unprune(model), set config.{name}, and prune "
                "it again."
            )
    given = kwargs.get("mm_encoder_outputs") or {}
    if given and not takes_encoded(anatomy.base):
        raise UnsupportedCallError(
            "mm_encoder_outputs: in this version of transformers the model accepts no images encoded beforehand and "
            "would not see them. Pass pixel_values, or inputs_embeds with the features in them, or upgrade it."
        )
    if brings_features({**kwargs, "inputs_embeds": None}):
        check_cache(cache_of(kwargs), anatomy.decoder.config)
        blocks = any(kwargs.get(name) is not None for name in TOKEN_TYPES)
        padding_mask(kwargs.get("attention_mask"), cache_of(kwargs), blocks)
        _check_placeholders(anatomy, kwargs, given)


def brings_features(kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a forward may contain images, encoded or not."""
    given = kwargs.get("mm_encoder_outputs") or {}
    names = ("pixel_values", "pixel_values_videos", "inputs_embeds")
    return any(kwargs.get(name) is not None for name in names) or any(x is not None for x in given.values())


def check_chunk(anatomy: Anatomy, kwargs: dict[str, Any]) -> None:
    """Raise if a chunk of a prompt has lost its images, see `versions.CHUNKS_BRING_IMAGES`. Waits for the device.

    Placeholders without images are legitimate in two other calls: an assistant's first one, which has an empty cache,
    and that of its drafts, which asks for more logits than the last.
    """
    ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
    if ids is None or ids.shape[1] == 1 or kwargs.get("logits_to_keep") != 1 or brings_features(kwargs):
        return
    if cache is None or not cache.get_seq_length():
        return
    if torch.isin(ids, ids.new_tensor(anatomy.image_tokens)).any():
        raise UnsupportedCallError(
            "This part of a prompt holds image placeholders and comes without images: in this version of transformers "
            "chunked prefill drops them. Leave prefill_chunk_size out, or upgrade transformers."
        )


def runs_again(layer: nn.Module) -> bool:
    """Whether gradient checkpointing will call a layer again in the backward pass."""
    on = getattr(layer, "gradient_checkpointing", False) and layer.training
    return bool(on) and torch.is_grad_enabled()


def count_placeholders(anatomy: Anatomy, kwargs: dict[str, Any]) -> list[int]:
    """How many placeholders of each kind the prompts hold; empty where stock code checks them itself."""
    ids = kwargs.get("input_ids")
    if ids is None or ids.device.type != "cpu":  # else counting would wait for the device
        return []
    if os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK") == "1":  # switches off stock code's own check, too
        return []
    return [int((ids == token).sum()) for token in anatomy.image_tokens]


def _check_placeholders(anatomy: Anatomy, kwargs: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise if placeholders and visual tokens differ in number; on a GPU, stock code checks that a little later."""
    counts = count_placeholders(anatomy, kwargs)
    if not counts:
        return
    outputs = [ride_of(output) for output in given.values() if output is not None]
    rides = [ride for ride in outputs if ride is not None]
    # where tiles are assembled into images, stock code counts their rows as soon as it has them
    need = fresh = None if anatomy.features else anatomy.tower.placeholders(kwargs)
    if (
        need is None and rides and len(rides) == len(outputs)
    ):  # nothing is known about features from elsewhere
        need = [span.rows for ride in rides for span in ride.spans]
    if need is None:
        return
    found, total = sum(counts), sum(need)
    # generate repeats prompts for beams, but encodes their images once
    if found != total and (fresh is not None or not found or found % total):
        tiles = f"{len(need)} {anatomy.tile}{'s' if len(need) > 1 else ''}"
        each = ", ".join(map(str, sorted(set(need))))
        raise UnsupportedCallError(
            f"input_ids hold {found} image placeholders, but {tiles} of {each} tokens need {total}. "
            "Let the processor write the prompt, with one <image> for every image; pruning does not change how many "
            "placeholders there are."
        )
