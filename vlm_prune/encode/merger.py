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
        alone = [range(i, i + 1) for i in range(call.tiles)]
        for tiles in state.media if self.stage.together else alone:
            units = sum(state.tiles[i].count for i in tiles) // self.group
            mine = features[begin : begin + units * group].reshape(units, -1)
            begin += units * group
            target = sum(call.targets[i] for i in tiles)
            if units == sum(call.units[i] for i in tiles) and target < units:
                keep = self.stage.ask_final(self._view(call, tiles, mine, target, project), after_projector)
                if keep is not None:
                    mine, dropped = self._keep_final([state.tiles[i] for i in tiles], mine, keep), True
            pieces.append(mine.reshape(-1, features.shape[-1]))
        if not dropped:
            return None
        state.fitted = {}
        return torch.cat(pieces)

    def _view(
        self, call: EncodeCall, tiles: range, features: torch.Tensor, target: int, project: Any
    ) -> FeaturesView:
        """What the policies are shown of the ``features`` ``(units, channels)`` of one tile, or of a video's frames."""
        state: PackedState = call.state
        several = [state.tiles[i] for i in tiles]
        single, first = len(tiles) == 1, tiles.start
        given = [state.given(i) for i in tiles]
        return FeaturesView(
            pick(features[None], self._rasters(several), 1),
            call.grids[first] if single else (1, len(features)),
            target,
            content_key(given[0] if single else torch.cat(given, 1)),
            state.picture(first) if single else None,
            {name: torch.cat([tile.carry[name] for tile in several], 1) for name in several[0].carry},
            project,
            len(tiles),
        )

    def _rasters(self, tiles: list[Tile]) -> torch.Tensor | None:
        """The units of several tiles, one after the other, each in raster order; ``None`` if they stand so."""
        orders, begin = [], 0
        for tile in tiles:
            if (order := self._raster(tile)) is None:
                return None
            orders.append(order + begin)
            begin += len(order)
        return torch.cat(orders)

    def _keep_final(self, tiles: list[Tile], features: torch.Tensor, keep: Keep) -> torch.Tensor:
        """The chosen units of whole tiles' ``features`` ``(units, channels)``, or what they were merged to.

        Waits for the device where there are several, to know how many stay of each.
        """
        index, merged, order = keep.index[0], keep.rows, self._rasters(tiles)
        if keep.valid is not None and len(tiles) > 1:
            there = keep.valid[0]
            index, merged = index[there], None if merged is None else merged[:, there]
        place = index if order is None else order[index]
        if merged is None:
            place = place.sort().values
            left = features[place]
        else:
            place, by_place = place.sort()
            left = merged[0][by_place]
        left = left + stream.overflow(features[None])[0]
        units, counts = len(features) // len(tiles), [len(index)]
        if len(tiles) > 1:
            frame = torch.arange(len(tiles), device=place.device)[:, None]
            counts = (place // units == frame).sum(-1).tolist()
        parts = zip(tiles, index.split(counts), place.split(counts), strict=True)
        for number, (tile, chosen, stand) in enumerate(parts):
            mine = chosen[None] - number * units
            tile.carry = {name: x.gather(1, mine) for name, x in tile.carry.items()}
            tile.alive = tile.alive[stream.grouped(stand - number * units, self.group)]
        return left
