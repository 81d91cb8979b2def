"""The encode stage of towers that take images of any size, with all patches in one sequence.

``cu_seqlens`` tells such a tower where an image (a frame, a window) ends, and rotary tables tell it where in the image
a patch is. Before each block the hooks here supply both for the remaining patches; after it they ask the policies, one
tile at a time. What happens around the merger is in ``merger.py``.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..call import stream
from ..call.encode_call import EncodeCall, let_ride
from ..call.timing import Stopwatch
from ..composition import Composition
from ..contract.anatomy import PackedTower
from ..contract.policy import Keep
from ..contract.views import AttentionView, TowerView
from ..sites import Site
from .merger import Merger
from .packed_state import PackedState, Seen, Tile, fit, frames_to_patches, lengths, pick, window_order
from .shrink import grid_places, shrink
from .stage import EncodeStage


class PackedEncoder(EncodeStage):
    """All hooks of the encode stage for one model and one policy."""

    def __init__(
        self,
        tower: PackedTower,
        projector: nn.Module,
        composition: Composition,
        session: Any,
    ):
        super().__init__(tower, projector, composition, session)
        self.tower = tower
        self.single_patches = any(policy.single_patches for policy in self.policies)
        if self.single_patches and not tower.single_patches:
            raise ValueError(
                "the released code cuts single patches before they are merged, and there is none for this family's "
                'tower. Leave compat at its default, which drops whole units, or use "qwen2_vl".'
            )

    @property
    def group(self) -> int:
        """Patches per candidate for keeping."""
        return 1 if self.single_patches else self.tower.merge**2

    def install(self, handles: list[Any]) -> None:
        """Register hooks and attention sites; what must be undone goes to ``handles`` and `sites` at once."""
        module = self.tower.module
        handles.append(module.register_forward_pre_hook(self.enter_tower, with_kwargs=True))
        handles.append(module.register_forward_hook(self.leave_tower, always_call=True))
        for number, block in enumerate(self.tower.layers):
            handles.append(block.register_forward_pre_hook(self.enter_layer, with_kwargs=True))
            # before transformers' own hooks that collect hidden states: they must see the cut ones
            handles.append(block.register_forward_hook(partial(self.leave_layer, number), prepend=True))
        for number in self.asked:
            self.sites.append(Site(self.tower.attentions[number], number, self.see_attention, packed=True))
        merger = Merger(self, self.tower.merge**2)
        handles.append(self.projector.register_forward_pre_hook(merger.enter))
        handles.append(self.projector.register_forward_hook(merger.leave))
        for module in self.tower.deepstack:
            handles.append(module.register_forward_hook(merger.leave_deepstack))

    # --- inside the tower ---

    def enter_tower(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin an encode call."""
        if not self.enters():
            return None
        self.check_recompute()
        given = dict(zip(("hidden_states", "grid_thw"), args, strict=False)) | kwargs
        pixels: torch.Tensor = given["hidden_states"]
        sizes = given["grid_thw"].tolist()  # stock code waits for them too
        grids = self.tower.grids(sizes)
        targets = self.frame_targets(
            [rows * columns for rows, columns in grids], [frames for frames, *_ in sizes]
        )
        call = EncodeCall(
            grids=grids,
            targets=targets,
            pixels=pixels,
            stopwatch=Stopwatch(pixels.device),
            receipt=self.session.new_receipt(grids, targets),
        )
        self.begin(call)
        shown = [self._shown(grid, target) for grid, target in zip(grids, targets, strict=True)]
        ends = accumulate(frames for frames, _, _ in sizes)
        media = [range(end - size[0], end) for size, end in zip(sizes, ends, strict=True)]
        call.state = self._begin(call, shown, media)
        if shown == grids:
            return None
        # all frames of a video are resized alike
        patches = [[self.tower.merge * side for side in shown[frames.start]] for frames in media]
        shrunk = given["grid_thw"].clone()
        shrunk[:, 1:] = torch.tensor(patches)
        smaller = [self._shrink(call.state, i, small) for i, small in enumerate(shown)]
        return (), {**given, "hidden_states": torch.cat(smaller), "grid_thw": shrunk}

    def _shown(self, grid: tuple[int, int], target: int) -> tuple[int, int]:
        """Rows and columns of units of a tile as the tower sees it."""
        if target == grid[0] * grid[1]:
            return grid
        shapes = (policy.tower_grid(grid, target) for policy in self.policies)
        return next((shape for shape in shapes if shape is not None), grid)

    def _shrink(self, state: PackedState, i: int, small: tuple[int, int]) -> torch.Tensor:
        """The patches of a tile at the size that makes a ``small`` grid of units."""
        if small == state.grids[i]:
            return state.given(i)[0]
        merge, _, side = state.sides
        frames = shrink(state.frames(i), small[0] * merge * side, small[1] * merge * side)
        return frames_to_patches(frames, small, *state.sides)

    def _begin(self, call: EncodeCall, shown: list[tuple[int, int]], media: list[range]) -> PackedState:
        sizes = [rows * columns * self.tower.merge**2 for rows, columns in shown]
        tiles, device = [], call.pixels.device
        for grid, small, size, end in zip(call.grids, shown, sizes, accumulate(sizes), strict=True):
            raster = None if self.tower.window is None else window_order(small, self.tower.window, device)
            if small != grid:
                places = torch.tensor(grid_places(grid, small), device=device)
                raster = places if raster is None else places[raster]
            alive = torch.arange(end - size, end, device=device)
            tiles.append(Tile(end - size, alive, raster, self.tower.merge**2, self.single_patches))
        sides = (self.tower.merge, *self.tower.patch)
        return PackedState(tiles, sum(sizes), call.grids, call.pixels, sides, media)

    def enter_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a block: sequence ends and rotary tables of the patches that are left."""
        call = self.under_way()
        if call is None:
            return None
        state: PackedState = call.state
        ends: torch.Tensor = kwargs["cu_seqlens"]
        state.segments_dense.append(ends)
        if state.shortened:
            key = id(ends)  # windows and whole images alternate; stock code passes the same two tensors
            if key not in state.fitted:
                state.fitted[key] = fit(state.alive, kwargs)
            kwargs = {**kwargs, **state.fitted[key]}
        state.segments.append(kwargs["cu_seqlens"])
        return args, kwargs

    def see_attention(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> None:
        """Record the inputs of a block's attention; stock code calls it once per image or window."""
        call = self.under_way()
        if call is not None and (self.observes or not call.whole):
            groups = query.shape[1] // key.shape[1]  # grouped-query attention, in EXAONE's tower
            if groups > 1:
                key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            call.state.seen.append((query, key, value, scaling))

    def leave_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After block ``number``: ask the policies about each tile, and cut."""
        call = self.under_way()
        if call is None:
            return None
        state: PackedState = call.state
        call.tower_tokens.append(max(tile.count for tile in state.tiles))
        call.tower_keeps.append([Keep(tile.units[None]) for tile in state.tiles])
        if not state.seen:
            return None
        query, key, value = (
            torch.cat(parts, 2) for parts in zip(*(seen[:3] for seen in state.seen), strict=True)
        )
        scaling = state.seen[0][3]
        state.seen = []
        if not self.asked[number]:
            state.earlier[number] = query, key, value, scaling
            return None
        earlier, state.earlier = state.earlier, {}
        kept, begin = [], 0
        for i, tile in enumerate(state.tiles):
            rows, end = tile.raster_rows, begin + tile.count

            def of_tile(
                seen: Seen, begin: int = begin, end: int = end, rows: torch.Tensor | None = rows
            ) -> AttentionView:
                q, k, v = (pick(x[:, :, begin:end], rows, 2) for x in seen[:3])
                return AttentionView(q, k, v, seen[3], has_cls=False)

            view = self._view(
                number, call, i, output[None, begin:end], rows, of_tile((query, key, value, scaling))
            )
            view.earlier = {layer: of_tile(seen) for layer, seen in earlier.items()}
            mine = output[begin:end]
            for keep in self.ask_layer(number, view, call.targets[i] == call.units[i]):
                mine = mine[self._cut(tile, keep, rows)] + stream.overflow(view.hidden)[0]
            kept.append(mine)
            begin = end
        if sum(map(len, kept)) == len(output):
            return None
        state.fitted = {}
        return torch.cat(kept)

    def _view(
        self,
        number: int,
        call: EncodeCall,
        i: int,
        hidden: torch.Tensor,
        rows: torch.Tensor | None,
        attention: AttentionView,
    ) -> TowerView:
        tile, grid = call.state.tiles[i], call.grids[i]
        slots, units, scale = None, tile.units[None], 1
        if self.single_patches:
            units, scale = (tile.alive - tile.begin)[None], self.tower.merge**2
        else:
            slots = torch.arange(tile.count, device=hidden.device).view(1, -1, self.group)
        return TowerView(
            layer=number,
            feature_layer=self.tower.feature_layer,
            target=call.targets[i] * scale,
            grid=grid,
            units=units,
            hidden=pick(hidden, rows, 1),
            attention=attention,
            slots=slots,
            pixels=call.state.picture(i),
            carry=tile.carry,
        )

    def _cut(self, tile: Tile, keep: Keep, rows: torch.Tensor | None) -> torch.Tensor:
        """Keep the chosen units of a tile; returns the rows of its patches that stay, ascending."""
        if keep.rows is not None:
            raise ValueError("a packed tower's patches can be dropped between its blocks, but not merged")
        index = stream.grouped(keep.index[0], self.group)
        if rows is not None:
            index = rows[index].sort().values
        tile.carry = {name: x.gather(1, keep.index) for name, x in tile.carry.items()}
        tile.alive = tile.alive[index]
        return index

    def leave_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The encode call ends here, attached to the output object."""
        call = self.leaves()
        if call is None:
            return
        self.forget()
        if output is None:  # an exception is propagating
            return
        state: PackedState = call.state
        if state.shortened:
            hidden = output.last_hidden_state
            if len(hidden) == len(state.alive):
                opened = stream.open_holes(hidden[None], state.alive[None], state.patches, None)
                output.last_hidden_state = opened[0]
        if sum(tile.count for tile in state.tiles) < sum(call.units) * self.tower.merge**2:
            call.keeps = [Keep(tile.units[None]) for tile in state.tiles]
            if not state.shortened:  # the tower saw smaller images, and stock code made all their tokens
                self._enlarge(call, output)
        call.carry, call.state = self._carried(call), None
        call.record_tower(partial(lengths, state.segments), partial(lengths, state.segments_dense))
        let_ride(output, call)
        self.end(call)

    def _enlarge(self, call: EncodeCall, output: Any) -> None:
        """Spread the tokens of smaller images over their placeholders in the prompt."""
        ends = [0, *accumulate(call.units)]
        places = torch.cat([n + tile.units for n, tile in zip(ends, call.state.tiles, strict=False)])

        def spread(rows: torch.Tensor) -> torch.Tensor:
            return stream.open_holes(rows[None], places[None], ends[-1], None)[0]

        output.pooler_output = spread(output.pooler_output)
        if self.tower.deepstack:
            output.deepstack_features = [spread(rows) for rows in output.deepstack_features]

    def _carried(self, call: EncodeCall) -> dict[str, torch.Tensor]:
        """What policies left per unit, laid out as the language model's rows: ``(rows of all tiles,)``."""
        carried: dict[str, torch.Tensor] = {}
        if self.single_patches:
            return carried
        for name in {name for tile in call.state.tiles for name in tile.carry}:
            parts = []
            for tile, units in zip(call.state.tiles, call.units, strict=True):
                full = torch.zeros(units, device=call.pixels.device)
                if name in tile.carry:
                    x = tile.carry[name][0]
                    full = x.new_zeros(units).scatter(0, tile.units, x)
                parts.append(full)
            carried[name] = torch.cat(parts)
        return carried
