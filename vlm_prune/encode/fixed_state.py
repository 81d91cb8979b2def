"""Tiles of one size on their way through a vision tower: what is left of them, where it is, how it is cut."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from ..call import stream
from ..contract.policy import Keep
from ..contract.views import AttentionView
from ..kernels import gather_rows


@dataclass
class TowerState:
    """The state of a batch of tiles inside the tower.

    Attributes:
        grid: rows and columns of patches that went in.
        cls: rows before the patches, 1 where the tower has a CLS token.
        merge: side of the square of patches that makes a unit.
        units: int64 ``(tiles, alive)``, the original unit numbers, in sequence order.
        slots: int64 ``(tiles, alive, patches per unit)``, where their patches are; ``None`` if a unit is a patch,
            in the same order.
        valid: bool ``(tiles, alive)``, the real units where tiles keep different numbers.
        attention: the inputs of the layer's attention, until its policy is asked.
        earlier: the same of layers that a later one is judged with, see `TowerView`.
        carry: ``(tiles, alive)``, what policies stored for later.
        consumed: a copy of the state after each layer whose output is consumed.
        real: bool ``(tiles, alive patches)``, those that are no padding, where a tower is told; ``None`` elsewhere.
    """

    grid: tuple[int, int]
    cls: int
    merge: int
    units: torch.Tensor
    slots: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    attention: AttentionView | None = None
    earlier: dict[int, AttentionView] = field(default_factory=dict)
    carry: dict[str, torch.Tensor] = field(default_factory=dict)
    consumed: dict[int, TowerState] = field(default_factory=dict)
    real: torch.Tensor | None = None
    _masked: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether no patch was cut, so that masks of stock code fit."""
        return self.units.shape[1] * self.merge**2 == self.grid[0] * self.grid[1]

    def attended(self) -> torch.Tensor | None:
        """The tokens that may be attended after a cut, CLS included: bool ``(tiles, tokens)``; ``None`` if all may."""
        if self.real is None:
            return self.valid_tokens()
        valid = self.valid_tokens()
        real = pad(self.real, (self.cls, 0), value=True)
        return real if valid is None else real & valid

    def follow(self, device: torch.device) -> None:
        """Move to the device of the next layer's output, where a tower is spread over devices."""
        if self.units.device == device:
            return
        self.units = self.units.to(device)
        self.slots = None if self.slots is None else self.slots.to(device)
        self.valid = None if self.valid is None else self.valid.to(device)
        self.real = None if self.real is None else self.real.to(device)
        self.carry = {name: x.to(device) for name, x in self.carry.items()}

    def valid_tokens(self) -> torch.Tensor | None:
        """``valid`` of each token of the sequence, CLS included: bool ``(tiles, tokens)``."""
        if self.valid is None:
            return None
        if self._masked is None or self._masked[0] is not self.valid:  # many layers ask between two cuts
            self._masked = self.valid, self._valid_tokens(self.valid)
        return self._masked[1]

    def _valid_tokens(self, valid: torch.Tensor) -> torch.Tensor:
        if self.merge > 1:
            valid = valid.repeat_interleave(self.merge**2, dim=1)
            if self.slots is not None:
                valid = torch.empty_like(valid).scatter_(1, self.slots.flatten(1), valid)
        return pad(valid, (self.cls, 0), value=True) if self.cls else valid

    def cut(self, hidden: torch.Tensor, keep: Keep) -> torch.Tensor:
        """Keep the chosen units of ``hidden`` ``(tiles, CLS + patches, channels)``, and what belongs to them."""
        if keep.still:
            self.valid = keep.valid
            return hidden
        self.earlier = {}
        index, per_unit = keep.index, self.merge**2
        if per_unit > 1:
            if self.slots is None:
                raise RuntimeError("a tower with merged patches lost track of them")
            index = self.slots.gather(1, index[..., None].expand(-1, -1, per_unit)).flatten(1)
            kept = torch.arange(index.shape[1], device=index.device).view(1, -1, per_unit)
            self.slots = kept.expand(len(index), -1, -1)
        if self.real is not None:
            self.real = self.real.gather(1, index)
        self.units = self.units.gather(1, keep.index)
        self.carry = {name: x.gather(1, keep.index) for name, x in self.carry.items()}
        self.valid = keep.valid
        if keep.rows is not None:
            return torch.cat([hidden[:, : self.cls], keep.rows], 1)
        return gather_rows(hidden, self._behind_cls(index))

    def reopen(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` ``(tiles, CLS + alive patches, channels)`` at full length, with holes."""
        self.follow(hidden.device)
        table = stream.unit_patches(self.grid, self.merge, hidden.device)
        index = table[self.units].flatten(1)
        if self.slots is not None:
            # after a cut the patches of a unit are contiguous, those of a smaller image in raster order
            index = index.scatter(1, self.slots.flatten(1), index)
        length = self.cls + self.grid[0] * self.grid[1]
        return stream.open_holes(hidden, self._behind_cls(index), length, self.valid_tokens())

    def carried(self, units: int, extra: int) -> dict[str, torch.Tensor]:
        """What policies left per unit, laid out as the language model's rows: ``(rows of all tiles,)``.

        A tile has ``units`` of them, after ``extra`` rows.
        """
        carried = {}
        for name, x in self.carry.items():
            x = x if self.valid is None else x.masked_fill(~self.valid, 0)
            full = x.new_zeros(len(x), units).scatter(1, self.units, x)
            carried[name] = (pad(full, (extra, 0)) if extra else full).flatten()
        return carried

    def _behind_cls(self, index: torch.Tensor) -> torch.Tensor:
        """Token indices from patch indices, with CLS first."""
        return pad(index + 1, (1, 0), value=0) if self.cls else index
