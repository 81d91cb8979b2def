"""vLLM's model classes, which prune if the engine asks for it and are stock otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.logger import init_logger
from vllm.model_executor.models import interns1, llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from .checks import check_engine, check_ranks_agree
from .encoder import ServedEncoder, live_rows
from .metrics import Counters
from .plan import Plan
from .processor import FIELD, Pruning
from .towers import internvl_parts, llava_parts

logger = init_logger("vllm.plugins.vlm_prune")  # a child of vLLM's logger, with its settings


class Pruned:
    """Mix-in for a vLLM model class: its tower prunes, request by request."""

    parts: ClassVar[Any]
    encoder_class: ClassVar[Any] = ServedEncoder
    config: Any
    plan: Plan | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        plan = Plan.of(vllm_config.model_config.hf_config)
        if plan is None:
            return
        check_engine(vllm_config)
        parts = type(self).parts(self, plan.tiles)
        self.plan = plan
        self.encoder = self.encoder_class(parts, _gather, plan.policy)
        self.counters = Counters(plan.policy.name) if get_tensor_model_parallel_rank() == 0 else None
        # no more images at once than an unpruned engine would encode: memory is set aside for so many
        self.at_once = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings of each image ``(tokens that stay, channels)``, whatever the budgets of a batch."""
        tokens = kwargs.pop(FIELD, None)
        if tokens is None:
            return self.embed_given(**kwargs)
        if self.plan is None:
            raise RuntimeError("images were prepared for pruning by an engine that does not prune")
        budgets: list[int] = tokens.flatten().tolist()
        found: list[Any] = [None] * len(budgets)
        seen = self.image_tokens(**kwargs)
        for budget in dict.fromkeys(budgets):
            numbers = [number for number, other in enumerate(budgets) if other == budget]
            for some in self.batches(numbers, seen):
                embeds = self._encode(self.plan, budget, some, kwargs)
                for number, rows in zip(some, embeds, strict=True):
                    found[number] = rows
                if self.counters is not None:
                    dense, kept = sum(seen[number] for number in some), sum(map(len, embeds))
                    self.counters.add(dense, kept, len(some), self.encoder.times)
        return found

    def _encode(
        self, plan: Plan, budget: int, numbers: list[int], kwargs: Mapping[str, Any]
    ) -> list[torch.Tensor]:
        pixels, tiles = self.pixels(numbers, **kwargs)
        with self.encoder.keeping(plan.units(budget)):
            rows = live_rows(self.features(pixels), budget)
        return [image.flatten(0, 1) for image in rows.split(tiles)]

    # --- what differs between families ---

    def embed_given(self, **kwargs: Any) -> Any:
        """Embeddings from the client, and whatever else is not pruned: stock code.

        Images whose embeddings differ in length come as a list, which stock code refuses.
        """
        given = kwargs.get("image_embeds")
        return given if isinstance(given, list | tuple) else super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def tile_counts(self, **kwargs: Any) -> list[int]:
        """Tiles of each image."""
        raise NotImplementedError

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Stock code from ``(tiles, 3, height, width)`` to projected features ``(tiles, tokens, channels)``."""
        raise NotImplementedError

    def image_tokens(self, **kwargs: Any) -> list[int]:
        """Visual tokens of each image before pruning."""
        tokens = (self.plan and self.plan.tiles.tokens) or 0
        return [count * tokens for count in self.tile_counts(**kwargs)]

    def batches(self, numbers: list[int], counts: list[int]) -> list[list[int]]:
        """Images divided into batches of `at_once` visual tokens or one image; ``counts`` are those of all images."""
        found = list[list[int]]([[]])
        for number in numbers:
            if found[-1] and sum(counts[other] for other in found[-1]) + counts[number] > self.at_once:
                found.append([])
            found[-1].append(number)
        return found

    def pixels(self, numbers: list[int], **kwargs: Any) -> tuple[torch.Tensor, list[int]]:
        """The tiles of some images, and how many each of these has."""
        counts = self.tile_counts(**kwargs)
        tiles = kwargs["pixel_values"].split(counts)
        return torch.cat([tiles[number] for number in numbers]), [counts[number] for number in numbers]

    # --- start ---

    def process_weights_after_loading(self) -> None:
        """vLLM's hook after loading: the start-up self-check."""
        if (stock := getattr(super(), "process_weights_after_loading", None)) is not None:
            stock()
        if self.plan is not None:
            self.check_tower(self.plan)
            if self.counters is not None:
                logger.info("vlm_prune: %s", self.plan)

    @torch.inference_mode()
    def check_tower(self, plan: Plan) -> None:
        """Raise unless a noise image gives exactly the rows of the budget, the same on all tensor-parallel ranks."""
        weight = next(self.encoder.projector.parameters())
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 3, *self.encoder.tower.image_size, generator=generator)
        tokens = plan.kept(plan.budget, plan.tiles.tokens or 0)
        with self.encoder.keeping(plan.units(tokens)):
            features = self.features(noise.to(weight))
        live_rows(features, tokens)
        check_ranks_agree(features.isnan()[..., 0], get_tensor_model_parallel_world_size())


