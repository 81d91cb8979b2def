"""SnapKV: the end of the prompt votes on what each head keeps (Li et al., NeurIPS 2024, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch.nn import functional

from .by_head import KeepsByHead
from .prompt_attention import attention_by_head, last_of, question_rows
from .settings import check_choice, check_number

if TYPE_CHECKING:
    from ..contract.views import PrefillView


def pooled(votes: torch.Tensor, kernel: int, pooling: str) -> torch.Tensor:
    """Votes ``(batch, heads, rows)`` pooled over ``kernel`` neighbouring rows, an odd number; same shape.

    Rows beyond the ends count as zero.
    """
    pool = functional.avg_pool1d if pooling == "mean" else functional.max_pool1d
    return pool(votes, kernel, stride=1, padding=kernel // 2)


@dataclass(frozen=True)
class SnapKV(KeepsByHead):
    """SnapKV, in the KV cache (decode stage): each KV head keeps the visual rows that the prompt's end attends to.

    The last rows of the prompt are an observation window. What they attend to, summed over the window and pooled over
    neighbouring rows so that clusters stay together, ranks the visual rows, in each layer and each KV head separately.
    The prefill sees the whole image, so the first token of the answer is that of the unpruned model.

    Paper's definition, not run against released code. It differs in these points:

    - Only visual rows are evicted, and all text stays. The window is the text after the image, at most `window` rows
      of it; for a prompt that ends with its image it is the last row.
    - Text counts as zero in the pooling, so that attention to text does not spread to neighbouring visual rows.
    - Heads that share keys vote together, by their mean; the paper has no such models.

    Attributes:
        window: largest number of rows in the observation window.
        kernel: rows to pool over, an odd number; 1 for none.
        pooling: ``"mean"`` or ``"max"``.
        positions: has no effect, since cached rows keep the positions that they were computed with.
    """

    name: ClassVar[str] = "snapkv"

    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, window=(1, 10**6), kernel=(1, 999))
        check_choice(self, pooling=("mean", "max"))
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel={self.kernel}: choose an odd number, so that a row has equally many neighbours on each side"
            )

    def observe(self, view: PrefillView) -> torch.Tensor:
        """The pooled votes of the window, ``(batch, kv_heads, rows)``."""
        window = last_of(question_rows(view), self.window)
        votes = attention_by_head(view.recorded, window, self.window)
        return pooled(votes.masked_fill(~view.visual[:, None], 0), self.kernel, self.pooling)
