"""Any model that puts image features into the rows of placeholders: its parts are found by inspecting the model.

Such a model has a method that encodes images (``get_image_features``), placeholders in ``input_ids`` whose number its
config names, and a decoder that is called with ``inputs_embeds``. Its tower is unknown.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import nn

from ..contract.anatomy import Anatomy, FeatureTower
from ..errors import UnsupportedModelError

METHODS = {"image": "get_image_features", "video": "get_video_features"}
"""What is encoded -> the method of a stock model that does."""

IDS = ("{}_token_id", "{}_token_index", "{}_patch_id", "{}_token")
"""Names under which configs keep the number of a placeholder."""


CROSS = (
    "whose decoder reads visual tokens by cross-attention; vlm_prune drops visual tokens that are rows of the "
    "decoder's own sequence"
)

REFUSED = {
    "blip": f"it is a captioner {CROSS}.",
    "diffusion_gemma": "it writes blocks of text by diffusion, and reads the prompt again for each.",
    "evolla": "it reads proteins, not images.",
    "inkling_mm_model": "it encodes patches one by one, and is not told which of them form one image.",
    "git": "its visual tokens stand in front of the prompt without placeholders, and its cache counts them by itself.",
    "granite4_vision": "it adds image features to the hidden states of several decoder layers.",
    "idefics": f"it is a model {CROSS}.",
    "kosmos-2": "image_embeds_position_mask says where its visual tokens are, and not a placeholder in input_ids.",
    "kosmos-2.5": "image_embeds_position_mask says where its visual tokens are, and not a placeholder in input_ids.",
    "mistral4": "it takes no images.",
    "mllama": f"it is a model {CROSS}.",
    "pi0": "it answers with the movements of a robot, not with text.",
    "pix2struct": f"it is an encoder-decoder, {CROSS}.",
}
"""Model types whose visual tokens enter in another way -> the sentence that says so."""


def anatomy(model: Any) -> Anatomy:
    """The parts of a model that scatters image features at placeholders.

    Raises:
        ValueError: it has none of the parts by which such a model is known.
        UnsupportedModelError: its visual tokens are known to enter in another way.
    """
    if sentence := REFUSED.get(model.config.model_type):
        raise UnsupportedModelError(f"{type(model).__name__} cannot be pruned: {sentence}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned: it is an encoder-decoder, {CROSS}."
        )
    base = find_base(model)
    decoder = find_decoder(model, base)
    kinds = [kind for kind, method in METHODS.items() if hasattr(base, method)]
    tokens = {kind: placeholder(model.config, kind) for kind in kinds}
    if not any(calls_method(type(base), METHODS[kind]) for kind in kinds):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned: nothing in {type(base).__name__} calls its "
            f"{METHODS[kinds[0]]}, so images reach the decoder in a way that is not known."
        )
    known = [kind for kind in kinds if tokens[kind] is not None]
    # images of any size are not cut into tiles
    sized = any(
        "grid_thw" in name
        for kind in kinds
        for name in inspect.signature(getattr(base, METHODS[kind])).parameters
    )
    if known != kinds and "image" not in known:
        raise ValueError("its config names no placeholder for images, such as image_token_id.")
    return Anatomy(
        family=model.config.model_type,
        base=base,
        tower=FeatureTower(
            methods=tuple(METHODS[kind] for kind in known),
            sizes=tile_sizes,
            deepstack=deepstack_layers(model),
        ),
        projector=None,
        decoder=decoder,
        decoder_layers=list(decoder.layers),
        image_tokens=tuple(dict.fromkeys(int(tokens[kind]) for kind in known)),  # type: ignore[arg-type]
        tile="image" if sized else "tile",
        mrope=hasattr(base, "get_rope_index"),
        computes_on=True,
    )


def deepstack_layers(model: Any) -> tuple[int, ...]:
    """The tower layers whose features go to the decoder's first layers."""
    vision = getattr(model.config, "vision_config", None)
    return tuple(getattr(vision, "deepstack_visual_indexes", None) or ())


def find_base(model: Any) -> Any:
    """The module that encodes images and calls the decoder: the model inside the language-modelling head, or itself."""
    for module in (model.base_model, model):
        if any(callable(getattr(module, method, None)) for method in METHODS.values()):
            return module
    raise ValueError(
        f"it has no {METHODS['image']}, by which images are encoded before they enter the decoder."
    )


