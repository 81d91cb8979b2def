"""LLaVA-1.5 and VipLLaVA: a CLIP tower (SigLIP works too), one tile per image, and any Llama-like decoder.

With another tower, such as Pixtral's, only its output is used.
"""

from __future__ import annotations

from typing import Any

from ..contract.anatomy import Anatomy, Family
from . import features
from .clip_tower import CLS, clip_like_tower

FAMILIES = {"llava": Family("LLaVA-1.5"), "vipllava": Family("VipLLaVA")}
"""Families in the README's matrix."""


def anatomy(model: Any) -> Anatomy:
    """The parts of a ``LlavaForConditionalGeneration``."""
    vision, strategy = model.config.vision_config.model_type, model.config.vision_feature_select_strategy
    if vision not in CLS:  # Pixtral's, say
        return features.anatomy(model)
    if strategy != "full" and not CLS[vision]:
        raise ValueError(
            f"llava with a {vision!r} tower and vision_feature_select_strategy={strategy!r}: the model would take the "
            'first patch for the CLS token that only a CLIP tower has. Set it to "full".'
        )
    return _anatomy(model, "llava", strategy == "full")


def vip_anatomy(model: Any) -> Anatomy:
    """The parts of a ``VipLlavaForConditionalGeneration``, which concatenates the features of several layers."""
    if model.config.vision_config.model_type != "clip_vision_model":
        raise ValueError("vipllava drops the first token of its tower as CLS: only a CLIP tower has one.")
    return _anatomy(model, "vipllava", keeps_cls=False)


def _anatomy(model: Any, family: str, keeps_cls: bool) -> Anatomy:
    base, config = model.model, model.config
    return Anatomy(
        family=family,
        base=base,
        tower=clip_like_tower(base, config, family, keeps_cls),
        projector=base.multi_modal_projector,
        decoder=base.language_model,
        decoder_layers=list(base.language_model.layers),
        image_tokens=(config.image_token_id,),
        tile="image",
    )
