"""Feature methods of a pruned model: the tower prunes while one runs; and tokens that are chosen after assembly.

Tokens are chosen *late*, after assembly, where the stock code resizes the grid, so that its tokens are not the
tower's any more, or where all tiles of an image share one budget. A newline whose line of tokens is all gone goes too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..call import stream
from ..call.assembly import Group, Packing
from ..call.encode_call import RIDE, EncodeCall, Encoding, Offer, encoding, let_ride
from ..call.forward_call import ForwardCall, current_forward
from ..capture.device import NotCapturable
from ..contract.anatomy import FeatureCall
from ..contract.policy import Keep
from ..contract.views import FeaturesView
from .captured import CapturedTower
from .stage import EncodeStage, content_key

FEATURE_METHODS = ("get_image_features", "get_video_features")
"""transformers' names for the methods of a base module that turn pixels into features."""


class FeatureMethod:
    """Replaces one feature method of a model's base module until `remove` is called."""

    def __init__(self, base: Any, method: str, encoder: EncodeStage):
        self.base, self.method, self.encoder = base, method, encoder
        # generate reads the signature to find the method's arguments
        self.__signature__ = inspect.signature(getattr(base, method))
        object.__setattr__(base, method, self)

    def remove(self) -> None:
        """Give the module its own method back."""
        object.__delattr__(self.base, self.method)

    @property
    def stock(self) -> Callable[..., Any]:
        """The method itself."""
        return partial(getattr(type(self.base), self.method), self.base)

    def _forward(self) -> ForwardCall | None:
        """The forward that calls the method, if any: not just any forward that encloses the call."""
        caller = sys._getframe(2).f_locals.get("self")
        return current_forward(self.encoder.session) if caller is self.base else None

    def note(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let ``output`` tell what it was made of; returns it."""
        call: EncodeCall | None = getattr(output, RIDE, None)
        if call is not None:
            given = self.__signature__.bind(*args, **kwargs).arguments
            call.asked = self.method, {**given.pop("kwargs", {}), **given}
        return output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock method returns, with holes where tokens are dropped."""
        with encoding(self.encoder.session, forward=self._forward()) as under_way:
            output = self._compute(under_way, args, kwargs)
            # where the tower is a part of the stock one (Ovis2), its output is not the one that travels on
            if under_way.ended is not None and isinstance(output, ModelOutput) and not hasattr(output, RIDE):
                let_ride(output, under_way.ended)
            return self.note(output, args, kwargs)

    def _compute(self, under_way: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the stock method returns, computed by a graph if the model captures its calls and this one can be."""
        capture = self.encoder.capture
        if isinstance(capture, CapturedTower):
            try:
                given = self.__signature__.bind(*args, **kwargs).arguments
                given = {**given.pop("kwargs", {}), **given}
                output, call = capture.run(self.method, self.stock, given, under_way)
            except NotCapturable as reason:
                under_way.captured = f"eager: {reason}"
            else:
                under_way.captured = "captured"
                if under_way.arrangement is None:
                    self.encoder.end(call)
                return output
        elif capture is not None:
            under_way.captured = f"eager: {capture}"
        return self.stock(*args, **kwargs)


class Assembler(FeatureMethod):
    """Replaces a feature method that assembles tiles into images."""

    def __init__(self, base: Any, feature: FeatureCall, encoder: EncodeStage):
        super().__init__(base, feature.method, encoder)
        self.feature = feature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock method returns, with holes where tokens are dropped."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        arrangement = self.feature.arrange({**given.pop("kwargs", {}), **given})
        with encoding(self.encoder.session, arrangement, self._forward()) as under_way:
            output = self._compute(under_way, args, kwargs)
            call = under_way.call
            if call is None:
                raise RuntimeError(f"{self.method} did not go through the vision tower and the projector")
            as_tuple = isinstance(output, tuple)  # return_dict=False
            features = output[1] if as_tuple else output.pooler_output
            pairs = zip(features, call.packings, strict=True)
            rows: Any = self._finish(call, [_rows(x, len(packing.source)) for x, packing in pairs])
            rows = [
                x[: like[..., 0].numel()].view(like.shape) for x, like in zip(rows, features, strict=True)
            ]
            self.encoder.end(call)
        rows = torch.stack(rows) if isinstance(features, torch.Tensor) else rows
        if as_tuple:
            return (output[0], rows, *output[2:])
        output.pooler_output = rows
        return self.note(output, args, kwargs)

    def _finish(self, call: EncodeCall, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Choose late, drop newlines, fill in the receipt; returns features ``(rows, channels)`` with all holes."""
        keys, carry = content_key(call.pixels), self._packed_carry(call)
        keeps: list[Keep] = []
        targets: list[int] = []
        for i, packing in enumerate(call.packings):
            rows, real = features[i], ~packing.newline.to(features[i].device)
            alive = real & ~stream.find_holes(rows) if call.keeps is not None else real
            if packing.late and not call.whole:
                notes = {name: x[i] for name, x in carry.items()}
                rows, alive = self._choose(
                    packing, rows, notes, keys[packing.tiles.start : packing.tiles.stop]
                )
            if self.encoder.composition.entry is not None and packing.late and not call.whole:
                self._offer(call, i, rows, keys[packing.tiles.start : packing.tiles.stop], carry)
            keeps += packing.kept(alive)
            targets += self._targets(call, packing)
            if not call.whole:
                if not any(policy.drops_newlines for policy in self.encoder.policies):
                    alive = alive | packing.ends_line(alive)
                rows = stream.punch(rows, alive)
            features[i] = rows
        call.carry = {name: torch.cat(x) for name, x in carry.items()}
        grids = [grid for packing in call.packings for grid in packing.grids]
        call.receipt.keeps, call.receipt.grids, call.receipt.targets = keeps, grids, targets
        return features

    def _packed_carry(self, call: EncodeCall) -> dict[str, list[torch.Tensor]]:
        """What policies left for each unit, assembled as the features are; 0 at newlines."""
        if call.arrangement is None:
            return {}
        packed = {}
        for name, x in call.carry.items():
            flags = x.dtype == torch.bool  # a resized flag is set where most of its weight comes from ones
            tiles = (x.float() if flags else x).view(call.tiles, -1, 1)
            arranged = [rows[:, 0] for rows in call.arrangement.pack(tiles, tiles.new_zeros(1))]
            packed[name] = [rows > 0.5 for rows in arranged] if flags else arranged
        return packed

    def _offer(
        self,
        call: EncodeCall,
        image: int,
        rows: torch.Tensor,
        keys: torch.Tensor,
        carry: dict[str, list[torch.Tensor]],
    ) -> None:
        """Offer the tokens of one image to the decoder's entry."""
        packing, tower = call.packings[image], None
        first = sum(len(p.source) for p in call.packings[:image])
        if call.entering is not None and call.arrangement is not None:
            entering = call.entering
            tower = call.arrangement.pack(entering, entering.new_zeros(entering.shape[-1]))[image]
        for number, group in enumerate(packing.choices):
            places = group.rows.to(rows.device)
            target = self._target(packing, group)
            if target >= places.shape[1]:
                continue
            call.offers.append(
                Offer(
                    features=rows[places],
                    rows=places + first,
                    spans=[image] * len(places),
                    grid=group.grid,
                    target=target,
                    content_key=_member_keys(keys, len(places), number),
                    carry={name: x[image][places] for name, x in carry.items()},
                    tower=None if tower is None else tower[places.to(tower.device)],
                )
            )

    def _choose(
        self, packing: Packing, rows: torch.Tensor, carry: dict[str, torch.Tensor], keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the policies about one image; returns its rows, merged ones in place, and which stay."""
        alive = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for number, group in enumerate(packing.choices):
            places = group.rows.to(rows.device)
            key = _member_keys(keys, len(places), number)
            view = FeaturesView(
                features=rows[places],
                grid=group.grid,
                target=self._target(packing, group),
                content_key=key,
                pixels=None,
                carry={name: x[places] for name, x in carry.items()},
                frames=group.frames,
            )
            keep = self.encoder.ask_final(view)
            if keep is None:
                alive[places.flatten()] = True
                continue
            index = places.gather(1, keep.index)
            chosen = torch.ones_like(index, dtype=torch.bool) if keep.valid is None else keep.valid
            alive[index.flatten()] = chosen.flatten()
            if keep.rows is not None:
                rows = rows.index_copy(0, index.flatten(), keep.rows.flatten(0, 1).to(rows.dtype))
            overflow = stream.overflow(view.features).expand(*places.shape, rows.shape[1])
            rows = rows.index_add(0, places.flatten(), overflow.flatten(0, 1))
        return rows, alive

    def _target(self, packing: Packing, group: Group) -> int:
        """Tokens wanted of each member of a group."""
        count = group.rows.shape[1]
        if self.encoder.shares_late:
            return self.encoder.budget.units(count)
        if packing.joint:  # frames, which have a budget each and share them
            return self.encoder.budget.units(count // group.frames) * group.frames
        return self.encoder.budget.units(count, group.tiles)

    def _targets(self, call: EncodeCall, packing: Packing) -> list[int]:
        """Tokens wanted of each grid in the receipt."""
        if not packing.resized:
            return call.targets[packing.tiles.start : packing.tiles.stop]
        if not packing.joint:
            return [self._target(packing, group) for group in packing.groups for _ in group.rows]
        (group,) = packing.choices  # they compete for it: each gets a share in proportion to its tokens
        share = self._target(packing, group) / group.rows.shape[1]
        return [max(1, round(rows * columns * share)) for rows, columns in packing.grids]


def _rows(features: torch.Tensor, count: int) -> torch.Tensor:
    """Features of an image or a video as ``(count, channels)``.

    Those of one video may come frame by frame (transformers 5.19), and a newline may be added later (5.4).
    """
    rows = features.flatten(0, -2)
    missing = count - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _member_keys(keys: torch.Tensor, members: int, group: int) -> torch.Tensor:
    """Content keys ``(members,)`` of a group's members, from the ``keys`` of an image's tiles."""
    if members == len(keys):
        return keys
    # a member of several tiles: their contents in order, offset from the previous group
    weight = torch.arange(len(keys), device=keys.device) * 2 + 1
    return (keys * weight).sum(0, keepdim=True) + group
