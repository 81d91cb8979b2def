"""The hooks around the merger of a packed tower: it computes live units only, and the holes are re-opened after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..call import stream
from ..call.encode_call import EncodeCall, Offer
from ..contract.policy import Keep
from ..contract.views import FeaturesView
from .packed_state import PackedState, Tile, pick
from .projection import Projection
from .stage import EncodeStage, content_key


class Merger:
    """Asks the policies of ``stage`` before and after the merger, which makes a unit of ``group`` patches."""

    def __init__(self, stage: EncodeStage, group: int):
        self.stage, self.group = stage, group

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Ask the policies that choose after the tower; pass the merger the live units only."""
        call = self.stage.under_way()
        if call is None:
            return None
        # some towers (GLM) have merged their patches into units by now
        group = len(args[0]) * self.group // sum(tile.count for tile in call.state.tiles)
        live = self._choose(call, args[0], group, after_projector=False)
        return None if live is None else (live, *args[1:])

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Ask the policies that choose after the merger; re-open the holes."""
        call = self.stage.under_way()
        if call is None:
            return None
        live = self._choose(call, output, 1, after_projector=True)
        if (entry := self.stage.composition.entry) is not None:
            patches = args[0].reshape(len(output), self.group, -1)
            self._offer(call, output, patches.mean(1) if entry.reads_tower else None)
        return call.state.reopen(output if live is None else live)

    def _offer(self, call: EncodeCall, output: torch.Tensor, tower: torch.Tensor | None) -> None:
        """Offer the merged features of each image to the decoder's entry; ``tower`` is the merger's input."""
        begin = 0
        for i, (tile, units, target) in enumerate(
            zip(call.state.tiles, call.units, call.targets, strict=True)
        ):
            mine, first = slice(begin, begin + units), begin
            begin += units
            if target < units:
                number, raster = torch.arange(first, begin, device=output.device), self._raster(tile)
                call.offers.append(
                    Offer(
                        features=pick(output[None, mine], raster, 1),
                        rows=number[None],
                        spans=[i],
                        grid=call.grids[i],
                        target=target,
                        content_key=content_key(call.state.given(i)),
                        carry=dict(tile.carry),
                        tower=None if tower is None else pick(tower[None, mine], raster, 1),
                    )
                )

    def _raster(self, tile: Tile) -> torch.Tensor | None:
        """Indices that sort the tile's units in raster order; ``None`` if they are sorted."""
        rows = tile.raster_rows
        return None if rows is None else rows[:: self.group] // self.group

    def leave_deepstack(
        self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Re-open the holes in the features for the decoder's first layers."""
        call = self.stage.under_way()
        return None if call is None else call.state.reopen(output)

    def _choose(
        self, call: EncodeCall, features: torch.Tensor, group: int, after_projector: bool
    ) -> torch.Tensor | None:
        """What is left of ``features``, ``group`` rows per unit, if a policy drops any at this side of the merger."""
        state: PackedState = call.state
        pieces, begin, dropped = [], 0, False
        project = None if after_projector else Projection(self.stage.projector, group)
        for i, tile in enumerate(state.tiles):
            units = tile.count // self.group
            mine = features[begin : begin + units * group].reshape(units, -1)
            begin += units * group
            if units == call.units[i] and call.targets[i] < units:
                order = self._raster(tile)
                view = FeaturesView(
                    pick(mine[None], order, 1),
                    call.grids[i],
                    call.targets[i],
                    content_key(state.given(i)),
                    state.picture(i),
                    tile.carry,
                    project,
                )
                keep = self.stage.ask_final(view, after_projector)
                if keep is not None:
                    mine, dropped = self._keep_final(tile, mine, keep, order), True
            pieces.append(mine.reshape(-1, features.shape[-1]))
        if not dropped:
            return None
        state.fitted = {}
        return torch.cat(pieces)

    def _keep_final(
        self, tile: Tile, features: torch.Tensor, keep: Keep, order: torch.Tensor | None
    ) -> torch.Tensor:
        """The chosen units of a whole tile's ``features`` ``(units, channels)``, or what they were merged to."""
        index, merged = keep.index[0], keep.rows
        place = index if order is None else order[index]
        if merged is None:
            place = place.sort().values
            left = features[place]
        else:
            place, by_place = place.sort()
            left = merged[0][by_place]
        left = left + stream.overflow(features[None])[0]
        tile.carry = {name: x.gather(1, keep.index) for name, x in tile.carry.items()}
        tile.alive = tile.alive[stream.grouped(place, self.group)]
        return left
