"""What a policy may look at. The engine fills these in; everything costly in them is computed when first asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class AttentionView:
    """What one attention call of a vision layer computed with.

    ``query``, ``key``, ``value`` are ``(batch, heads, tokens, head_dim)``; token 0 is CLS where ``has_cls``.
    ``valid`` ``(batch, tokens)`` marks real tokens in a ragged batch, ``None`` if all are.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    has_cls: bool
    valid: torch.Tensor | None = None


@dataclass
class TowerView:
    """The state of the vision tower after one of its layers, for a batch of tiles.

    A *unit* is what becomes one token of the language model: one patch for LLaVA, a 2x2 cell of patches where a
    pixel shuffle follows. ``units`` ``(batch, units)`` are the original numbers of those still alive.

    Attributes:
        layer: 0-based number of the layer that just ran.
        feature_layer: the layer whose output is consumed.
        target: units wanted in the end, per tile.
        attention: the layer's attention inputs.
        carry: tensors ``(batch, units)`` that the policy wants to find again at its next layer; the engine cuts them
            along with the tokens.
    """

    layer: int
    feature_layer: int
    target: int
    units: torch.Tensor
    attention: AttentionView
    slots: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    carry: dict[str, torch.Tensor] = field(default_factory=dict)

    def per_unit(self, per_patch: torch.Tensor) -> torch.Tensor:
        """Sum a quantity ``(batch, patches)`` over the patches of each unit: ``(batch, units)``.

        ``slots`` ``(batch, units, patches_per_unit)`` says where they stand; ``None`` means one patch per unit.
        """
        if self.slots is None:
            return per_patch
        return per_patch.gather(1, self.slots.flatten(1)).view(self.slots.shape).sum(-1)


@dataclass
class FeaturesView:
    """The features about to enter the projector, or just out of it.

    Attributes:
        features: ``(batch, units, channels)``, one row per token of the language model, in raster order.
        grid: rows and columns of a tile's units.
        target: units wanted, per tile.
        content_key: ``(batch,)`` int64, a number that depends on a tile's pixels alone.
        pixels: ``(batch, 3, height, width)``, the normalised input of the tower.
        carry: what the policy left in `TowerView.carry`.
    """

    features: torch.Tensor
    grid: tuple[int, int]
    target: int
    content_key: torch.Tensor
    pixels: torch.Tensor
    carry: dict[str, torch.Tensor]
