"""Qwen2.5-VL and Qwen3-VL in vLLM: images of any size, and tokens that keep their multimodal RoPE position.

vLLM carries positions with embeddings for videos that it prunes itself. Pruned images use the same mechanism, which a
video pruning rate switches on. Such an engine refuses videos, so that vLLM never prunes one by that rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models import qwen2_5_vl, qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from ..call import stream
from ..errors import UnsupportedCallError, UnsupportedModelError
from .checks import check_ranks_agree
from .cpu import mend
from .encoder import check_counts
from .models import Pruned, most_tokens
from .packed import ServedPackedEncoder
from .places import placed, prompt_positions, split_places, with_places
from .plan import Plan
from .processor import Pruning
from .towers import qwen_parts

RATE = 1e-6
"""A video pruning rate above 0, which switches the mechanism on."""

CHECKED = (4, 4)
"""Rows and columns of units of the noise image of the start-up self-check."""


def open_channel(vllm_config: VllmConfig) -> None:
    """Make an engine carry positions with embeddings; raise if it cannot, or would not run the tower's hooks."""
    config = vllm_config.model_config.multimodal_config
    if config.mm_encoder_tp_mode == "data":
        raise UnsupportedModelError(
            'mm_encoder_tp_mode="data" of a Qwen-VL model: vLLM then distributes images over ranks in a way that '
            'bypasses pruning. Use mm_encoder_tp_mode="weights", the default.'
        )
    if current_platform.is_cpu():
        mend()
    if not config.video_pruning_rate:
        config.video_pruning_rate = RATE


class QwenDummies:
    """Mix-in for the prompts of vLLM's warm-up."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Images and text after them, without which `QwenPruning` refuses a prompt."""
        return f"{super().get_dummy_text(mm_counts)}."  # type: ignore[misc]


class QwenPruning(Pruning):
    """Mix-in for Qwen-VL's processors, with shorter prompts."""

    def tile_tokens(self, images: int, processed: Mapping[str, Any]) -> list[int]:
        """Visual tokens of each image, from its size."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return (processed["image_grid_thw"].prod(-1) // merge**2).tolist()

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Lay out a prompt; one that ends with an image is refused."""
        found = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        ends = [place.offset + place.length for place in found["mm_placeholders"].get("image", ())]
        if self.plan is not None and len(found["prompt_token_ids"]) in ends:
            raise UnsupportedCallError(
                "The prompt ends with an image, and vLLM would continue after the last kept token, not after the "
                "whole image. Let text or <|vision_end|> follow, as the chat template does."
            )
        return found


class QwenInfo:
    """Mix-in with the limits of an engine that prunes: images and no videos."""

    get_hf_config: Any
    get_max_image_tokens: Any

    @property
    def prunes(self) -> bool:
        """Whether the engine prunes."""
        return Plan.of(self.get_hf_config()) is not None

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """No videos for an engine that prunes."""
        return {"image": None, "video": 0} if self.prunes else super().get_supported_mm_limits()  # type: ignore[misc]

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """What the ceiling leaves of the largest image."""
        if self.prunes:
            return {"image": most_tokens(self, self.get_max_image_tokens())}
        return super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]


