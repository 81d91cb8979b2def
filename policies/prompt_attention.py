"""The attention from rows of a prompt to each row in a decoder layer, per head: scores for rows of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .attention_rows import BLOCK, masked_softmax, row_logits, rows_where
from .by_head import mean_of_groups
from .scores import last_row

if TYPE_CHECKING:
    from ..contract.views import AttentionView, PrefillView


def question_rows(view: PrefillView) -> torch.Tensor:
    """Text after the last visual token, bool ``(batch, rows)``; the last row of a prompt that ends with its image."""
    text = view.text
    return text | (last_row(view.valid, view.visual) & ~text.any(-1, keepdim=True))


def last_of(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The last ``count`` of the marked ``rows`` of each sequence, bool ``(batch, rows)``."""
    after = rows.long().flip(-1).cumsum(-1).flip(-1)
    return rows & (after <= count)


def attention_blocks(
    view: AttentionView, asking: torch.Tensor, most: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Attention from the ``asking`` rows, some rows at a time, and the keys that these rows see.

    Causal over all valid keys, in fp32 or better: ``(batch, heads, some, keys)``, rows that were not requested zeroed,
    and bool ``(batch, some, keys)``. Keys of earlier turns come first.

    Args:
        view: of a decoder layer's prefill; keys may be more than queries, and have fewer heads.
        asking: bool ``(batch, rows)``.
        most: an upper bound on their number in a sequence; ``None`` waits for the device to count them.
    """
    _, heads, rows, dim = view.query.shape
    keys = view.key.shape[2]
    for index in rows_where(asking, most).split(BLOCK, 1):
        real = asking.gather(1, index)
        query = view.query.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim))
        number = index + keys - rows
        paid = masked_softmax(row_logits(query, view.key, view.scaling), number, view.valid)
        seen = (torch.arange(keys, device=number.device) <= number[..., None]) & real[..., None]
        if view.valid is not None:
            seen = seen & view.valid[:, None]
        yield paid.masked_fill(~seen[:, None], 0), seen


def attention_by_head(view: AttentionView, asking: torch.Tensor, most: int | None = None) -> torch.Tensor:
    """The attention from the ``asking`` rows to each row of this prompt, summed: ``(batch, kv_heads, rows)``.

    Query heads that share a KV head are averaged. Arguments as for `attention_blocks`.
    """
    total = torch.as_tensor(sum(paid.sum(2) for paid, _ in attention_blocks(view, asking, most)))
    return mean_of_groups(total, view.key.shape[1])[..., -view.query.shape[2] :]
