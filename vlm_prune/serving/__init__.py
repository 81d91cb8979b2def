"""The policies inside vLLM, as a plug-in that does not patch it: see ``docs/serving.md``.

Once installed, vLLM finds it by the entry point ``vllm.general_plugins``. It acts where an engine is started with
``hf_overrides={"vlm_prune": {"policy": "flowcut", "tokens": 64}}``.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from .client import image_embeds
from .metrics import open_folder
from .plan import FAMILIES, KEY

__all__ = ["image_embeds", "register"]

CLASSES = {
    "InternVLForConditionalGeneration": "vlm_prune.serving.models:PrunedInternVL",
    "LlavaForConditionalGeneration": "vlm_prune.serving.models:PrunedLlava",
    "Qwen2_5_VLForConditionalGeneration": "vlm_prune.serving.qwen:PrunedQwen2_5",
    "Qwen3VLForConditionalGeneration": "vlm_prune.serving.qwen:PrunedQwen3",
    "Qwen3VLMoeForConditionalGeneration": "vlm_prune.serving.qwen:PrunedQwen3Moe",
}
"""Architectures that vLLM reads from a checkpoint's config, and the classes that replace theirs."""


def register() -> None:
    """Register the classes with vLLM, which calls this in each of its processes."""
    from vllm import ModelRegistry

    for architecture, entry in CLASSES.items():
        ModelRegistry.register_model(architecture, entry)
    if getattr(ModelRegistry.inspect_model_cls, "vlm_prune", False):
        return
    stock = ModelRegistry.inspect_model_cls

    def inspect_model_cls(architectures: Any, model_config: Any) -> Any:
        """Raise for a model that is to be pruned and would be served unpruned."""
        info, architecture = stock(architectures, model_config)
        if getattr(model_config.hf_config, KEY, None) is None:
            return info, architecture
        open_folder()  # before vLLM starts its workers
        if architecture not in CLASSES:
            raise UnsupportedModelError(
                f'hf_overrides has "{KEY}", but vlm_prune cannot prune {architecture} in vLLM. It knows models of type '
                f'{", ".join(sorted(FAMILIES))}, in vLLM\'s own implementation (not model_impl="transformers").'
            )
        return info, architecture

    inspect_model_cls.vlm_prune = True  # type: ignore[attr-defined]
    ModelRegistry.inspect_model_cls = inspect_model_cls
