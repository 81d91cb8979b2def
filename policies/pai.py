"""PAI: pay attention to the image, and less to what the text alone says (Liu et al., ECCV 2024, arXiv 2407.21771).

Follows the released ``attention.py`` (which logits are lifted) and ``CFG.py`` (how the two passes are contrasted).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Policy
from .contrast import contrasted, implausible
from .paint import lift_rows, lifted_layers
from .settings import check_choice, check_number

if TYPE_CHECKING:
    from ..contract.views import GuideView, ModulateView


@dataclass(frozen=True)
class PAI(Policy):
    """PAI, on attention logits of the row that predicts the next token, and on the logits (modulate and guide stage).

    All visual tokens are lifted equally, by all heads of the layers from ``first_layer`` on. A second pass over the
    prompt without its images, with a separate KV cache, gives the logits of the text alone, which are subtracted.
    Decoding takes two forwards per token; the second has a short sequence.

    Attributes:
        alpha: gain of visual tokens; the released commands have 0.2 for LLaVA-1.5.
        gamma: weight of the pass with images, 1 switches the contrast off; the released commands have 1.1, the released
            evaluation of CHAIR has 2 by default.
        beta: tokens less than ``beta`` times as likely as the likeliest are excluded; the released code has 0.1.
        first_layer: first decoder layer (0-based) to lift in; ``None`` is the paper's 2, or the last one in models with
            fewer than three layers.
        end_layer: the decoder layer after the last lifted one; ``None`` lifts up to the last layer.
        boost_prefill: whether the first new token is affected too, as in the paper. With both parts switched on, as in
            its commands, the released code skips it.
    """

    name: ClassVar[str] = "pai"
    stages: ClassVar[tuple[str, ...]] = ("modulate", "guide")
    modulates: ClassVar[Literal["logits", "probabilities", "outputs"]] = "logits"
    second_pass: ClassVar[Literal["image", "text"] | None] = "text"

    alpha: float = 0.2
    gamma: float = 1.1
    beta: float = 0.1
    first_layer: int | None = None
    end_layer: int | None = None
    boost_prefill: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, alpha=(0, 1), gamma=(1, 100), beta=(0, 1))
        check_number(self, optional=True, first_layer=(0, 1000), end_layer=(1, 1000))
        check_choice(self, boost_prefill=(True, False))

    def modulate_layers(self, depth: int) -> Collection[int]:
        """Layers ``first_layer`` to ``end_layer``. Raises ValueError where the model has none of them."""
        return lifted_layers(depth, self.first_layer, self.end_layer)

    def modulate(self, view: ModulateView) -> torch.Tensor | None:
        """Recompute the rows that predict new tokens, with visual tokens lifted."""
        return lift_rows(view, self.alpha * view.visual.float(), self.boost_prefill)

    def guide(self, view: GuideView) -> torch.Tensor:
        """The contrast of both passes; the released code's differs by a constant per row, which changes no choice."""
        if view.second is None:
            raise RuntimeError("pai compares with a second pass, but was not given it")
        new = contrasted(view.logits, view.second, self.gamma - 1)
        return new.masked_fill(implausible(view.logits, self.beta), -torch.inf)
