"""A model of a preset with one prompt, pruned and not, and the oracle's inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from vlm_prune import pruned
from vlm_prune.eval.bench.clock import timed
from vlm_prune.eval.bench.presets import IMAGE, PRESETS, TEXT_TOKENS, Preset
from vlm_prune.registry import find_anatomy
from vlm_prune.versions import CACHE, cache_of


@dataclass
class Subject:
    """What is measured.

    Attributes:
        preset: whose shapes the ``model`` has.
        inputs: arguments of a forward: one prompt with one image.
        visual: placeholders in it.
    """

    preset: Preset
    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    visual: int

    @classmethod
    def of(cls, name: str, layers: int | None, dtype: torch.dtype, device: str) -> Subject:
        """Build the model of a preset, and a prompt as its processor would write it."""
        preset = PRESETS[name]
        model = preset.make(layers, dtype, device)
        media = {key: x.to(device) for key, x in preset.image().items()}
        media["pixel_values"] = media["pixel_values"].to(dtype)
        with torch.no_grad():
            features = model.base_model.get_image_features(**media, return_dict=True).pooler_output
        visual = sum(x.reshape(-1, x.shape[-1]).shape[0] for x in features)
        ids = torch.randint(3, IMAGE, (1, visual + TEXT_TOKENS), generator=torch.Generator().manual_seed(2))
        ids[:, 4 : 4 + visual] = IMAGE
        ids = ids.to(device)
        return cls(preset, model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}, visual)

    @property
    def decoder(self) -> Any:
        """The language model."""
        return find_anatomy(self.model).decoder

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return getattr(find_anatomy(self.model).tower, "module", None)

    @cached_property
    def layers(self) -> int:
        """Decoder layers that were built."""
        return len(find_anatomy(self.model).decoder_layers)

    def shortened(self, policy: str, options: dict[str, Any]) -> dict[str, Any]:
        """What the first decoder layer of a pruned call is about to see, as arguments of the decoder."""
        seen: dict[str, Any] = {}

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)

        with pruned(self.model, policy, **options):
            # registered last, so it sees what pruning made of the arguments
            handle = self.decoder.register_forward_pre_hook(look, with_kwargs=True)
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            handle.remove()
        seen.pop(CACHE, None)
        return seen

    def prefill(self) -> Callable[[], float]:
        """A run of the language model's prefill within a forward of the model as it is, pruned or not."""

        def run() -> float:
            with timed(self.decoder) as spent:
                self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            return spent[0]

        return run

    def pruned_prefill(self, policy: str, options: dict[str, Any]) -> Callable[[], float]:
        """The same of a pruned model that is handed its encoded image, as ``generate`` hands it.

        The tower is not run in between: it would leave caches and memory in another state than the oracle finds.
        """
        media = {key: x for key, x in self.inputs.items() if key not in ("input_ids", "attention_mask")}
        text = {key: x for key, x in self.inputs.items() if key in ("input_ids", "attention_mask")}
        with pruned(self.model, policy, **options):
            encoded = self.model.base_model.get_image_features(**media, return_dict=True)

        def run() -> float:
            with pruned(self.model, policy, **options), timed(self.decoder) as spent:
                self.model(**text, mm_encoder_outputs={"image": encoded}, use_cache=True, logits_to_keep=1)
            return spent[0]

        return run

    def oracle_prefill(self, shortened: dict[str, Any]) -> Callable[[], float]:
        """A run of the stock prefill that is handed the shortened prompt."""

        def run() -> float:
            with timed(self.decoder) as spent:
                self.decoder(**shortened)
            return spent[0]

        return run

    def steps(self, prefill: Callable[[], Any], length: int) -> Callable[[], None]:
        """A run of one more decoding step of the model as it is, pruned or not, after a prefill of ``length`` tokens.

        Each run lengthens the cache by a row.
        """
        cache, word, state = cache_of(prefill()), self.inputs["input_ids"][:, -1:], {"at": length}

        def run() -> None:
            position = torch.tensor([[state["at"]]], device=word.device)
            self.model(input_ids=word, position_ids=position, **{CACHE: cache}, use_cache=True)
            state["at"] += 1

        return run

    def dense_steps(self) -> Callable[[], None]:
        """Decoding steps of the model as it is, after its own prefill."""
        length = self.inputs["input_ids"].shape[1]
        return self.steps(lambda: self.model(**self.inputs, use_cache=True, logits_to_keep=1), length)

    def oracle_steps(self, shortened: dict[str, Any]) -> Callable[[], None]:
        """Decoding steps of the stock decoder after the shortened prompt."""
        last = int(shortened["position_ids"].max()) + 1
        call = {**shortened, CACHE: DynamicCache(config=self.decoder.config)}
        return self.steps(lambda: self.decoder(**call), last)

    def encode(self) -> Callable[[], None]:
        """A run of the tower and the projector."""
        media = {key: x for key, x in self.inputs.items() if key not in ("input_ids", "attention_mask")}

        def run() -> None:
            self.model.base_model.get_image_features(**media, return_dict=True)

        return run
