"""FlowCut's stage inside the decoder, and its released Qwen2-VL variant (Tong et al., NeurIPS 2025, arXiv 2505.19536).

Follows the released ``modeling_llama_flowcut.py`` and ``FlowCut_Qwen``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Policy
from .flowcut import FlowCut, information_score, value_magnitude, wanted_drops
from .scores import last_row, top_mask
from .views import AttentionView, PrefillView

LAYER = 1
"""0-based decoder layer behind which tokens are dropped."""


def relevance_score(view: AttentionView, visual: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """How much the prompt's ``last`` row cares for each ``visual`` one, ``(batch, rows)``; 0 for text.

    Its query with their keys and its value with their values, a softmax over visual rows each, shares of both added and
    weighted by the magnitude of the value. ``visual`` and ``last`` are bool ``(batch, rows)``; key heads may be shared.
    """
    rows = visual.shape[1]
    dtype = torch.promote_types(view.query.dtype, torch.float32)
    key, value = view.key[:, :, -rows:].to(dtype), view.value[:, :, -rows:].to(dtype)
    place = last.to(torch.int8).argmax(-1)[:, None, None, None]

    def of_last(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).gather(2, place.expand(-1, x.shape[1], 1, x.shape[3]))

    def share(query: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        grouped = query.reshape(len(query), other.shape[1], -1, query.shape[3])
        logits = (grouped @ other.mT * view.scaling).masked_fill(~visual[:, None, None], -torch.inf)
        return logits.softmax(-1).nan_to_num(0.0).mean((1, 2))

    return information_score(
        share(of_last(view.query), key), share(of_last(value), value), value_magnitude(value)
    )


@dataclass(frozen=True)
class FlowCutDecoder(Policy):
    """One cut at a decoder layer (prefill stage): the released code's second half on LLaVA-NeXT and Qwen2-VL."""

    name: ClassVar[str] = "flowcut"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    reads_attention: ClassVar[bool] = True

    def prefill_layers(self, depth: int) -> list[int]:
        """The second layer."""
        return [LAYER]

    def prefill(self, view: PrefillView) -> torch.Tensor:
        """Exactly the wanted number of visual rows, those most relevant to the last row of the prompt."""
        if view.attention is None:
            raise RuntimeError(
                f"{self.name} reads the attention of layer {view.layer}, which was not recorded"
            )
        score = relevance_score(view.attention, view.visual, last_row(view.valid, view.visual))
        return ~view.visual | top_mask(score, view.target, view.visual)


@dataclass(frozen=True)
class FlowCutQwen(FlowCut):
    """FlowCut on Qwen2-VL as released (encode and prefill stage).

    Twice the wanted tokens leave the tower, in which single patches are dropped, the last time behind its last block.
    The merger then makes one token of every four of them, whichever these are, and the tokens take the first places of
    the image. Half of them are dropped in the decoder. The released code takes one image a prompt; here each image is
    treated as if it were alone.
    """

    single_patches: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    prefill_layers = FlowCutDecoder.prefill_layers
    prefill = FlowCutDecoder.prefill

    def _leaving(self, target: int) -> int:
        return 2 * target

    def _consumed(self, feature_layer: int) -> int:
        return feature_layer + 1

    def _drop_counts(
        self, attention: torch.Tensor, alive: list[int], target: int, remaining: int
    ) -> list[int]:
        """From the entropy ``-sum g ln(g + 1e-7)``, ``g`` as it is."""
        entropy = -(attention * (attention + 1e-7).log()).sum(-1)
        flatness = entropy / torch.log(torch.tensor(float(max(alive[0], 2)), dtype=attention.dtype))
        return [int(n) for n in wanted_drops(alive[0], target, remaining, flatness).round().tolist()]


@dataclass(frozen=True)
class FlowCutNext(FlowCut):
    """FlowCut on LLaVA-NeXT as released (encode and prefill stage).

    The budget is one of a whole image: half of it leaves the tower for every tile, padding is taken off, no newlines
    are put in, and exactly the budget is left by the cut in the decoder, if there is more.
    """

    per_image: ClassVar[bool] = True
    drops_newlines: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    prefill_layers = FlowCutDecoder.prefill_layers
    prefill = FlowCutDecoder.prefill

    def tile_target(self, target: int) -> int:
        """Half of it, rounded down."""
        return target // 2


RELEASED: dict[str, type[FlowCut]] = {"llava_next": FlowCutNext, "qwen2_vl": FlowCutQwen}
"""Model families for which the released code differs."""
