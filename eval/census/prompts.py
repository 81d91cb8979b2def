"""Inputs for a tiny model, as its processor would make them: images in the form that its feature method takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .shrink import END, IMAGE, PATCH, SIDE, START, TEXT, VIDEO

CELLS = SIDE // PATCH
"""Patches along an image."""

KINDS = ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids")
"""Arguments by which some models are told which tokens stand for images."""

Media = dict[str, torch.Tensor]


def prompt(model: Any, images: int = 2, seed: int = 1) -> Media:
    """One prompt with ``images`` images among text, ready for the model's forward."""
    generator = torch.Generator().manual_seed(seed)
    media = _media(model, images, generator)
    base, method = feature_method(model)
    takes = inspect.signature(getattr(base, method)).parameters
    given = {name: x for name, x in media.items() if name in takes}
    with torch.no_grad():
        output = getattr(base, method)(**given, return_dict=True)
    features = output.last_hidden_state if output.get("pooler_output") is None else output.pooler_output
    several = [features] if isinstance(features, torch.Tensor) else features
    each = sum(x.shape[:-1].numel() for x in several) // images
    placeholder = VIDEO if method == "get_video_features" else IMAGE

    def text(count: int) -> list[int]:
        return torch.randint(TEXT.start, TEXT.stop, (count,), generator=generator).tolist()

    tokens: list[int] = []
    for _ in range(images):
        tokens += [*text(3), START, *[placeholder] * each, END]
    ids = torch.tensor([tokens + text(5)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}
    known = inspect.signature(model.forward).parameters
    kinds = {name: (ids == placeholder).long() for name in KINDS if name in known}
    return {**inputs, **kinds}


def feature_method(model: Any) -> tuple[Any, str]:
    """The module that encodes images, and the name of its method for that."""
    for method in ("get_image_features", "get_video_features"):
        for module in (model.base_model, model):
            if hasattr(module, method):
                return module, method
    raise ValueError(f"{type(model).__name__} has no feature method")


def _media(model: Any, images: int, generator: torch.Generator) -> Media:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    special = SPECIAL.get(model.config.model_type)
    if special is not None:
        return special(random, images)
    base, method = feature_method(model)
    takes = inspect.signature(getattr(base, method)).parameters
    if "image_grid_thw" in takes:
        frames = getattr(model.config.vision_config, "temporal_patch_size", 1) or 1
        return _packed(random(images * CELLS**2, 3 * frames * PATCH**2), images)
    pixels = random(images, 3, SIDE, SIDE)
    if "spatial_shapes" in takes:
        return {
            "pixel_values": random(images, CELLS**2, 3 * PATCH**2),
            "spatial_shapes": torch.tensor([[CELLS, CELLS]] * images),
            "pixel_attention_mask": torch.ones(images, CELLS**2, dtype=torch.long),
        }
    if "pixel_attention_mask" in takes:
        mask = torch.ones(1, images, SIDE, SIDE, dtype=torch.long)
        return {"pixel_values": pixels[None], "pixel_attention_mask": mask}
    media = {"pixel_values": pixels}
    if takes["image_sizes"].default is inspect.Parameter.empty if "image_sizes" in takes else False:
        media["image_sizes"] = torch.tensor([[SIDE, SIDE]] * images)
    return media


def _packed(patches: torch.Tensor, images: int) -> Media:
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, CELLS, CELLS]] * images)}


Make = Callable[..., torch.Tensor]


def _squares(random: Make, images: int) -> Media:
    """Patches as small pictures."""
    return _packed(random(images * CELLS**2, 3, PATCH, PATCH), images)


def _wide(random: Make, images: int) -> Media:
    """Patches of two frames, although there is one."""
    return _packed(random(images * CELLS**2, 6 * PATCH**2), images)


def _tiles(random: Make, images: int) -> Media:
    """Three tiles each."""
    sizes = torch.tensor([[SIDE, 2 * SIDE]] * images)
    return {"pixel_values": random(images, 3, 3, SIDE, SIDE), "image_sizes": sizes}


def _strip(random: Make, images: int) -> Media:
    """Patches in one strip, side by side."""
    sizes = torch.tensor([[CELLS, CELLS]] * images, dtype=torch.int32)
    return {"pixel_values": random(1, 3, PATCH, PATCH * CELLS**2 * images), "target_sizes": sizes}


