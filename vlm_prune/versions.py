"""Names that changed between the versions of transformers that we support (5.4 and later)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Keyword by which models are handed their cache: ``past_key_values`` until 5.23, where callers may still use it."""

HOOKS_RUN_AGAIN = "__call__" in vars(GradientCheckpointingLayer)
"""Whether gradient checkpointing runs a layer's hooks in the backward pass too (in 5.19, not in 5.23)."""


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache in a model output, or among the keyword arguments of a call, by its new name or its old one."""
    found: Cache | None = arguments.get(CACHE)
    if found is None and not isinstance(arguments, ModelOutput):  # which warns when asked by the old name
        return arguments.get("past_key_values")
    return found


def flat_tower(tower: Any) -> Any:
    """The module in a CLIP vision model that has its layers: in older versions, one further in."""
    return getattr(tower, "vision_model", tower)