def _gather(x: torch.Tensor) -> torch.Tensor:
    return tensor_model_parallel_all_gather(x.contiguous())


def most_tokens(info: Any, dense: int) -> int:
    """The most tokens that a request may keep of an image with ``dense``; the scheduler reserves room for them."""
    plan = Plan.of(info.get_hf_config())
    return dense if plan is None else plan.most(dense)


class LlavaPruning(Pruning, llava.LlavaMultiModalProcessor):
    """LLaVA's processor, with shorter prompts."""


def _llava_processor(info: Any, dummy_inputs: Any) -> Any:
    if isinstance(info, llava.LlavaProcessingInfo):
        return LlavaPruning(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


class LlavaInfo(llava.LlavaProcessingInfo):
    """Says how large a request's image can be."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """What the ceiling leaves of an image."""
        return {"image": most_tokens(self, self.get_max_image_tokens())}


def _llava_info(ctx: Any) -> Any:
    info = llava._build_llava_or_pixtral_hf_info(ctx)
    return LlavaInfo(ctx) if type(info) is llava.LlavaProcessingInfo else info


@MULTIMODAL_REGISTRY.register_processor(
    _llava_processor, info=_llava_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlava(Pruned, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""

    parts = staticmethod(llava_parts)

    def tile_counts(self, **kwargs: Any) -> list[int]:
        """One each."""
        return [1] * len(kwargs["pixel_values"])

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Stock code."""
        return llava.LlavaForConditionalGeneration.embed_multimodal(self, pixel_values=pixels)


class InternVLPruning(Pruning, interns1.InternS1MultiModalProcessor):
    """InternVL's processor, with shorter prompts."""


class InternVLInfo(interns1.InternS1ProcessingInfo):
    """Says how large a request's image can be."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """What the ceiling leaves of the image with most tiles, and all tokens of the longest video."""
        found = {"image": most_tokens(self, self.get_max_image_tokens())}
        if mm_counts.get("video"):
            frames = self.get_num_frames_with_most_features(seq_len, mm_counts)
            found["video"] = frames * self.get_hf_processor().image_seq_length
        return found


@MULTIMODAL_REGISTRY.register_processor(
    InternVLPruning, info=InternVLInfo, dummy_inputs=interns1.InternS1DummyInputsBuilder
)
class PrunedInternVL(Pruned, interns1.InternS1ForConditionalGeneration):
    """InternVL in Hugging Face's format."""

    parts = staticmethod(internvl_parts)

    def tile_counts(self, **kwargs: Any) -> list[int]:
        """As the processor cut them."""
        return kwargs["image_num_patches"].flatten().tolist()

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Stock code."""
        return self.extract_feature(pixels)
