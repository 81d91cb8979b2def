"""A model of a preset with one prompt, pruned and not, and the oracle's inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from vlm_prune import prune, pruned, unprune
from vlm_prune.eval.bench.clock import interleaved, timed
from vlm_prune.eval.bench.presets import IMAGE, PRESETS, TEXT_TOKENS, Preset
from vlm_prune.registry import find_anatomy
from vlm_prune.versions import CACHE, cache_of

TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
"""Arguments of a forward that are no part of the image."""


@dataclass
class Subject:
    """What is measured.

    Attributes:
        preset: whose shapes the ``model`` has.
        inputs: arguments of a forward: as many prompts as the batch has, each with one image.
        visual: placeholders in a prompt.
        batch: prompts.
    """

    preset: Preset
    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    visual: int
    batch: int = 1

    @classmethod
    def of(
        cls,
        name: str,
        layers: int | None,
        dtype: torch.dtype,
        device: str,
        tower: int | None = None,
        attn: str | None = None,
    ) -> Subject:
        """Build the model of a preset, and a prompt as its processor would write it.

        ``layers`` and ``tower`` replace the preset's depths, ``attn`` is the attention implementation, transformers'
        own choice by default.

        Raises:
            ValueError, ImportError: transformers does not know ``attn`` or lacks what it needs.
        """
        preset = PRESETS[name]
        model = preset.make(layers, dtype, device, tower)
        if attn is not None:
            model.set_attn_implementation(attn)
        media = {key: x.to(device) for key, x in preset.image().items()}
        media["pixel_values"] = media["pixel_values"].to(dtype)
        with torch.no_grad():
            features = model.base_model.get_image_features(**media, return_dict=True).pooler_output
        visual = sum(x.reshape(-1, x.shape[-1]).shape[0] for x in features)
        ids = torch.randint(3, IMAGE, (1, visual + TEXT_TOKENS), generator=torch.Generator().manual_seed(2))
        ids[:, 4 : 4 + visual] = IMAGE
        ids = ids.to(device)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if preset.typed:
            text["mm_token_type_ids"] = (ids == IMAGE).int()
        return cls(preset, model, {**text, **media}, visual)

    def batched(self, batch: int) -> Subject:
        """The same model with ``batch`` prompts, all alike."""
        repeated = {key: x.repeat(batch, *[1] * (x.dim() - 1)) for key, x in self.inputs.items()}
        return Subject(self.preset, self.model, repeated, self.visual, batch)

    @property
    def media(self) -> dict[str, torch.Tensor]:
        """The arguments that bring the images."""
        return {key: x for key, x in self.inputs.items() if key not in TEXT}

    def under(
        self, policy: str, options: dict[str, Any], run: Callable[[], Any], warm: int = 0
    ) -> Callable[[], float]:
        """A run that prunes the model for itself alone, and returns its own time without that of pruning.

        It is called ``warm`` times before it is timed.
        """

        def call() -> float:
            prune(self.model, policy, **options)
            try:
                return interleaved({"run": run}, 1, warm)["run"].median
            finally:
                unprune(self.model)

        return call

    def call(self) -> None:
        """A whole forward of the model as it is, tower to logits."""
        self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    @property
    def decoder(self) -> Any:
        """The language model."""
        return find_anatomy(self.model).decoder

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
            self.call()
            handle.remove()
        seen.pop(CACHE, None)
        return seen

    def prefill(self) -> Callable[[], float]:
        """A run of the language model's prefill within a forward of the model as it is, pruned or not."""

        def run() -> float:
            with timed(self.decoder) as spent:
                self.call()
            return spent[0]

        return run

    def pruned_prefill(self, policy: str, options: dict[str, Any]) -> Callable[[], float]:
        """The same of a pruned model that is handed its encoded image, as ``generate`` hands it.

        The tower is not run in between: it would leave caches and memory in another state than the oracle finds.
        """
        text = {key: x for key, x in self.inputs.items() if key in TEXT}
        with pruned(self.model, policy, **options):
            encoded = self.model.base_model.get_image_features(**self.media, return_dict=True)

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
        counted_on = find_anatomy(self.model).mrope  # from where the prompt's image ends, by the model itself

        def run() -> None:
            position = torch.full((self.batch, 1), state["at"], device=word.device)
            more = {} if counted_on else {"position_ids": position}
            self.model(input_ids=word, **more, **{CACHE: cache}, use_cache=True)
            state["at"] += 1

        return run

    def dense_steps(self) -> Callable[[], None]:
        """Decoding steps of the model as it is, after its own prefill."""
        length = self.inputs["input_ids"].shape[1]
        return self.steps(lambda: self.model(**self.inputs, use_cache=True, logits_to_keep=1), length)

    def oracle_steps(self, shortened: dict[str, Any]) -> Callable[[], None]:
        """Decoding steps of the stock decoder after the shortened prompt."""
        places = shortened["position_ids"]  # None: counted by the decoder itself
        last = shortened["inputs_embeds"].shape[1] if places is None else int(places.max()) + 1
        call = {**shortened, CACHE: DynamicCache(config=self.decoder.config)}
        return self.steps(lambda: self.decoder(**call), last)

    def encode(self) -> Callable[[], None]:
        """A run of the tower and the projector."""
        media = self.media

        def run() -> None:
            self.model.base_model.get_image_features(**media, return_dict=True)

        return run
