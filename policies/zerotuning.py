"""ZeroTuning: scale the attention to the initial token (Han et al., ICLR 2026, arXiv 2505.11739).

Follows the released ``modelling_llama.py``: the scaled row is normalised again, at every layer and head, or at some.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Policy
from .attention_rows import all_rows, first_key, real_rows, rewrite_rows
from .settings import check_number

if TYPE_CHECKING:
    from ..contract.views import ModulateView


@dataclass(frozen=True)
class ZeroTuning(Policy):
    """ZeroTuning, on the attention logits of every row (modulate stage).

    The initial token of a prompt is a sink: it takes attention that has no other target. Its share ``a`` becomes
    ``gamma a / (1 + (gamma - 1) a)``, and all other shares change accordingly, so less than 1 sharpens attention to
    them and more than 1 flattens it. That is the same as adding ``ln gamma`` to one logit.

    The paper searches for the heads that need more or less, and for ``gamma``, on labelled samples or by the entropy of
    answers. That search is up to you, and the defaults here are not a published setting. Made for text; here prompts
    without an image are unchanged. The whole attention of a layer is computed again, in blocks of rows.

    Attributes:
        gamma: factor for the initial token's attention, before the row is normalised again.
        layers: decoder layers to act in, 0-based; ``None`` is all layers.
        heads: heads to act on in each of these layers; ``None`` is all heads.
    """

    name: ClassVar[str] = "zerotuning"
    stages: ClassVar[tuple[str, ...]] = ("modulate",)
    modulates: ClassVar[Literal["logits", "probabilities", "outputs"]] = "logits"

    gamma: float = 0.6
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "heads"):
            given = getattr(self, name)
            if given is None:
                continue
            object.__setattr__(self, name, tuple(given))  # configuration files have lists
            if not given or min(given) < 0:
                raise ValueError(f"{name}={given}: choose 0-based numbers, such as (0, 1, 2), or None")
        check_number(self, gamma=(1e-6, 1e6))

    def modulate_layers(self, depth: int) -> Collection[int]:
        """``layers``, or all. Raises ValueError for a layer that does not exist."""
        if self.layers is not None and max(self.layers) >= depth:
            raise ValueError(f"layers={self.layers}: the language model has {depth} layers")
        return range(depth) if self.layers is None else self.layers

    def modulate(self, view: ModulateView) -> torch.Tensor:
        """Recompute all rows with the first key's logit shifted.

        Raises:
            ValueError: ``heads`` names a head that the layer does not have.
        """
        heads = view.query.shape[1]
        if self.heads is not None and max(self.heads) >= heads:
            raise ValueError(f"heads={self.heads}: the language model has {heads} attention heads")
        chosen = view.query.new_zeros(heads, dtype=torch.bool)
        chosen[slice(None) if self.heads is None else list(self.heads)] = True
        first = torch.nn.functional.one_hot(first_key(view), view.key.shape[2]).bool()
        shift = math.log(self.gamma) * (first & view.visual.any(-1, keepdim=True)).float()

        def edit(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return logits + shift[:, None, None] * chosen[:, None, None]

        changed, real = chosen & (self.gamma != 1), real_rows(view)
        output = rewrite_rows(
            view,
            all_rows(view),
            [*view.logit_edits, edit],
            lambda probabilities, rows: (probabilities, changed[:, None] & real.gather(1, rows)[:, None]),
        )
        view.logit_edits.append(edit)
        return output
