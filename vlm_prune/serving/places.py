"""M-RoPE positions of pruned images: kept tokens and text have the positions that they have in the unpruned prompt.

vLLM numbers a prompt before the tower has seen the image. What is known by then, the start of each image and of each
piece of text, is written at once (`prompt_positions`). Rows and columns of the kept tokens are passed along with their
embeddings (`with_places`), and written when these arrive (`placed`), chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

COLUMNS = 4
"""Channels added to an embedding: row and column, each as two digits."""

DIGIT = 256
"""Base of the digits: whole numbers below it are exact in bfloat16."""


def with_places(embeds: torch.Tensor, columns: int) -> torch.Tensor:
    """The rows ``(units, channels)`` of a whole image, ``columns`` units wide, with their places in 4 more channels."""
    number = torch.arange(len(embeds), device=embeds.device)
    digits = [
        digit for side in (number // columns, number % columns) for digit in (side // DIGIT, side % DIGIT)
    ]
    return torch.cat([embeds, torch.stack(digits, 1).to(embeds.dtype)], 1)


def split_places(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings without their places, and the places: int64 ``(2, rows)``, row and column."""
    high_row, row, high_column, column = rows[:, -COLUMNS:].long().unbind(1)
    return rows[:, :-COLUMNS], torch.stack([high_row * DIGIT + row, high_column * DIGIT + column])


def prompt_positions(length: int, images: Sequence[tuple[int, int, int, int]]) -> tuple[torch.Tensor, int]:
    """Positions of a prompt before any image was seen, int64 ``(3, length)``, and the offset of later positions.

    An image's tokens are all at its start; the text after it continues as after the whole image.

    Args:
        length: of the prompt, without placeholders of dropped tokens.
        images: in order, for each its first placeholder, its number of placeholders, and rows and columns of the whole
            image.
    """
    positions = torch.arange(length)
    for begin, kept, rows, columns in images:
        positions[begin : begin + kept] = start = int(positions[begin])
        end = begin + kept
        positions[end:] = torch.arange(length - end) + start + max(rows, columns)
    after = int(positions[-1]) + 1 if length else 0
    return positions.expand(3, -1).clone(), after - length


def placed(
    positions: torch.Tensor, is_image: torch.Tensor, computed: int, places: Sequence[torch.Tensor]
) -> torch.Tensor:
    """``positions`` ``(3, length)`` with the ``places`` ``(2, rows)`` of the next image tokens written in.

    The time coordinate is the image's start for all of its tokens, so it can be read whatever was written before: a
    chunk may be part of an image, and may be computed again.

    Args:
        positions: from `prompt_positions`, or from an earlier call.
        is_image: which tokens are placeholders of images, bool ``(length,)``.
        computed: tokens of the prompt that are computed already.
        places: of the tokens that are computed next.
    """
    positions = positions.clone()
    if places:
        joined = torch.cat(list(places), 1).to(positions)
        at = computed + is_image[computed:].nonzero()[: joined.shape[1], 0].to(positions.device)
        positions[1:, at] = positions[0, at] + joined
    return positions
