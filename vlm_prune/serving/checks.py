"""Checks of a pruning engine when it starts."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedModelError
from .plan import KEY


def check_engine(vllm_config: Any) -> None:
    """Raise if hooks on the vision tower would be bypassed, or a setting would do nothing."""
    compilation = vllm_config.compilation_config
    for option in ("compile_mm_encoder", "cudagraph_mm_encoder"):
        if getattr(compilation, option, False):
            raise UnsupportedModelError(
                f"{option}=True: a compiled or captured vision tower runs no hooks, so nothing would be pruned. "
                "Leave it out; the language model may be compiled."
            )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise UnsupportedModelError(
            f"speculative decoding by {speculative.method!r}: a drafter that reads the prompt would have to be pruned "
            'like the model, and none is. Choose method "ngram", which reads token ids only, or leave it out.'
        )
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise UnsupportedModelError(
            "enable_tower_connector_lora=True: adapters of the vision tower or the projector replace modules on which "
            "vlm_prune has hooks. Leave it out; adapters of the language model may be used."
        )
    options = vllm_config.model_config.multimodal_config.mm_processor_kwargs or {}
    if KEY in options:
        raise UnsupportedModelError(
            f'mm_processor_kwargs={{"{KEY}": ...}} of the engine: its budget belongs in hf_overrides, as in '
            f'hf_overrides={{"{KEY}": {{"policy": "flowcut", "tokens": 64}}}}; each request may set another one.'
        )


def check_ranks_agree(dropped: torch.Tensor, ranks: int) -> None:
    """Raise if tensor-parallel ranks dropped different tokens, bool ``(tiles, tokens)``: answers would be wrong."""
    if ranks == 1:
        return
    from vllm.distributed import tensor_model_parallel_all_reduce

    votes = tensor_model_parallel_all_reduce(dropped.float().contiguous())
    if bool(((votes != 0) & (votes != ranks)).any()):
        raise RuntimeError(
            f"The {ranks} tensor-parallel ranks chose different visual tokens for one image, so their answers would be "
            'wrong. Start with tensor_parallel_size=1, or on LLaVA and InternVL with mm_encoder_tp_mode="data", and '
            "please report it."
        )
