"""VL-Cache: layers share a cache budget by how sparse the question's attention is (Tu et al., ICLR 2025,
arXiv 2410.23317)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .by_head import KeepsByHead, mean_of_groups, top_by_head
from .prompt_attention import attention_blocks, question_rows
from .settings import check_number

if TYPE_CHECKING:
    from ..contract.views import AttentionView, CacheView, PrefillView


def votes_and_density(
    view: AttentionView, asking: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from the ``asking`` rows to each row of this prompt, and each row's contribution to its density.

    An entry of the attention map counts as dense if it is at least ``threshold`` of the largest in its row. The second
    result, summed over the rows, is the share of dense entries among those that causality allows. Waits for the device.

    Args:
        view: of a decoder layer's prefill.
        asking: bool ``(batch, rows)``.
        threshold: from 0 to 1.

    Returns:
        ``(batch, kv_heads, rows)``, averaged over query heads that share a KV head, and ``(batch, rows)``.
    """
    keys, rows = view.key.shape[2], view.query.shape[2]
    votes = view.query.new_zeros(*view.query.shape[:3], dtype=torch.float32)
    dense, entries = votes[:, 0].clone(), votes[:, 0].sum(-1, keepdim=True)
    for paid, seen in attention_blocks(view, asking):
        large = (paid >= threshold * paid.amax(-1, keepdim=True)) & seen[:, None]
        votes = votes + paid.sum(2)[..., keys - rows :]
        dense = dense + large.float().mean(1).sum(1)[:, keys - rows :]
        entries = entries + seen[..., keys - rows :].sum((1, 2))[:, None]
    return mean_of_groups(votes, view.key.shape[1]), dense / entries.clamp(min=1)


def layer_counts(density: torch.Tensor, held: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Rows that each layer keeps, int64 ``(batch, layers)``: ``total`` in all, shared by ``density``.

    Each layer keeps at least one row. What exceeds the rows of a layer goes to the others.

    Args:
        density: ``(batch, layers)``, above 0.
        held: int64 of the same shape, visual rows of each layer.
        total: int64 ``(batch,)``.
    """
    first = held.clamp(max=1)
    room, weight = (held - first).double(), density.double().clamp(min=1e-12)
    rest = (total - first.sum(-1)).clamp(min=0).double().minimum(room.sum(-1))[:, None]
    # layers fill up in order of size over weight, and the others share what is left; assuming too
    # many or too few full layers gives the others less, so the right level is the highest
    order = (room / weight).argsort(dim=-1)
    weights, rooms = weight.gather(1, order), room.gather(1, order)
    full, open_weight = rooms.cumsum(-1) - rooms, weights.flip(-1).cumsum(-1).flip(-1)
    level = ((rest - full) / open_weight).amax(-1, keepdim=True)
    share = torch.minimum(room, level * weight)
    ends = (share.cumsum(-1) + 0.5).floor()
    counts = ends.diff(dim=-1, prepend=ends.new_zeros(len(ends), 1))
    return first + counts.minimum(room).long()


@dataclass(frozen=True)
class VLCache(KeepsByHead):
    """VL-Cache, in the KV cache (decode stage): layers whose attention is less sparse keep more visual rows.

    The text after the image is the query. In each layer the share of its attention that is not negligible, relative to
    the largest entry of its row, is that layer's density, and the layers share the budget by it. Within a layer each KV
    head keeps the visual rows that this text attends to most. The budget holds on average over the layers.

    Paper's definition, not run against released code. It differs in these points:

    - Only visual rows are evicted, and all text stays, which takes the place of the paper's recent tokens.
    - Every layer keeps at least one visual row, in the paper one in a hundred; what exceeds the rows of a layer goes to
      the others, in the paper it is lost.
    - For a prompt that ends with its image, its last row is used. Heads that share keys vote together, by their mean.

    Attributes:
        threshold: share of the largest entry of a row below which an entry of the attention map is negligible.
        positions: has no effect, since cached rows keep the positions that they were computed with.
    """

    name: ClassVar[str] = "vlcache"
    default_ratio: ClassVar[float] = 0.1

    threshold: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, threshold=(0, 1))

    def observe(self, view: PrefillView) -> torch.Tensor:
        """The votes of each KV head, then one row of densities and one that marks visual rows."""
        votes, density = votes_and_density(view.recorded, question_rows(view), self.threshold)
        return torch.cat([votes, density[:, None], view.visual[:, None].to(votes.dtype)], 1)

    def evict(self, view: CacheView) -> torch.Tensor | None:
        """In each head the visual rows with most votes, as many as the layer's density allows."""
        if view.scores is None:
            return None
        layers = sorted(view.all_scores)
        sums = torch.stack([view.all_scores[layer][:, -2:].sum(-1) for layer in layers], -1)
        density, held = sums[:, 0], sums[:, 1].long()
        counts = layer_counts(density, held, view.target * len(layers))
        return top_by_head(view.scores[:, :-2], counts[:, layers.index(view.layer)], view.visual)