def calls_method(kind: type, method: str) -> bool:
    """Whether a class, in a function other than the ``method`` itself, calls it by name.

    Stands in for a trial call when pruning starts: what inputs an unknown model takes, only its processor knows.
    Whether features arrive in the decoder as they left is counted at each call.
    """
    functions = (
        inspect.unwrap(f)
        for cls in kind.__mro__
        for name, f in vars(cls).items()
        if callable(f) and name != method
    )
    return any(method in f.__code__.co_names for f in functions if hasattr(f, "__code__"))


def find_decoder(model: Any, base: Any) -> Any:
    """The stack of layers that is called with ``inputs_embeds``."""
    decoder = model.get_decoder()
    for _ in range(3):  # a language model with its own head has it one or two modules further in
        if isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            break
        inner = decoder.get_decoder()
        decoder = getattr(decoder, "model", decoder) if inner is decoder else inner
    if decoder is base:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned: one module encodes its images and runs the decoder's layers, so "
            "no row can leave between the two."
        )
    layers = getattr(decoder, "layers", None)
    if (
        not isinstance(layers, nn.ModuleList)
        or "inputs_embeds" not in inspect.signature(decoder.forward).parameters
    ):
        raise ValueError(
            f"its decoder ({type(decoder).__name__}) is no stack of layers that takes inputs_embeds."
        )
    return decoder


def placeholder(config: Any, kind: str) -> int | None:
    """The token id in ``input_ids`` that is the placeholder for features of this ``kind``."""
    for name in IDS:
        found = getattr(config, name.format(kind), None)
        if isinstance(found, int):
            return found
    return None


SIZES = ("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes")
"""Arguments that say how many frames, rows and columns of patches images have, or rows and columns."""


def tile_sizes(given: Mapping[str, Any], shapes: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Rows and columns of the tokens of each tile, in order.

    By ``grid_thw`` where the call has one (a frame is a tile), else by the shapes of the features; where they are long
    lists, by the number of images that came in.
    """
    total = sum(torch.Size(shape).numel() for shape in shapes)
    names = ("video_grid_thw",) if given.get("pixel_values_videos") is not None else SIZES
    for name in names:
        if (sizes := given.get(name)) is not None and (found := _by_grid(sizes.tolist(), total)) is not None:
            return found
    if all(len(shape) == 1 for shape in shapes):
        images = _images(given.get("pixel_values"))
        lists = [shape[0] for shape in shapes]
        if len(lists) == 1:
            lists, images = [total], [sum(images)]
        if len(lists) == len(images) and all(
            n and rows % n == 0 for rows, n in zip(lists, images, strict=True)
        ):
            return [_grid(rows // n) for rows, n in zip(lists, images, strict=True) for _ in range(n)]
    return [grid for shape in shapes for grid in _of_shape(shape)]


def _images(pixels: Any) -> list[int]:
    """How many pictures came in with each prompt; 1 where they came as a sequence of patches.

    Where prompts have several, ``(prompts, images, channels, height, width)``, they are filled up with black ones,
    which stock code leaves out.
    """
    if isinstance(pixels, torch.Tensor) and pixels.dim() == 5 and pixels.shape[2] == 3:
        return (pixels != 0).flatten(2).any(-1).sum(-1).tolist()
    if isinstance(pixels, torch.Tensor) and pixels.dim() == 4:
        return [1] * len(pixels)
    return [1]


def _by_grid(sizes: list[list[int]], total: int) -> list[tuple[int, int]] | None:
    """Of tiles of ``(frames, rows, columns)`` patches each, merged squarewise to ``total`` tokens."""
    sizes = [[1, *size] if len(size) == 2 else size for size in sizes]
    patches = sum(t * h * w for t, h, w in sizes)
    merge = isqrt(patches // total) if total else 0
    if merge == 0 or merge**2 * total != patches or any(h % merge or w % merge for _, h, w in sizes):
        return None
    return [(h // merge, w // merge) for t, h, w in sizes for _ in range(t)]


def _of_shape(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    if len(shape) == 1:
        return [_grid(shape[0])]
    if len(shape) == 2:
        return [_grid(shape[1])] * shape[0]
    return [(shape[-2], shape[-1])] * torch.Size(shape[:-2]).numel()


def _grid(count: int) -> tuple[int, int]:
    """A square where ``count`` tokens can be one, else a line."""
    side = isqrt(count)
    return (side, side) if side * side == count else (1, count)
