"""The rows that a decoder currently computes, and what belongs to each of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..kernels import close_holes
from . import stream


@dataclass(frozen=True)
class Rows:
    """A shortened sequence: one turn's tokens of a batch, as a decoder layer sees them.

    Attributes:
        length: tokens of this turn as the caller passed them.
        order: int64 ``(batch, rows)``, the token that each row holds (see `stream.live_order`).
        valid: bool ``(batch, rows)``, False for rows that only fill up a ragged batch; ``None`` if there are none.
        mask: bool ``(batch, rows)``, rows that may be attended; ``None`` if all may.
        positions: int64 ``(batch or 1, rows)``, RoPE positions, before the shift from renumbering in earlier turns;
            with multimodal RoPE ``(axes, batch or 1, rows)``.
        shift: int64 ``(batch,)``, by how much this turn's last position was moved down; ``None`` if it was not.
        given: the caller's padding mask ``(batch, tokens)`` if ``positions`` count the padding in front; else ``None``.
        visual: bool ``(batch, rows)``, visual tokens; ``None`` if no policy acts inside the decoder.
        carry: values ``(batch, rows)`` that the encode stage left for each visual token, 0 elsewhere.
    """

    length: int
    order: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    given: torch.Tensor | None = None
    visual: torch.Tensor | None = None
    carry: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Rows per sequence, fill included."""
        return self.order.shape[1]

    @property
    def whole(self) -> bool:
        """Whether these are the turn's tokens as the caller passed them: none dropped, none moved."""
        return self.count == self.length and self.valid is None

    @property
    def padding(self) -> torch.Tensor | None:
        """Tokens of padding in front that ``positions`` count: int64 ``(batch,)``; ``None`` if they count none."""
        return None if self.given is None else (self.given.cumsum(-1) == 0).sum(-1)

    def tail(self) -> int:
        """How many tokens at the end of the turn have all their rows, in every sequence. Waits for the device."""
        last = torch.arange(self.length - 1, self.length - 1 - self.count, -1, device=self.order.device)
        there = self.order.flip(-1) == last
        if self.valid is not None:
            there = there & self.valid.flip(-1)
        return int(there.long().cumprod(-1).sum(-1).min())

    def without_tail(self, cut: int) -> Rows:
        """The turn without its last ``cut`` tokens, all of which have rows."""
        return Rows(
            length=self.length - cut,
            order=self.order[:, : self.count - cut],
            positions=self.positions[..., : self.count - cut],
            valid=None if self.valid is None else self.valid[:, : self.count - cut],
        )

    def to(self, device: torch.device) -> Rows:
        """The rows on a device, where the layers of a model are spread over several."""
        if self.order.device == device:
            return self
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)
        }
        return replace(self, **moved, carry={name: x.to(device) for name, x in self.carry.items()})

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, rows, channels)`` at full length, zeros where tokens were dropped."""
        here = self.to(x.device)
        return stream.restore(x, here.order, here.length, here.valid)

    def pick(self, live: torch.Tensor, counts: list[int]) -> tuple[Rows, torch.Tensor]:
        """The ``live`` ones of these, bool ``(batch, rows)``, ``counts`` of each sequence; and their numbers.

        Shorter sequences are filled up on the left with other rows of these.
        """
        order = stream.live_order(live, max(counts))
        valid = live.gather(1, order) if min(counts) < max(counts) else None
        mask = None if self.mask is None else self.mask.gather(1, order)
        if valid is not None:
            mask = valid if mask is None else mask & valid
        shape = (*self.positions.shape[:-2], *order.shape)
        rows = replace(
            self,
            order=self.order.gather(1, order),
            positions=self.positions.expand(*self.positions.shape[:-2], *live.shape).gather(
                -1, order.expand(shape)
            ),
            valid=valid,
            mask=mask,
            visual=None if self.visual is None else _picked(self.visual, order, valid),
            carry={name: _picked(carried, order, valid) for name, carried in self.carry.items()},
        )
        return rows, order

    def close(
        self, x: torch.Tensor, live: torch.Tensor, count: int, ragged: bool, gone: torch.Tensor | None
    ) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """The ``live`` rows, with those of ``x`` ``(batch, rows, channels)``, and their indices.

        ``live`` is bool ``(batch, rows)``. The sequence is then ``count`` rows long; ``ragged`` says that some have
        fewer, which are filled up with zeros on the left. ``gone`` bool ``(batch, rows)`` marks dropped rows whose
        places the others close up ("compact" positions); ``None`` lets positions be ("original").
        """
        x, order, kept, positions, moved = close_holes(
            x, live, self.positions, self.mask, gone, count, ragged
        )
        valid = kept if ragged else None
        shift = self.shift
        if gone is not None:
            shift = moved if shift is None else shift + moved
        rows = replace(
            self,
            order=order if self.whole else self.order.gather(1, order),
            positions=positions,
            valid=valid,
            mask=None if self.mask is None and valid is None else kept,
            shift=shift,
            visual=None if self.visual is None else _picked(self.visual, order, valid),
            carry={name: _picked(carried, order, valid) for name, carried in self.carry.items()},
        )
        return rows, x, order


def _picked(x: torch.Tensor, order: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    x = x.gather(1, order)
    return x if valid is None else x.masked_fill(~valid, 0)
