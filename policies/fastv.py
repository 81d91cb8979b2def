"""FastV: half of the image is enough after layer 2 (Chen et al., ECCV 2024, arXiv 2403.06764).

Follows the released ``modeling_llama.py``: before decoder layer ``k`` visual tokens are ranked by the attention
that the prompt's last row paid them in the layer before. (The paper's text speaks of the mean over all rows; the
authors' code takes the last one.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..contract.policy import Place, Positions, ScorerPolicy
from .scores import attention_mass, last_row

if TYPE_CHECKING:
    from ..contract.views import PrefillView


@dataclass(frozen=True)
class FastV(ScorerPolicy):
    """FastV, inside the decoder (prefill stage), and the baseline of most of its successors.

    The released code drops a share R of the tokens; ``ratio=`` is 1 - R. It differs from this in that row 0 of a batch
    decides for all rows, and that the image must be at a configured position. Tokens dropped in prefill stay dropped,
    as in its KV-cache variant; the original ranks them again with every generated token.

    Attributes:
        k: decoder layers that see all visual tokens; the cut follows the last of them. The published settings are
            ``k=2`` and ``k=3``.
    """

    name: ClassVar[str] = "fastv"
    place: ClassVar[Place] = "layer"
    default_ratio: ClassVar[float] = 0.5

    positions: Positions = "original"
    k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"k={self.k!r}: choose a number of layers, 1 or more")

    def layer(self, depth: int) -> int:
        """The last of the first `k` layers."""
        if self.k > depth:
            raise ValueError(f"k={self.k}: this decoder has {depth} layers, choose 1 to {depth}")
        return self.k - 1

    def score(self, view: PrefillView) -> torch.Tensor:
        """The attention that the prompt's last row pays."""
        return attention_mass(view.recorded, last_row(view.valid, view.visual), width=1)[0]
