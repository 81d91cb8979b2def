"""The encode stage: pruning inside the vision tower, after it, and around the projector.

Hooks on the tower's layers ask the policy and cut the hidden states; the hook on the tower's output re-opens the
holes, so that stock code between tower and projector sees a full grid; the hooks on the projector make it compute
live rows only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..call import stream
from ..call.assembly import read_packing
from ..call.encode_call import EncodeCall, Offer, current_encoding, let_ride
from ..call.flops import tower_flops
from ..call.forward_call import check_rows
from ..call.timing import Stopwatch
from ..composition import Composition
from ..contract.anatomy import Tower
from ..contract.policy import Keep, Policy
from ..contract.views import AttentionView, FeaturesView, TowerView
from ..errors import PruningError, UnsupportedCallError, UnsupportedModelError
from ..kernels import gather_rows, numbers, to_device
from ..sites import Site
from .fixed_state import TowerState
from .projection import Projection
from .shrink import grid_places, shrink
from .stage import EncodeStage, content_key

STILL = {"cuda": 60e9}
"""FLOPs of a tower layer up to which tokens are masked and not cut, by kind of device.

On an H200 the host takes about 480 us to launch a layer of CLIP-L/336, and the device 90 us to compute it for one image
(14.5 GFLOP): four images are computed in the time in which the host launches them.
"""


class Encoder(EncodeStage):
    """All hooks of the encode stage for one model and one policy.

    ``front`` is the part of the projector that takes units, if it is not the projector itself.

    Attributes:
        still: whether shapes are kept inside the tower whatever `STILL` says, as recording a call needs; ``None``
            leaves it to that rule.

    Raises:
        UnsupportedModelError: a policy asks of tower or projector what it cannot do.
    """

    still: bool | None = None

    def __init__(
        self,
        tower: Tower,
        projector: nn.Module,
        composition: Composition,
        session: Any,
        front: nn.Module | None = None,
    ):
        super().__init__(tower, projector, composition, session)
        self.tower, self.front = tower, front or projector
        for policy in self.policies:
            if tower.resizing is None and type(policy).tower_grid is not Policy.tower_grid:
                raise UnsupportedModelError(
                    f"{policy.name} shows the vision tower a smaller image, and that of {session.family} takes one "
                    "size only. Choose a policy that drops tokens, such as uniform, or pool, which averages them."
                )
            if policy.calls_projector and front is not None:
                raise UnsupportedModelError(
                    f"{policy.name} calls the projector on features of its own, and that of {session.family} also "
                    "puts patches together. Choose a policy that chooses among features, such as divprune."
                )

    def install(self, handles: list[Any]) -> None:
        """Register hooks and attention sites; what must be undone goes to ``handles`` and `sites` at once."""
        module = self.tower.module
        handles.append(module.register_forward_pre_hook(self.enter_tower, with_kwargs=True))
        handles.append(module.register_forward_hook(self.leave_tower, always_call=True))
        asked = {number for number, policies in self.asked.items() if policies}
        built = range(len(self.tower.layers))
        for number in sorted({*asked, *self.tower.feature_layers} & {*built}):
            # before transformers' own hooks that collect hidden states: they must see the cut ones
            hook = partial(self.leave_layer, number)
            handles.append(self.tower.layers[number].register_forward_hook(hook, prepend=True))
        # from the first cut on, every layer must mask the fill of tiles that keep fewer tokens than others
        for number in range(min(self.asked, default=len(self.tower.layers)), len(self.tower.layers)):
            self.sites.append(Site(self.tower.attentions[number], number, self.see_attention))
        self._check_attention(UnsupportedModelError)
        handles.append(self.front.register_forward_pre_hook(self.enter_projector))
        handles.append(self.projector.register_forward_hook(self.leave_projector, always_call=True))

    # --- inside the tower ---

    def enter_tower(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin an encode call."""
        if not self.enters():
            return None
        self.check_recompute()
        self._check_attention(UnsupportedCallError)
        pixels: torch.Tensor = args[0] if args else kwargs["pixel_values"]
        under_way, merge = current_encoding(self.session), self.tower.merge
        arrangement = None if under_way is None else under_way.arrangement
        merge = merge if arrangement is None else merge * arrangement.merge
        patches = self.tower.patch_grid(*pixels.shape[-2:])
        grid = (patches[0] // merge, patches[1] // merge)
        count, images = grid[0] * grid[1], [1] * len(pixels) if arrangement is None else arrangement.images
        grids, targets = [grid] * len(pixels), self.tile_targets(count, images)
        call = EncodeCall(
            grids=grids,
            targets=targets,
            arrangement=arrangement,
            pixels=pixels,
            extra=int(self.tower.keeps_cls),
            stopwatch=Stopwatch(pixels.device),
            receipt=self.session.new_receipt(grids, targets),
        )
        if arrangement is not None:
            over_frames = self.over_frames and arrangement.frame_grid is not None
            call.packings = read_packing(arrangement, grid, self.shares_late or over_frames)
            self._check_late(call)
            if under_way is not None and under_way.forward is not None:
                check_rows(under_way.forward, [span.rows for span in call.spans])
        if not call.whole or self.observes:
            units = numbers(count, pixels.device).expand(len(pixels), -1)
            slots = None
            if merge > 1:
                slots = stream.unit_patches(patches, merge, pixels.device).expand(len(pixels), -1, -1)
            call.state = TowerState(patches, int(self.tower.has_cls), merge, units, slots)
            mask = kwargs.get(self.tower.patch_mask) if self.tower.patch_mask else None
            call.state.real = None if mask is None else mask.flatten(1)
        shapes = (policy.tower_grid(grid, targets[0]) for policy in self.policies if not call.whole)
        small = next((shape for shape in shapes if shape is not None), None)
        if small is not None and self.tower.resizing:
            self._check_at_hand()
        if call.state is not None and len(call.groups(list(range(call.tiles)))) == 1 and not any(call.late):
            call.still = self._keeps_shapes(pixels.device, call)
        self.begin(call)
        if small is None:
            return None
        pixels = self._shrink(call, small)
        kwargs = {**kwargs, **(self.tower.resizing or {})}
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})

    def _keeps_shapes(self, device: torch.device, call: EncodeCall) -> bool:
        """Whether policies whose counts depend on the image are to mask tokens in this tower instead of cutting them.

        Cutting waits for the device at each cut, and saves arithmetic; masking does neither. So it is better as long as
        the device computes a whole layer in less time than the host takes to launch one: `STILL`. A CPU waits for
        nothing.
        """
        if self.still is not None:
            return self.still
        tokens = call.units[0] * self.tower.merge**2 + int(self.tower.has_cls)
        layer = tower_flops(self.tower.width, self.tower.weights, [[tokens] * call.tiles])
        return layer <= STILL.get(device.type, 0)

    def _check_attention(self, error: type[PruningError]) -> None:
        """Raise if the layers' attention takes no key mask, which is needed where tiles keep different numbers."""
        if any(site.stock_config._attn_implementation == "flex_attention" for site in self.sites):
            raise error(
                f"The vision tower runs on flex attention, and {self.composition.name} acts between its layers, where "
                'tiles may keep different numbers of tokens: set_attn_implementation({"vision_config": "sdpa", '
                '"text_config": "flex_attention"}), or choose a policy that reads no attention of the tower, such as '
                "uniform."
            )

    def _check_at_hand(self) -> None:
        """Raise if position embeddings are offloaded, since stock code reads them without calling their module."""
        for name, weight in self.tower.module.named_parameters():
            if weight.is_meta and "position_embedding" in name:
                raise UnsupportedCallError(
                    f"The vision tower's {name} is offloaded, and stock code cannot interpolate it there, as smaller "
                    "images need. Give the vision tower a device in the device_map, or choose another policy."
                )

    def _shrink(self, call: EncodeCall, small: tuple[int, int]) -> torch.Tensor:
        """The image at the size that makes a ``small`` grid of units, and the state of the call that goes with it."""
        state: TowerState = call.state
        (height, width), merge, device = call.pixels.shape[-2:], state.merge, call.pixels.device
        (rows, columns), *_ = call.grids
        places = to_device(grid_places((rows, columns), small), device)
        state.units, state.real = places.expand(call.tiles, -1), None
        if state.slots is not None:
            slots = stream.unit_patches((small[0] * merge, small[1] * merge), merge, device)
            state.slots = slots.expand(call.tiles, -1, -1)
        return shrink(call.pixels, small[0] * height // rows, small[1] * width // columns)

    def _check_late(self, call: EncodeCall) -> None:
        """Raise if tokens must be chosen after assembly and the policy cannot do that."""
        unable = [p.name for p in self.policies if p.encodes and not p.late]
        if any(call.late) and not call.whole and unable:
            able = ", ".join(self.session.names_late())
            raise UnsupportedCallError(
                f"{unable[0]} chooses among the tokens of the vision tower, but the model resizes their grid "
                "afterwards (a large image, or a video), or all tiles of an image share one budget. Choose a policy "
                f"that can choose later ({able}), a smaller image, or a budget per tile."
            )

    def see_attention(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        """Record the inputs of a layer's attention until its policy is asked; mask the fill of ragged tiles."""
        state = self._state()
        if state is None:
            return None
        state.follow(query.device)
        valid = state.valid_tokens()
        if (asked := self.asked.get(layer)) is not None:
            seen = AttentionView(query, key, value, scaling, self.tower.has_cls, valid)
            if asked:
                state.attention = seen
            else:
                state.earlier[layer] = seen
        return valid if state.real is None or (valid is None and state.whole) else state.attended()

    def _state(self) -> TowerState | None:
        call = self.under_way()
        return call.state if call is not None else None

    def leave_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After layer ``number``: ask the policies of this layer, and cut."""
        call = self.under_way()
        if call is None:
            return None
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        state: TowerState | None = call.state
        if state is None:
            return None
        state.follow(hidden.device)
        call.pass_layers(number + 1, hidden.shape[1], [Keep(state.units, state.valid)])
        if state.attention is not None:
            hidden = self._ask(number, hidden, call, state, state.attention)
        if number in self.tower.feature_layers:
            state.consumed[number] = replace(state)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _ask(
        self, number: int, hidden: torch.Tensor, call: EncodeCall, state: TowerState, attention: AttentionView
    ) -> torch.Tensor:
        """Ask the policies about layer ``number``; returns its output without the units that they drop."""
        view = TowerView(
            layer=number,
            feature_layer=self.tower.feature_layer,
            target=max(call.targets),
            grid=call.grids[0],
            units=state.units,
            hidden=hidden[:, int(self.tower.has_cls) :],
            attention=attention,
            slots=state.slots,
            valid=state.valid,
            pixels=call.pixels.to(hidden.device),
            carry=state.carry,
            earlier=state.earlier,
            still=call.still,
        )
        state.attention, state.earlier = None, {}
        for keep in self._answers(number, view, call):
            spared = keep.sparing(call.late, state.units.shape[1])
            if spared is not None:
                call.masked |= spared.still
                hidden = state.cut(hidden, spared)
                if not spared.still:  # what is masked goes on, and is seen at the next cut
                    hidden = hidden + stream.overflow(view.hidden)
        return hidden

    def _answers(self, number: int, view: TowerView, call: EncodeCall) -> list[Keep]:
        """What the policies answer; they are asked about tiles with the same target together."""
        groups, units = call.groups(list(range(call.tiles))), call.units[0]
        if len(groups) == 1:
            return self.ask_layer(number, view, call.whole)
        parts, carry = [], dict(view.carry)
        for target, tiles in groups.items():
            chosen = to_device(tiles, view.hidden.device)
            some = view.of(chosen, target)
            parts += [(chosen, keep) for keep in self.ask_layer(number, some, target == units)]
            for name, x in some.carry.items():  # 0 for tiles for which a policy notes nothing
                carry[name] = carry.get(name, x.new_zeros(view.units.shape)).index_copy(0, chosen, x)
        view.carry.update(carry)
        return [Keep.joined(parts, view.hidden, view.units.shape[1])] if parts else []

    def leave_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Re-open the holes in the consumed features, and attach the call to the output object."""
        call = self.leaves()
        if call is None:
            return
        if output is None:  # an exception is propagating
            self.forget()
            return
        state: TowerState | None = call.state
        let_ride(output, call)
        computed = None if state is None else [Keep(state.units, state.valid)]
        call.pass_layers(len(self.tower.layers), output.last_hidden_state.shape[1], computed)
        if state is not None:
            # again after the projector, where policies may merge
            call.carry = state.carried(call.units[0], call.extra)
        if state is None or (state.valid is None and state.units.numel() == sum(call.units)):
            return
        call.keeps = [Keep(state.units, state.valid)]
        hidden_states = list(getattr(output, "hidden_states", None) or ())
        for layer, then in state.consumed.items():
            if hidden_states and hidden_states[layer + 1] is not None:
                hidden_states[layer + 1] = then.reopen(hidden_states[layer + 1])
            if layer + 1 == len(self.tower.layers):
                output.last_hidden_state = then.reopen(output.last_hidden_state)
        if hidden_states:
            output.hidden_states = tuple(hidden_states)

    # --- around the projector ---

    def enter_projector(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Ask the policies that choose after the tower; pass the projector the live rows only."""
        call = self.under_way()
        if call is None:
            return None
        features: torch.Tensor = args[0]
        if features.dim() == 4:  # units on their grid
            features = features.flatten(1, 2)
        if (entry := self.composition.entry) is not None and entry.reads_tower:
            call.entering = features[:, call.extra :]
        rows = self._choose(call, features, after_projector=False)
        if call.keeps is None:
            return None
        index, valid = self._rows(call.keeps[0], features.device)
        if rows is None:  # chosen in the tower
            rows = gather_rows(features, index, valid)
        elif valid is not None:
            rows = rows.masked_fill(~valid[..., None], 0)
        return (rows, *args[1:])

    def _choose(self, call: EncodeCall, features: torch.Tensor, after_projector: bool) -> torch.Tensor | None:
        """Ask the policies that choose at this side of the projector.

        Returns the rows that they keep, CLS first where the language model gets it; ``None`` if none chooses here.
        """
        state: TowerState | None = call.state
        if call.keeps is not None or state is None or call.whole:
            return None
        late, cls, features = call.late, features[:, : call.extra], features[:, call.extra :]
        sizes = zip(late, call.targets, call.units, strict=True)
        early = [i for i, (is_late, target, units) in enumerate(sizes) if not is_late and target < units]
        if not early:
            return None
        state.follow(features.device)
        pixels, groups = call.pixels.to(features.device), call.groups(early)
        view = FeaturesView(
            features,
            call.grids[0],
            max(groups),
            content_key(pixels),
            pixels,
            dict(state.carry),
            None if after_projector else Projection(self.projector),
        )
        if len(early) == call.tiles and len(groups) == 1:
            keep = self.ask_final(view, after_projector)
        else:
            parts = []
            for target, tiles in groups.items():
                chosen = to_device(tiles, features.device)
                if (part := self.ask_final(view.of(chosen, target), after_projector)) is not None:
                    parts.append((chosen, part))
            keep = Keep.joined(parts, features, features.shape[1]) if parts else None
        if keep is None:
            return None
        call.keeps = [keep]
        rows = gather_rows(features, keep.index) if keep.rows is None else keep.rows
        rows = rows + stream.overflow(features)
        return torch.cat([cls, rows], 1) if call.extra else rows

    def _rows(self, keep: Keep, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of the features that a `Keep` selects, including CLS where the language model gets it."""
        index, valid = keep.index.to(device), None if keep.valid is None else keep.valid.to(device)
        if not self.tower.keeps_cls:
            return index, valid
        if valid is not None:
            valid = torch.nn.functional.pad(valid, (1, 0), value=True)
        return torch.nn.functional.pad(index + 1, (1, 0), value=0), valid

    def _offer(self, call: EncodeCall, output: torch.Tensor) -> None:
        """Offer the projected features to the decoder's entry, tiles with the same target together."""
        keys, units = content_key(call.pixels), call.units[0]
        carry = {} if call.state is None else call.state.carry
        early = [tile for tile, late in enumerate(call.late) if not late]
        rows, images = call.unit_rows()
        for target, tiles in call.groups(early).items():
            if target >= units:
                continue
            some = to_device(tiles, output.device)
            call.offers.append(
                Offer(
                    features=output.index_select(0, some)[:, call.extra :],
                    rows=rows[tiles].to(output.device, non_blocking=True),
                    spans=[images[tile] for tile in tiles],
                    grid=call.grids[0],
                    target=target,
                    content_key=keys.to(output.device)[some],
                    carry={name: x.to(output.device)[some] for name, x in carry.items()},
                    tower=None if call.entering is None else call.entering.to(output.device)[some],
                )
            )

    def leave_projector(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor | None) -> Any:
        """Re-open the holes after the projector; the encode call ends here."""
        call = self.under_way()
        if call is None:
            return None
        if call.arrangement is None or output is None:
            self.forget()
        if output is None:
            return None
        if output.dim() == 4:
            output = output.flatten(1, 2)
        rows = self._choose(call, output, after_projector=True)
        if self.composition.entry is not None:
            self._offer(call, output)
        if call.state is not None:
            call.carry, call.state = call.state.carried(call.units[0], call.extra), None
        segments = [[tokens] * call.tiles for tokens in call.tower_tokens]
        call.receipt.tower_masked = call.masked
        call.record_tower(lambda: segments, lambda: segments[:1] * len(segments))
        if call.arrangement is None:  # otherwise `assembler.Assembler` ends the call
            self.end(call)
        if call.keeps is None:
            return None
        index, valid = self._rows(call.keeps[0], output.device)
        return stream.open_holes(output if rows is None else rows, index, call.rows[0], valid)
