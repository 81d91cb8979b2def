"""H2O: heavy hitters, the rows that got most attention so far, stay in the KV cache (Zhang et al., NeurIPS 2023,
arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .by_head import KeepsByHead
from .prompt_attention import attention_by_head

if TYPE_CHECKING:
    from ..contract.views import PrefillView


@dataclass(frozen=True)
class H2O(KeepsByHead):
    """H2O, in the KV cache (decode stage): each KV head keeps the visual rows that got most attention.

    What all rows of the prompt pay to a row is summed up, in each layer and each KV head by itself; the visual rows
    with most of it are the heavy hitters and stay. Earlier rows are seen by more rows, so the sum leans towards the
    start of the image. The prefill sees the whole image, so the first word of the answer is the unpruned model's.

    Paper's definition, not run against released code. It differs in that it is about visual rows alone, and all text
    stays, which takes the place of the paper's recent tokens. No visual row comes while decoding, so a budget that
    holds after the prefill holds from then on: no row has to leave for those that the answer brings, and attention
    is not summed up further. Heads that share keys are judged together, by their mean; the paper has no such models.

    Attributes:
        positions: has no effect, since what stays in a cache keeps the positions that it was computed with.
    """

    name: ClassVar[str] = "h2o"

    def observe(self, view: PrefillView) -> torch.Tensor:
        """Attention accumulated over the prompt, ``(batch, kv_heads, rows)``."""
        real = torch.ones_like(view.visual) if view.valid is None else view.valid
        return attention_by_head(view.recorded, real, real.shape[1])
