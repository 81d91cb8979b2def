"""H2O: heavy hitters, the rows that received most attention so far, stay in the KV cache (Zhang et al., NeurIPS 2023,
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
    """H2O, in the KV cache (decode stage): each KV head keeps the visual rows that received most attention.

    The attention that a row receives from all rows of the prompt is summed, in each layer and each KV head separately;
    the visual rows with most of it are the heavy hitters and stay. Earlier rows are seen by more rows, so the sum leans
    towards the start of the image. The prefill sees the whole image, so the first token of the answer is that of the
    unpruned model.

    Paper's definition, not run against released code. It differs in that only visual rows are evicted, and all text
    stays, which takes the place of the paper's recent tokens. Decoding adds no visual rows, so a budget that
    holds after the prefill holds from then on: no row is evicted for those of the answer, and attention is not
    accumulated further. Heads that share keys are scored together, by their mean; the paper has no such models.

    Attributes:
        positions: has no effect, since cached rows keep the positions that they were computed with.
    """

    name: ClassVar[str] = "h2o"

    def observe(self, view: PrefillView) -> torch.Tensor:
        """Attention accumulated over the prompt, ``(batch, kv_heads, rows)``."""
        real = torch.ones_like(view.visual) if view.valid is None else view.valid
        return attention_by_head(view.recorded, real, real.shape[1])
