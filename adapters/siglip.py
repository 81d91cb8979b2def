"""A SigLIP tower, or one built alike, whose patches become tokens one by one or square by square.

One by one in PaliGemma, DeepSeek-VL and Janus; as means of squares in Gemma 3; by pixel shuffle in Idefics3, SmolVLM,
Aya Vision and Cohere2 Vision; as soft words of a visual vocabulary in Ovis2. With a tower of another form, what leaves
it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..contract.anatomy import Anatomy, Tower, feature_layers, square
from . import features
from .clip_tower import CLS
from .features import find_decoder
from .versions import flat_tower


@dataclass(frozen=True)
class _Joint:
    """What stands between tower and language model, as in `Anatomy`, and the ``merge`` of its `Tower`."""

    projector: nn.Module
    merge: int
    front: nn.Module | None = None
    tile: str = "image"


def anatomy(model: Any) -> Anatomy:
    """The parts of a model with a tower of this form."""
    base, config, vision = model.model, model.config, model.config.vision_config
    tower = base.vision_tower if hasattr(base, "vision_tower") else base.vision_model
    module = getattr(tower, "transformer", tower)  # Ovis2's, whose head makes words of patches
    layers = _layers(module)
    # of hard words a dropped token would be one, too
    hard = getattr(vision, "tokenize_function", "softmax") != "softmax"
    if not layers or CLS.get(vision.model_type) or hard:
        return features.anatomy(model)
    joint, decoder, patch = _joint(base, vision), find_decoder(model, base), vision.patch_size
    if any(side // patch % joint.merge for side in square(vision.image_size)):  # padded to whole squares
        return features.anatomy(model)
    if getattr(config, "vision_feature_select_strategy", None) == "default":
        raise ValueError(
            'vision_feature_select_strategy="default": the model would take the first patch for the CLS token that '
            'only a CLIP tower has. Set it to "full".'
        )
    consumed = getattr(config, "vision_feature_layer", None)
    masked = hasattr(base, "connector")
    resizing = {"patch_attention_mask": None} if masked else {"interpolate_pos_encoding": True}
    return Anatomy(
        family=config.model_type,
        base=base,
        tower=Tower(
            module=module,
            layers=layers,
            attentions=[_attention(layer) for layer in layers],
            patch_grid=lambda height, width: (height // patch, width // patch),
            image_size=square(vision.image_size),
            feature_layers=feature_layers(-1 if consumed is None else consumed, len(layers)),
            has_cls=False,
            keeps_cls=False,
            merge=joint.merge,
            resizing=resizing if module is tower else None,
            patch_mask="patch_attention_mask" if masked else None,
        ),
        projector=joint.projector,
        decoder=decoder,
        decoder_layers=list(decoder.layers),
        image_tokens=(config.image_token_id,),
        tile=joint.tile,
        front=joint.front,
    )


def _layers(module: Any) -> list[nn.Module]:
    """The tower's layers, if they have the form that this adapter knows."""
    layers = getattr(getattr(flat_tower(module), "encoder", None), "layers", ())
    return list(layers) if all(_attention(layer) is not None for layer in layers) else []


def _attention(layer: Any) -> Any:
    return getattr(layer, "self_attn", None) or getattr(layer, "attention", None)


def _joint(base: Any, vision: Any) -> _Joint:
    if hasattr(base, "connector"):
        return _Joint(base.connector.modality_projection, base.connector.scale_factor, tile="tile")
    if hasattr(base, "visual_embeddings_table"):
        return _Joint(base.visual_embeddings_table, vision.hidden_stride, tile="tile")
    projector = base.multi_modal_projector if hasattr(base, "multi_modal_projector") else base.aligner
    if hasattr(projector, "kernel_size"):
        return _Joint(projector, projector.kernel_size, projector.mm_soft_emb_norm)
    if hasattr(projector, "downsample_factor"):
        front = projector.layernorm if hasattr(projector, "layernorm") else projector.linear_1
        return _Joint(projector, projector.downsample_factor, front, "tile")
    return _Joint(projector, 1)
