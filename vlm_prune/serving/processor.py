"""The front end's part: how many placeholders an image takes, and the hashes that tell cached images apart.

`Pruning` is a mix-in for a stock multi-modal processor class of vLLM. It does not depend on the model: the stock class
lays out an image, and placeholders beyond the budget are removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from ..call.budget import Budget
from ..errors import UnsupportedCallError
from .plan import KEY, Plan
from .requests import not_pruned, take_budgets

FIELD = "vlm_prune_tokens"
"""The field of an image's processed inputs with the visual tokens kept of each of its tiles, int64."""


def shorten(content: Any, dense: int | None, tokens: int) -> PromptUpdateDetails:
    """What represents an image in the prompt if ``tokens`` of each ``dense`` visual tokens are kept.

    Tokens that are not placeholders, such as ``<img>`` and ``</img>``, stay. ``None``: the image is one tile.
    """
    if not isinstance(content, PromptUpdateDetails):
        content = PromptUpdateDetails.from_seq(list(content))
    full: list[int] = list(content.full)
    embeds = [True] * len(full) if content.is_embed is None else content.is_embed(full).tolist()
    tiles, rest = (1, 0) if dense is None else divmod(sum(embeds), dense)
    if rest or not tiles:
        raise UnsupportedCallError(
            f"An image takes {sum(embeds)} placeholders, which do not divide into tiles of {dense}: vlm_prune does not "
            "know how this model's processor lays out images."
        )
    left, kept = tiles * tokens, []
    for token, is_embed in zip(full, embeds, strict=True):
        left -= is_embed
        if not is_embed or left >= 0:
            kept.append(token)
    return replace(content, full=kept)


def shortened(content: Any, dense: int | None, items: Any, number: int) -> Any:
    """`shorten` the replacement of image ``number``, which stock code gives as a value or as a function."""
    found = content(number) if callable(content) else content
    # images that come as embeddings lack the field: the client has pruned them or not
    return shorten(found, dense, int(items[number][FIELD].data)) if FIELD in items[number] else found


class Pruning:
    """Mix-in for a multi-modal processor; without effect if the engine does not prune."""

    info: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        take_budgets()

    @property
    def plan(self) -> Plan | None:
        """The engine's plan."""
        if "_plan" not in self.__dict__:
            self._plan = Plan.of(self.info.get_hf_config())
        return self._plan

    def tile_tokens(self, images: int, processed: Mapping[str, Any]) -> list[int]:
        """Visual tokens that a tile of each image has; ``processed`` is what the processor made of the images."""
        return [self.plan.tiles.tokens or 0] * images if self.plan else []

    def _split(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Budget | None]:
        """A request's options without its budget, for stock code, and the budget."""
        stock = {name: value for name, value in kwargs.items() if name != KEY}
        if self.plan is None:
            if KEY in kwargs:
                raise not_pruned()
            return stock, None
        return stock, self.plan.asked(kwargs.get(KEY))

    def _get_mm_hashes(self, inputs: Any) -> Any:
        stock, budget = self._split(inputs.hf_processor_mm_kwargs)
        if self.plan is not None and budget is not None:
            stock[KEY] = self.plan.identity(budget)
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=stock))  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        stock, budget = self._split(hf_kwargs)
        processed = super()._apply_hf_processor_main(mm_items, stock)  # type: ignore[misc]
        if self.plan is not None and budget is not None and "pixel_values" in processed:
            dense = self.tile_tokens(mm_items.get_all_counts()["image"], processed)
            processed[FIELD] = torch.tensor([self.plan.kept(budget, tokens) for tokens in dense])
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        stock, _ = self._split(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, stock))  # type: ignore[misc]
        if FIELD in hf_inputs:
            fields[FIELD] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        stock, _ = self._split(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, stock, out_mm_kwargs)  # type: ignore[misc]
        images = out_mm_kwargs.get("image", ())
        if self.plan is None or not any(FIELD in item for item in images):
            return updates
        dense = self.plan.tiles.tokens
        return [
            replace(update, replacement=partial(shortened, update.replacement, dense, images))
            if update.modality == "image"
            else update
            for update in updates
        ]
