"""The encode stage inside a vLLM model whose tower packs images of any size into one sequence.

Stock classes of such towers are made for torch.compile. Where that is off, they call ``forward`` directly, without the
hooks of `torch.nn.Module`, so ``forward`` is wrapped here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..contract.policy import Policy
from ..encode.merger import Merger
from ..encode.packed import PackedEncoder
from ..errors import UnsupportedCallError
from .stage import Gather, ServedStage
from .towers import PackedParts


def wrap(
    module: nn.Module, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> None:
    """Call ``before(module, args, kwargs)`` and ``after(module, args, output)`` around a module's forward.

    They may return other arguments and another output, as hooks with keyword arguments do.
    """
    stock = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if before is not None and (given := before(module, args, kwargs)) is not None:
            args, kwargs = given
        output = stock(*args, **kwargs)
        changed = None if after is None else after(module, args, output)
        return output if changed is None else changed

    module.forward = forward


class ServedPackedEncoder(ServedStage, PackedEncoder):
    """Encoder hooks on the modules of a vLLM model; the arguments are those of `ServedStage`."""

    def __init__(self, parts: PackedParts, gather: Gather, policy: Policy):
        super().__init__(parts, gather, policy)
        merger = Merger(self, self.tower.merge**2)
        self.tower.module.register_forward_pre_hook(self.enter_tower, with_kwargs=True)
        self.tower.module.register_forward_hook(self.leave_tower, always_call=True)
        for number, block in enumerate(self.tower.layers):
            wrap(block, self.enter_layer, partial(self.leave_layer, number))
        for number in self.asked:
            self.tower.attentions[number].register_forward_pre_hook(
                partial(self.show, number), with_kwargs=True
            )
        wrap(self.projector, lambda module, args, kwargs: _first(merger.enter(module, args)), merger.leave)
        for module in self.tower.deepstack:
            wrap(module, after=merger.leave_deepstack)

    def enter_tower(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin an encode call, inside `keeping` only; ``grid_thw`` is a list of lists."""
        if self.active:
            given = dict(zip(("x", "grid_thw"), args, strict=False)) | kwargs
            # some towers normalise pixels themselves, and policies expect normalised ones
            pixels = module.input_norm(given["x"].to(module.device), module.dtype)
            super().enter_tower(module, (pixels, torch.tensor(given["grid_thw"])), {})

    def enter_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a block: sequence ends and rotary tables of the remaining patches.

        ``max_seqlen`` stays as it is, an upper bound.
        """
        if self.under_way() is None:
            return None
        if kwargs.get("sequence_lengths") is not None:
            raise UnsupportedCallError(
                "The vision tower runs on FlashInfer, which takes sequence ends in another form, so no patches can be "
                'cut. Choose another backend: mm_encoder_attn_backend="FLASH_ATTN" or "TORCH_SDPA".'
            )
        tables = kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"]
        stock = {"cu_seqlens": kwargs["cu_seqlens"], "position_embeddings": tables}
        found = super().enter_layer(module, args, stock)
        fitted = stock if found is None else found[1]
        cos, sin = fitted["position_embeddings"]
        ends = fitted["cu_seqlens"]
        return args, {**kwargs, "cu_seqlens": ends, "rotary_pos_emb_cos": cos, "rotary_pos_emb_sin": sin}

    def show(self, number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pass queries, keys and values ``(1, patches, heads of this rank, head size)`` to `see_attention`."""
        if self.under_way() is not None:
            states = torch.stack([kwargs[name].flatten(2) for name in ("query", "key", "value")])
            query, key, value = self.all_heads(states, module.head_size)
            self.see_attention(number, query, key, value, module.scale)

    def leave_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a block, whose hidden states are ``(patches, 1, channels)``: ask the policies, and cut."""
        left = super().leave_layer(number, module, args, output[:, 0])
        return None if left is None else left[:, None]

    def leave_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The encode call ends here: dropped units are holes in the output, in raster order."""
        self.forget()


def _first(args: tuple[Any, ...] | None) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    return None if args is None else (args, {})
