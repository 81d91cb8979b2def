"""PyramidKV: early layers keep more of the KV cache than late ones (Cai et al., 2024, arXiv 2406.02069).

Follows ``PyramidKVCluster`` of the released ``pyramidkv/pyramidkv_utils.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..kernels import numbers
from .by_head import top_by_head
from .settings import check_number
from .snapkv import SnapKV

if TYPE_CHECKING:
    from ..contract.policy import Evicted
    from ..contract.views import CacheView


def pyramid_counts(target: torch.Tensor, held: torch.Tensor, layers: int, beta: float) -> torch.Tensor:
    """Rows that each layer keeps, int64 ``(batch, layers)``: ``target`` on average, falling in equal steps.

    The last layer keeps ``target / beta``, and the first what makes up for it; or all that it holds if that is fewer,
    and then the last one more. The line is rounded so that its sums, from the first layer to any, are.

    Args:
        target: int64 ``(batch,)``.
        held: int64 like it, visual rows that every layer holds.
        layers: how many.
        beta: at least 1, for which all keep equally many.
    """
    mean, most = target.double(), held.double()
    first = torch.minimum(2 * mean - mean / beta, most) if layers > 1 else mean
    last = torch.minimum(2 * mean - first, most)
    depth = numbers(layers, target.device) / max(layers - 1, 1)
    line = first[:, None] + (last - first)[:, None] * depth
    ends = (line.cumsum(-1) + 0.5).floor()
    return ends.diff(dim=-1, prepend=ends.new_zeros(len(ends), 1)).long()


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV, in the KV cache (decode stage): SnapKV with a budget that falls from layer to layer.

    Each KV head keeps the visual rows that the prompt's end attends to, chosen as `snapkv` chooses. The first layer
    keeps most and the last one least, in equal steps between, since attention gathers on fewer rows with depth. The
    budget holds on average over the layers. The prefill sees the whole image, so the first token of the answer is that
    of the unpruned model.

    Not run against the released code, from which it differs in these points beside those of `snapkv`:

    - The budget is kept to the row: there, steps are rounded down, so that the layers keep more than it in sum.
    - Where the first layer holds less than its part, it keeps all and the last one more. So it is there, except that
      all layers keep equally many once the prompt is shorter than twice the budget.
    - The window is 64 rows there.

    Attributes:
        window: rows of the observation window, at most.
        kernel: rows to pool over, an odd number; 1 for none.
        pooling: ``"mean"`` or ``"max"``.
        positions: has no effect, since cached rows keep the positions that they were computed with.
        beta: the last layer keeps the budget divided by this; 1 for equally many in all layers, as `snapkv`.
    """

    name: ClassVar[str] = "pyramidkv"

    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, beta=(1, 10**6))

    def evict(self, view: CacheView) -> Evicted:
        """In each head the visual rows with most votes, as many as the layer's place allows."""
        if view.scores is None:
            return None
        layers = sorted(view.all_scores)
        held = (view.visual & view.remaining).sum(-1)  # the same in all layers, also where some saw more
        counts = pyramid_counts(view.target, held, len(layers), self.beta)
        return top_by_head(view.scores, counts[:, layers.index(view.layer)], view.visual)
