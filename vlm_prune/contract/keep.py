"""What a policy returns: which visual tokens survive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import PolicyError


@dataclass(frozen=True)
class Keep:
    """Which units (candidates for keeping) survive, for a batch of tiles.

    ``index`` is ``(batch, kept)`` int64, ascending where valid. Rows that keep fewer than ``kept`` units are filled
    up with units they drop, marked False in ``valid``; ``valid=None`` says that every row keeps ``kept`` units.
    ``rows`` ``(batch, kept, channels)`` are new features for the kept units, where a policy merges others into them.
    ``still`` says that ``index`` names all units in their places: the tower goes on with all of them, and masks those
    that are dropped.
    """

    index: torch.Tensor
    valid: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    still: bool = False

    @classmethod
    def top(cls, scores: torch.Tensor, counts: int | list[int]) -> Keep:
        """The ``counts`` highest of ``scores`` ``(batch, units)`` in each row, in their original order.

        ``counts`` is one number for all rows, or one per row. NaN ranks last on every backend.
        """
        if scores.is_floating_point():
            lowest = torch.finfo(scores.dtype).min  # above -inf, by which a policy excludes a unit
            scores = scores.nan_to_num(nan=lowest, neginf=-torch.inf)
        if isinstance(counts, int) or len(set(counts)) == 1:
            k = counts if isinstance(counts, int) else counts[0]
            return cls(scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values)
        rank = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        return cls.from_mask(rank < torch.tensor(counts, device=scores.device)[:, None], max(counts))

    @classmethod
    def masked(cls, mask: torch.Tensor) -> Keep:
        """Those of ``mask``, bool ``(batch, units)``, without moving any; only the device knows how many they are."""
        return cls(torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1), mask, still=True)

    @classmethod
    def all(cls, batch: int, units: int, device: torch.device) -> Keep:
        """All ``units`` of every row."""
        return cls(torch.arange(units, device=device).expand(batch, -1))

    def checked(self, name: str, batch: int, units: int, most: int | None) -> Keep:
        """This answer, if policy ``name`` may give it about ``batch`` rows of ``units``.

        ``most`` is how many the budget allows, ``None`` if that is unknown here. Only looks at shapes.

        Raises:
            PolicyError: wrong type or shape, or more units than the budget allows.
        """
        index: Any = self.index
        if (
            not isinstance(index, torch.Tensor)
            or index.dtype != torch.int64
            or index.dim() != 2
            or len(index) != batch
        ):
            given = (
                f"{index.dtype} {tuple(index.shape)}"
                if isinstance(index, torch.Tensor)
                else type(index).__name__
            )
            raise PolicyError(f"{name} keeps an index {given}: an int64 tensor ({batch}, kept) is needed.")
        if index.shape[1] > min(units, units if most is None else most) and self.valid is None:
            raise PolicyError(
                f"{name} keeps {index.shape[1]} of {units} visual tokens, and its budget is {most}: keep at most "
                "view.target of them."
            )
        if self.valid is not None and (self.valid.shape != index.shape or self.valid.dtype != torch.bool):
            raise PolicyError(
                f"{name}: valid is {tuple(self.valid.shape)}, where bool {tuple(index.shape)} is needed."
            )
        if self.rows is not None and self.rows.shape[:2] != index.shape:
            raise PolicyError(
                f"{name}: rows are {tuple(self.rows.shape)}, where {(*index.shape, 'channels')} are needed."
            )
        return self

    @classmethod
    def from_mask(cls, mask: torch.Tensor, width: int) -> Keep:
        """From a bool mask ``(batch, units)`` whose fullest row has ``width`` True entries."""
        index = mask.view(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :width]
        return cls(index, mask.gather(1, index))

    def sparing(self, spared: list[bool], units: int) -> Keep | None:
        """The same, except that rows ``spared`` keep all their ``units``; ``None`` if that is all rows."""
        if not any(spared):
            return self
        if all(spared):
            return None
        mask = self.mask(units)
        return Keep.from_mask(mask | torch.tensor(spared, device=mask.device)[:, None], units)

    @classmethod
    def joined(cls, parts: list[tuple[torch.Tensor, Keep]], features: torch.Tensor, units: int) -> Keep:
        """Join answers for subsets of the tiles of ``features`` ``(batch, tokens, channels)`` into one for all of them.

        Tiles that no part covers keep all of their ``units``.
        """
        mask = torch.ones(len(features), units, dtype=torch.bool, device=features.device)
        for chosen, keep in parts:
            mask[chosen] = keep.mask(units)
        answered = sum(len(chosen) for chosen, _ in parts)
        keep = cls.from_mask(
            mask, max(k.index.shape[1] for _, k in parts) if answered == len(mask) else units
        )
        merged = [(chosen, part.rows) for chosen, part in parts if part.rows is not None]
        if not merged:
            return keep
        rows = features.gather(1, keep.index[..., None].expand(-1, -1, features.shape[2]))
        for chosen, new in merged:
            rows[chosen, : new.shape[1]] = new.to(rows.dtype)
        return replace(keep, rows=rows)

    def mask(self, units: int) -> torch.Tensor:
        """Bool ``(batch, units)``, True where they survive."""
        mask = torch.zeros(len(self.index), units, dtype=torch.bool, device=self.index.device)
        valid = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        return mask.scatter(1, self.index, valid)

    def tolist(self) -> list[list[int]]:
        """The kept units of each row. Waits for the device."""
        index = self.index.tolist()
        if self.valid is None:
            return index
        valid = self.valid.tolist()
        return [[i for i, ok in zip(*row, strict=True) if ok] for row in zip(index, valid, strict=True)]


def top_mask(scores: torch.Tensor, count: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The ``count`` ``(batch,)`` highest ``scores`` ``(batch, rows)`` of each row, bool like ``scores``.

    Only candidates ``among`` (bool) are chosen; fewer than ``count`` candidates are all chosen. NaN ranks last, and of
    equals the first one wins.
    """
    lowest = torch.finfo(scores.dtype).min
    ranked = scores.nan_to_num(nan=lowest, neginf=lowest).masked_fill(~among, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.empty_like(among).scatter_(1, order, first) & among
