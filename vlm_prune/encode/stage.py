"""What the encode stage shares across towers: which policies are asked where, and asking them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..call.encode_call import EncodeCall, current_encode, current_encoding
from ..call.receipt import TOWER_PART
from ..composition import Composition
from ..contract.anatomy import FeatureTower, PackedTower, Tower
from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView, TowerView
from ..errors import BudgetError, PolicyError, UnsupportedCallError
from ..sites import Site
from .captured import CapturedTower


class EncodeStage:
    """The policies of a composition that look at a tower, and the layers after which they do.

    Attributes:
        asked: the policies to ask after each tower layer. Where there are none, a later one wants to have seen it.
        observes: whether policies of later stages observe the tower without dropping anything in it.
        sites: attention sites to close when the model is unpruned.
        capture: what captures feature methods, or why nothing can; ``None`` if nothing is to.
    """

    def __init__(
        self,
        tower: Tower | PackedTower | FeatureTower,
        projector: nn.Module | None,
        composition: Composition,
        session: Any,
    ):
        self.projector: Any = projector  # None where the engine knows finished features only
        self.composition, self.session = composition, session
        self.policies, self.budget = composition.policies, composition.share(composition.encoder)
        self.layers, self.feature_layer = tower.layers, tower.feature_layer
        self.asked: dict[int, list[Policy]] = {}
        for policy in self.policies:
            for layer in policy.tower_layers(tower.feature_layer):
                if layer < len(tower.layers):
                    self.asked.setdefault(layer, []).append(policy)
        for policy in self.policies:
            for layer in policy.watched_layers(tower.feature_layer):
                if layer < len(tower.layers):
                    self.asked.setdefault(layer, [])
        self.observes = any(
            (p.enters or not p.encodes) and p.tower_layers(tower.feature_layer) for p in self.policies
        )
        self.sites: list[Site] = []
        self.capture: CapturedTower | str | None = None

    def under_way(self) -> EncodeCall | None:
        """The tiles being encoded for this model now, if any."""
        return current_encode(self.session)

    def begin(self, call: EncodeCall) -> None:
        """Encoding of tiles begins; only called where `enters`."""
        if (under_way := current_encoding(self.session)) is not None:
            under_way.call = call

    def enters(self) -> bool:
        """Whether the tower, now being called, should prune: not if it is called directly, or by another model."""
        under_way = current_encoding(self.session)
        if under_way is None:
            return False
        if under_way.call is not None or under_way.done:  # a hook calls a model that shares the tower
            under_way.nested += 1
            return False
        return True

    def leaves(self) -> EncodeCall | None:
        """The tiles that leave the tower; ``None`` if it ran for another caller."""
        under_way = current_encoding(self.session)
        if under_way is not None and under_way.nested:
            under_way.nested -= 1
            return None
        return self.under_way()

    def forget(self) -> None:
        """Encoding of the current tiles has ended, or failed."""
        if (under_way := current_encoding(self.session)) is not None:
            under_way.call, under_way.done = None, under_way.once

    @property
    def shares_late(self) -> bool:
        """Whether the tiles of an image compete for one budget, so that tokens are chosen when it is complete."""
        return self.budget.joint and not any(policy.per_image for policy in self.policies)

    @property
    def over_frames(self) -> bool:
        """Whether one choice is made among all frames of a video."""
        return any(policy.over_frames for policy in self.policies)

    @property
    def together(self) -> bool:
        """The same, whether the policy or the budget asks for it."""
        return self.over_frames or self.shares_late

    def frame_targets(self, units: list[int], media: list[int]) -> list[int]:
        """Units to keep of each tile, of its ``units``; ``media`` are the tiles of each image, frames of each video.

        Frames that compete for a budget have even parts of it, which add up to it.

        Raises:
            UnsupportedCallError: frames compete for a budget that belongs to a policy which sees them one by one.
        """
        owner, shared = self.composition.owner, self.composition.budget.joint
        shared = shared and max(media) > 1 and not any(policy.per_image for policy in self.policies)
        if shared and owner is not None and (self.sees_tiles(owner) or not owner.late):
            raise UnsupportedCallError(
                f'per="image": {owner.name} sees the frames of a video one by one, and these would have to share a '
                'budget. Give the budget per="tile", or choose a policy that decides after the tower, such as uniform '
                "or divprune."
            )
        if not self.shares_late:
            return [self.budget.units(count) for count in units]
        targets: list[int] = []
        for frames in media:
            share, rest = divmod(self.budget.units(sum(units[len(targets) : len(targets) + frames])), frames)
            targets += [share + (number < rest) for number in range(frames)]
        return targets

    def sees_tiles(self, policy: Policy) -> bool:
        """Whether a policy looks into the tower, or decides after the features are complete."""
        return bool(policy.tower_layers(self.feature_layer)) or policy.enters or not policy.encodes

    def check_shared(self) -> None:
        """Raise if tokens must be chosen among all tiles of an image and a policy cannot do that."""
        unable = [p.name for p in self.policies if p.encodes and not (p.enters or p.late)]
        if self.shares_late and self.budget.ratio != 1 and unable:
            able = ", ".join(self.session.names_late())
            raise BudgetError(
                f'per="image": {unable[0]} chooses among the tokens of the vision tower, tile by tile, and cannot '
                f'choose among those of a complete image. Give the budget per="tile", or choose a policy that can '
                f"({able})."
            )

    def tile_targets(self, available: int, images: list[int]) -> list[int]:
        """Units to keep of each tile, of ``available`` each; ``images`` are the tiles of each image.

        Tiles that compete for a budget get equal shares of it.
        """
        if not self.budget.joint:
            return [self.budget.units(available)] * sum(images)
        owner = next((policy for policy in self.policies if policy.per_image), None)

        def of_tile(tiles: int) -> int:
            target = self.budget.units(available * tiles)
            return owner.tile_target(target) if owner is not None else round(target / tiles)

        return [min(available, max(1, of_tile(tiles))) for tiles in images for _ in range(tiles)]

    def check_recompute(self) -> None:
        """Refuse to train a tower with cuts inside it whose layers run again in the backward pass."""
        cut = [self.layers[number] for number in self.asked]
        again = any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in cut)
        if again and torch.is_grad_enabled():
            raise UnsupportedCallError(
                "The vision tower has gradient checkpointing on, and this policy cuts tokens inside it: its layers "
                "would run again in the backward pass, without the cuts. Turn it off for the tower alone, by its own "
                "gradient_checkpointing_disable(), or put the tower in eval mode."
            )

    def ask_layer(self, number: int, view: TowerView, whole: bool) -> list[Keep]:
        """What the policies answer after layer ``number``. All see the layer as it was.

        In a composition, at most one policy drops units here. From a ``whole`` tile nothing is dropped: only observing
        policies are asked.
        """
        asked = [policy for policy in self.asked[number] if not (whole and policy.encodes)]
        with _exact(view.hidden):
            answers = [(policy, policy.encode(view)) for policy in asked]
        tiles, units = view.units.shape
        return [_answer(policy, keep, tiles, units) for policy, keep in answers if keep is not None]

    def end(self, call: EncodeCall) -> None:
        """The features of a call are complete: publish its receipt, and register it with its forward, if any."""
        under_way = current_encoding(self.session)
        if under_way is not None:
            under_way.ended = call
            if under_way.recording:
                return
            if under_way.captured is not None:
                call.receipt.captured[TOWER_PART] = under_way.captured
        self.session.publish(call.receipt)
        if under_way is not None and under_way.forward is not None:
            under_way.forward.add_encoded(call)

    def ask_final(self, view: FeaturesView, after_projector: bool | None = None) -> Keep | None:
        """The answer of the first policy that chooses at this side of the projector, or at either."""
        for policy in self.policies:
            if after_projector not in (None, policy.after_projector):
                continue
            with _exact(view.features):
                keep = policy.encode_final(view)
            if keep is not None:
                tiles, units, _ = view.features.shape
                return _answer(policy, keep, tiles, units, None if policy.exceeds else view.target)
        return None


def _answer(policy: Policy, keep: Any, tiles: int, units: int, most: int | None = None) -> Keep:
    """What a policy answers about ``tiles`` of ``units`` each, checked."""
    if not isinstance(keep, Keep):
        raise PolicyError(
            f"{policy.name} answers with a {type(keep).__name__}: a Keep, or None to keep all, is needed."
        )
    return keep.checked(policy.name, tiles, units, most)


def _exact(x: torch.Tensor) -> torch.autocast:
    """Autocast would lower the precision of a policy's scores."""
    return torch.autocast(x.device.type, enabled=False)


def content_key(pixels: torch.Tensor) -> torch.Tensor:
    """A number per tile that depends on its pixels alone: int64 ``(tiles,)``.

    The bits are summed as integers, so the result does not depend on the order of summation, nor on the batch.
    """
    bits = pixels.detach().float().contiguous().view(torch.int32)
    return bits.flatten(1).sum(-1, dtype=torch.int64)
