"""LOOK-M: text stays in the KV cache, and evicted visual rows are merged into the rows that stay (Wan et al.,
EMNLP Findings 2024, arXiv 2406.18139).

Follows ``TextPivotMerge_LayerWise`` and ``TextAVGMergeKVCache_LayerWise`` of the released
``llava/model/kv_token_merge/modify_llama.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Evicted
from .by_head import top_by_head
from .h2o import H2O
from .settings import check_choice

if TYPE_CHECKING:
    from ..contract.views import CacheView

BLOCK = 256
"""Number of rows whose keys are compared with all keys at a time."""


def nearest_kept(keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The ``kept`` row whose key has the highest cosine with each row's: int64 ``(batch, heads, rows)``.

    Args:
        keys: ``(batch, heads, rows, head_dim)``, fp32 or better.
        kept: bool ``(batch, heads, rows)``.
    """
    unit = torch.nn.functional.normalize(keys, dim=-1)
    found = []
    for some in unit.split(BLOCK, 2):
        cosine = (some @ unit.mT).masked_fill(~kept[:, :, None], -torch.inf)
        found.append(cosine.argmax(-1))
    return torch.cat(found, 2)


def merge_rows(
    x: torch.Tensor, near: torch.Tensor, gone: torch.Tensor, count: torch.Tensor, pivot: bool
) -> torch.Tensor:
    """Each row as the mean of itself and of the rows that are ``gone`` and nearest to it; in the dtype of ``x``.

    With ``pivot`` each of these is first averaged with the row that it is merged into, which so gets more weight.

    Args:
        x: ``(batch, heads, rows, head_dim)``.
        near: int64 ``(batch, heads, rows)``, see `nearest_kept`.
        gone: bool of the same shape.
        count: number of rows merged into each row, of the same shape, in fp32 or better.
        pivot: see above.
    """
    exact = x.to(count.dtype)
    index = near[..., None].expand_as(exact)
    total = torch.zeros_like(exact).scatter_add(2, index, exact * gone[..., None])
    of = count[..., None]
    total = (total + of * exact) / 2 if pivot else total
    return ((exact + total) / (1 + of)).to(x.dtype)


@dataclass(frozen=True)
class LookM(H2O):
    """LOOK-M, in the KV cache (decode stage): evicted visual rows are merged into the rows that stay.

    Each KV head of each layer keeps all text, and the visual rows that received most attention from all rows of the
    prompt. Every evicted row is merged into the kept row with the most similar key, text or image. The prefill sees
    the whole image, so the first token of the answer is the unpruned model's.

    It differs from the released code in these points:

    - The budget counts visual rows. The released budget is a share of the prompt, in addition to a window of recent
      rows; here all text stays, wherever it is.
    - Batches work, and any number of images at any place; the released code takes one prompt with images of 576 tokens.
    - Heads that share keys are scored together, by their mean. Merging is fp32 or better.
    - The weighted merging of the paper is left out: which rows it merges depends on the other heads, and on the other
      sequences of a batch.

    Attributes:
        merge: ``"pivot"`` adds the mean of an evicted row and the one that it is merged into, ``"average"`` the row
            itself, ``None`` nothing.
    """

    name: ClassVar[str] = "lookm"
    default_ratio: ClassVar[float] = 0.2

    merge: Literal["pivot", "average"] | None = "pivot"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, merge=("pivot", "average", None))

    def evict(self, view: CacheView) -> Evicted:
        """In each head the visual rows with most attention, and the merged keys and values of the rows that stay."""
        if view.scores is None:
            return None
        chosen = top_by_head(view.scores, view.target, view.visual)
        if self.merge is None:
            return chosen
        gone = view.visual[:, None] & ~chosen
        kept = ~gone if view.valid is None else ~gone & view.valid[:, None]
        keys = view.keys.to(torch.promote_types(view.keys.dtype, torch.float32))
        near = nearest_kept(keys.detach(), kept)
        count = torch.zeros_like(keys[..., 0]).scatter_add(2, near, gone.to(keys.dtype))
        pivot = self.merge == "pivot"
        merged_keys, merged_values = (
            merge_rows(x, near, gone, count, pivot) for x in (view.keys, view.values)
        )
        return chosen, merged_keys, merged_values
