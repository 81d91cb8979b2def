"""Names that changed between the versions of transformers that we support (5.4 and later)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import Cache
from transformers.generation import utils as generation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Keyword for a model's cache: ``past_key_values`` until 5.23, which still accepts it."""

HOOKS_RUN_AGAIN = "__call__" in vars(GradientCheckpointingLayer)
"""Whether gradient checkpointing runs a layer's hooks in the backward pass too (in 5.19, not in 5.23)."""

CHUNKS_BRING_IMAGES = hasattr(generation, "_slice_mm_encoder_output")
"""Whether ``generate(prefill_chunk_size=)`` passes each chunk its part of the images: 5.23 does, 5.19 drops them."""


def takes_encoded(model: Any) -> bool:
    """Whether a model accepts images encoded beforehand, so that ``generate`` encodes them first; in 5.4 none does."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache in a model output, or among the keyword arguments of a call, by its new name or its old one."""
    found: Cache | None = arguments.get(CACHE)
    if found is None and not isinstance(arguments, ModelOutput):  # which warns about the old name
        return arguments.get("past_key_values")
    return found