def _merged(random: Make, images: int) -> Media:
    sizes = torch.tensor([2] * images)
    return {**_packed(random(images * CELLS**2, 3 * PATCH**2), images), "image_merge_sizes": sizes}


def _pooled(random: Make, images: int) -> Media:
    """The patches that each token is pooled from."""
    number = torch.arange(CELLS**2).view(CELLS // 2, 2, CELLS // 2, 2).transpose(1, 2).reshape(-1, 4)
    return {
        "pixel_values": random(images, CELLS**2, 3 * PATCH**2),
        "image_token_pooling": torch.cat([number + CELLS**2 * i for i in range(images)]),
        "image_grids": torch.tensor([[CELLS // 2, CELLS // 2, 0, 0]] * images),
        "image_num_crops": torch.ones(images, dtype=torch.long),
    }


def _positions(random: Make, images: int, merge: int = 1) -> Media:
    """Patches with places, ``merge`` x ``merge`` of them put together in front of the tower."""
    places = torch.cartesian_prod(torch.arange(9), torch.arange(9)).flip(-1)[None].repeat(images, 1, 1)
    return {"pixel_values": random(images, 81, 3 * (merge * PATCH) ** 2), "image_position_ids": places}


def _question(random: Make, images: int, *frames: int) -> Media:
    """The query transformer reads the question too."""
    return {
        "pixel_values": random(images, *frames, 3, SIDE, SIDE),
        "qformer_input_ids": torch.arange(TEXT.start, TEXT.start + 4).repeat(images, 1),
        "qformer_attention_mask": torch.ones(images, 4, dtype=torch.long),
    }


def _resolutions(random: Make, images: int) -> Media:
    pixels = {"pixel_values": random(images, 3, SIDE, SIDE)}
    return {**pixels, "high_res_pixel_values": random(images, 3, 2 * SIDE, 2 * SIDE)}


def _units(random: Make, images: int) -> Media:
    """Units of four patches as small pictures, channels last."""
    sizes = torch.tensor([[1, CELLS // 2, CELLS // 2]] * images)
    return {
        "pixel_values": random(int(sizes.prod(-1).sum()), 2 * PATCH, 2 * PATCH, 3),
        "image_grid_thw": sizes,
    }


SPECIAL: dict[str, Callable[[Make, int], Media]] = {
    "deepseek_vl_hybrid": _resolutions,
    "emu3": lambda random, n: {
        "pixel_values": random(n, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * n),
    },
    "fuyu": lambda random, n: {"pixel_values": random(n, 16, 3 * PATCH**2)},
    "fast_vlm": lambda random, n: {"pixel_values": random(n, 3, 4 * SIDE, 4 * SIDE)},
    "gemma3n": lambda random, n: {"pixel_values": random(n, 3, 2 * SIDE, 2 * SIDE)},
    "gemma4": _positions,
    "gemma4_unified": lambda random, n: _positions(random, n, 3),
    "granite4_vision": _tiles,
    "granite_docling": lambda random, n: {
        "pixel_values": random(1, n, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(1, n, dtype=torch.bool),
    },
    "inkling2": _units,
    "inkling2_loop": _units,
    "inkling_mm_model": lambda random, n: {"pixel_values": random(n * 4, 2, 40, 40, 3)},
    "instructblip": _question,
    "instructblipvideo": lambda random, n: _question(random, n, 2),
    "kimi_k25": _squares,
    "llava_next": _tiles,
    "llava_next_video": _tiles,
    "llava_onevision": _tiles,
    "minicpm_ocr": _strip,
    "minicpmv4_6": _strip,
    "minicpmv4_7": _strip,
    "molmo2": _pooled,
    "muse_glimmer": _wide,
    "muse_spark": _wide,
    "nemotron_h_omni": lambda random, n: {
        "pixel_values": random(n * CELLS**2, 3 * PATCH**2),
        "image_grid_hw": torch.tensor([[CELLS, CELLS]] * n),
    },
    "paddleocr_vl": _squares,
    "perception_lm": lambda random, n: {"pixel_values": random(1, n, 3, SIDE, SIDE)},
    "video_llama_3": _merged,
    "video_llava": lambda random, n: {"pixel_values_images": random(n, 3, SIDE, SIDE)},
}
"""Model types whose images come in a form of their own."""
