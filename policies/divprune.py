"""DivPrune: the most diverse tokens, by max-min distance (Alvar et al., CVPR 2025, arXiv 2503.02175).

Written from the paper (section 3: visual token pruning as a max-min diversity problem, solved greedily). Diversity
only: neither attention nor text is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..contract.policy import Keep, Place, SelectPolicy
from ..contract.views import FeaturesView
from .scores import cosine_distance


def max_min_diverse(distance: torch.Tensor, keep: int) -> torch.Tensor:
    """Repeatedly pick the token farthest from all picked so far: int64 ``(batch, keep)`` in picking order.

    The first one is the token whose nearest neighbour is farthest away. Ties go to the earliest. ``keep``
    steps, none of which waits for the device.

    Args:
        distance: ``(batch, units, units)``, symmetric.
        keep: tokens to pick, up to ``units``.
    """
    units = distance.shape[1]
    itself = torch.eye(units, dtype=torch.bool, device=distance.device)
    latest = distance.masked_fill(itself, torch.inf).amin(-1).argmax(-1, keepdim=True)
    # -inf stays through every minimum to come, so nothing is taken twice, duplicates of a token included
    rows = distance.masked_fill(itself, -torch.inf)
    taken, gap = [latest], None
    for _ in range(keep - 1):
        row = rows.gather(1, latest[..., None].expand(-1, -1, units)).squeeze(1)
        gap = row if gap is None else torch.minimum(gap, row)
        latest = gap.argmax(-1, keepdim=True)
        taken.append(latest)
    return torch.cat(taken, dim=1)


@dataclass(frozen=True)
class DivPrune(SelectPolicy):
    """DivPrune, after the projector (encode stage), by cosine distance. The budget applies to each tile separately.

    It differs from the released code in two points: distances are fp32 or better whatever the model's dtype; and a
    token is never picked twice. The released code can do so where only duplicates of picked tokens are left, and then
    keeps fewer tokens than requested.
    """

    name: ClassVar[str] = "divprune"
    place: ClassVar[Place] = "projected"
    default_ratio: ClassVar[float] = 0.098

    def select(self, view: FeaturesView) -> Keep:
        """The most diverse projected features, in their original order."""
        taken = max_min_diverse(cosine_distance(view.features.detach()), view.target)
        return Keep(taken.sort(dim=-1).values)
