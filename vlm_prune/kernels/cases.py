"""Each op at the layer shapes of a real model, for ahead-of-time compilation and for the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

FLAG, INDEX, EXACT = 1, 8, 4
"""Bytes of a bool, an int64, a fp32."""


@dataclass(frozen=True)
class Shape:
    """A prompt of one image.

    Attributes:
        visual, kept, text: tokens of the image before and after pruning, and of the text after it.
        channels, tower: width of the language model, width of the vision tower.
        heads, shared, dim: query heads, key heads, and their size.
    """

    name: str
    visual: int
    kept: int
    text: int
    channels: int
    tower: int
    heads: int
    shared: int
    dim: int


SHAPES = (
    Shape("llava-1.5-7b", 576, 64, 64, 4096, 1024, 32, 32, 128),
    Shape("llava-onevision-7b", 7290, 1458, 64, 3584, 1152, 28, 4, 128),
)


@dataclass(frozen=True)
class Case:
    """One call: ``op`` with ``args``, the bytes that any implementation must move, and the FLOPs it must do."""

    op: str
    args: tuple[Any, ...]
    least: int
    flops: int = 0

    def launch(self) -> Any:
        """Call the kernels themselves, whatever device the tensors are on."""
        from . import moves, sums

        launcher: Callable[..., Any] = getattr(moves, self.op, None) or getattr(sums, self.op)
        return launcher(*self.args)


def cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """All ops at a shape. On the meta device the tensors have no memory."""
    size, meta = dtype.itemsize, device == "meta"
    n, kept = shape.visual + shape.text, shape.kept + shape.text
    c, h, s, d = shape.channels, shape.heads, shape.shared, shape.dim
    row = c * size

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, dtype=torch.float32).to(dtype)

    def flags(*sizes: int) -> torch.Tensor:
        return torch.ones(sizes, device=device, dtype=torch.bool)

    live = flags(1, n)
    if not meta:
        live[0, torch.randperm(shape.visual)[shape.kept :]] = False
    index = torch.arange(n, device=device)[None, n - kept :] if meta else live.nonzero()[:, 1][None]

    x = random(1, n, c)
    positions = torch.arange(n, device=device)[None]
    rows = [kept * row, kept * row, n * FLAG, kept * (2 * INDEX + FLAG), kept * INDEX]
    yield Case("close_holes", (x, live, positions, None, ~live, kept), sum(rows) + n * FLAG)
    yield Case("gather_rows", (x, index, None, 0.0), 2 * kept * row + kept * INDEX)
    short = x[:, :kept]
    yield Case("place_rows", (short, index, None, n, 0.0), (kept + n) * row + kept * INDEX)

    into = torch.arange(shape.visual, device=device)[None] * shape.kept // shape.visual
    seen, weight = random(1, shape.visual, shape.tower), torch.ones(1, shape.visual, device=device)
    least = shape.visual * (shape.tower * size + INDEX + EXACT) + shape.kept * shape.tower * EXACT
    yield Case("merge_rows", (seen, into, weight, shape.kept), least, 2 * shape.visual * shape.tower)

    keys, values = random(1, s, n, d), random(1, s, n, d)
    yield Case("gather_kv", (keys, values, index), 4 * s * kept * d * size + kept * INDEX)

    query = random(1, h, n, d)
    for asked in (1, shape.text):
        number = torch.arange(n - asked, n, device=device)[None]
        least = (s * n + h * asked) * d * size + asked * (INDEX + FLAG) + n * (FLAG + 2 * EXACT)
        args = (query, keys, number, flags(1, asked), flags(1, n), d**-0.5)
        yield Case("attention_mass", args, least, 4 * h * asked * n * d)

    output, new = random(1, n, h, d), torch.randn(1, shape.text, h, d, device=device)
    changed = flags(1, h, shape.text)
    least = shape.text * (h * (d * (size + EXACT) + FLAG) + INDEX)
    yield Case("overwrite_rows", (output, index[:, -shape.text :], new, changed), least)