class PrunedQwen(Pruned):
    """Mix-in for Qwen-VL's model classes. Deepstack features for the decoder's first layers follow in the same row."""

    parts = staticmethod(qwen_parts)
    encoder_class = ServedPackedEncoder
    visual: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if Plan.of(vllm_config.model_config.hf_config) is not None:
            open_channel(vllm_config)  # the runner reads the setting after loading
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def image_tokens(self, **kwargs: Any) -> list[int]:
        """Visual tokens of each image, from its size."""
        return [rows * columns for rows, columns in self._grids(kwargs["image_grid_thw"])]

    def _grids(self, sizes: torch.Tensor) -> list[tuple[int, int]]:
        """Rows and columns of units of each image."""
        merge = self.visual.spatial_merge_size
        return [(rows // merge, columns // merge) for _, rows, columns in sizes.tolist()]

    def _encode(
        self, plan: Plan, budget: int, numbers: list[int], kwargs: Mapping[str, Any]
    ) -> list[torch.Tensor]:
        """Embeddings of some images, with their places in the last channels: ``(tokens kept, channels + 4)``."""
        sizes = kwargs["image_grid_thw"]
        patches = kwargs["pixel_values"].split(sizes.prod(-1).tolist())
        pixels = torch.cat([patches[number] for number in numbers])
        with self.encoder.keeping(plan.units(budget)):
            rows = self.visual(pixels, grid_thw=sizes[numbers].tolist())
        grids = self._grids(sizes[numbers])
        images = rows.split([height * width for height, width in grids])
        live = [~stream.find_holes(image[None])[0] for image in images]
        check_counts([int(alive.sum()) for alive in live], budget)
        return [
            with_places(image, width)[alive]
            for image, alive, (_, width) in zip(images, live, grids, strict=True)
        ]

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> tuple[Any, ...]:
        """Add the places to images that come as embeddings, which are unpruned."""
        if self.plan is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)  # type: ignore[misc]
        grids = self._grids(image_input["image_grid_thw"])
        return tuple(
            with_places(image, width) for image, (_, width) in zip(image_embeds_split, grids, strict=True)
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions ``(3, tokens)`` before an image was seen, and the offset of those after the prompt."""
        if self.plan is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        ordered = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        sizes = [feature.data["image_grid_thw"].data for feature in ordered]
        spans = [(feature.mm_position.offset, feature.mm_position.length) for feature in ordered]
        grids = self._grids(torch.stack(sizes)) if sizes else []
        return prompt_positions(
            len(input_tokens), [(*span, *grid) for span, grid in zip(spans, grids, strict=True)]
        )

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Any, num_computed_tokens: int
    ) -> tuple[Any, torch.Tensor, int]:
        """Embeddings without their places, positions with them, and the offset of later positions."""
        if self.plan is None:
            return super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        pairs = [split_places(rows) for rows in multimodal_embeddings]
        positions = mrope_positions
        if pairs:
            is_image = torch.as_tensor(input_ids) == self.config.image_token_id
            positions = placed(
                mrope_positions, is_image, num_computed_tokens, [places for _, places in pairs]
            )
        delta = int(positions[:, -1].max()) + 1 - positions.shape[1]
        return [embeds for embeds, _ in pairs], positions, delta

    @torch.inference_mode()
    def check_tower(self, plan: Plan) -> None:
        """Raise unless a noise image gives exactly the rows of the budget, the same on all tensor-parallel ranks."""
        rows, columns = CHECKED
        merge, (frames, side) = self.encoder.tower.merge, self.encoder.tower.patch
        size = [1, rows * merge, columns * merge]
        weight = next(self.visual.parameters())
        generator = torch.Generator().manual_seed(0)
        values = self.config.vision_config.in_channels * frames * side**2
        noise = torch.randn(size[1] * size[2], values, generator=generator)
        kept = plan.kept(plan.budget, rows * columns)
        with self.encoder.keeping(plan.units(kept)):
            features = self.visual(noise.to(weight), grid_thw=[size])
        holes = stream.find_holes(features[None])
        check_counts((~holes).sum(-1).tolist(), kept)
        check_ranks_agree(holes, get_tensor_model_parallel_world_size())


class Qwen2_5Info(QwenInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """Qwen2.5-VL's limits."""


class Qwen2_5Dummies(QwenDummies, qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder):
    """Qwen2.5-VL's warm-up."""


class Qwen2_5Pruning(QwenPruning, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's processor."""


@MULTIMODAL_REGISTRY.register_processor(Qwen2_5Pruning, info=Qwen2_5Info, dummy_inputs=Qwen2_5Dummies)
class PrunedQwen2_5(PrunedQwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class Qwen3Info(QwenInfo, qwen3_vl.Qwen3VLProcessingInfo):
    """Qwen3-VL's limits."""


class Qwen3Dummies(QwenDummies, qwen3_vl.Qwen3VLDummyInputsBuilder):
    """Qwen3-VL's warm-up."""


class Qwen3Pruning(QwenPruning, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor."""


@MULTIMODAL_REGISTRY.register_processor(Qwen3Pruning, info=Qwen3Info, dummy_inputs=Qwen3Dummies)
class PrunedQwen3(PrunedQwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""


class Qwen3MoeInfo(QwenInfo, qwen3_vl_moe.Qwen3VLMoeProcessingInfo):
    """Qwen3-VL's limits, for a mixture of experts."""


@MULTIMODAL_REGISTRY.register_processor(Qwen3Pruning, info=Qwen3MoeInfo, dummy_inputs=Qwen3Dummies)
class PrunedQwen3Moe(PrunedQwen, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL, a mixture of experts."""
