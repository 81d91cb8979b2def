"""ACT: attention calibration, less attention to sinks after the first token (Yu et al., ICML 2024, arXiv 2406.15765).

Follows the released ``llama_modelling_aug.py``, which finds a prompt's sinks by the mean attention that a key receives.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Policy
from .attention_rows import BLOCK, all_rows, first_key, real_rows, rewrite_rows, row_probabilities
from .settings import check_number

if TYPE_CHECKING:
    from ..contract.views import ModulateView


def calibrate(probabilities: torch.Tensor, sinks: torch.Tensor, kept: float) -> torch.Tensor:
    """Leave sinks the share ``kept`` of their attention, and give the rest to other keys in proportion to theirs.

    Both are ``(batch, heads, rows, keys)``, ``sinks`` bool and broadcast. A row with all of it on sinks is unchanged.
    Official: ``atten_process_eval``.
    """
    taken = (probabilities * sinks).sum(-1, keepdim=True)
    others = (probabilities * ~sinks).sum(-1, keepdim=True)  # not 1 - taken, which loses small values
    gain = 1 + (1 - kept) * taken / others.clamp(min=torch.finfo(probabilities.dtype).tiny)
    changed = probabilities * torch.where(sinks, kept, gain)
    return torch.where(others > 1e-20, changed, probabilities)


@dataclass(frozen=True)
class ACT(Policy):
    """ACT, on the attention probabilities of every row (modulate stage).

    A sink is a key, other than the prompt's first token, whose attention averages more than ``threshold`` over the rows
    of the prompt that see it; heads have different sinks. Sinks keep the share ``kept``, and the rest goes to all other
    keys in proportion to their attention. A generated token's row is handled separately, as in the released code.

    The paper first searches, head by head on a thousand samples, for the heads that gain by calibration, and leaves the
    others unchanged. For vision-language models these heads are not published, and the default here, calibrating all of
    them, is not what was measured. Made for text; here prompts without an image are unchanged. The whole attention of a
    layer is computed twice more, in blocks of rows.

    The released code assumes that the first sink is the first token; here the first token is excluded in any case.

    Attributes:
        threshold: mean attention of a sink; the released scripts have 0.1.
        kept: share of a sink's attention that it keeps; the released scripts have 0.4.
        heads: pairs of a decoder layer and a head (0-based) to calibrate; ``None`` is all heads of all layers but the
            first two and the last, among which the paper searches.
    """

    name: ClassVar[str] = "act"
    stages: ClassVar[tuple[str, ...]] = ("modulate",)
    modulates: ClassVar[Literal["logits", "probabilities", "outputs"]] = "probabilities"

    threshold: float = 0.1
    kept: float = 0.4
    heads: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, threshold=(0, 1), kept=(0, 1))
        if self.heads is not None:
            pairs = tuple(tuple(pair) for pair in self.heads)  # configuration files have lists
            if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
                raise ValueError(
                    f"heads={self.heads}: choose pairs of layer and head, such as ((2, 8), (2, 12)), or None"
                )
            object.__setattr__(self, "heads", pairs)

    def modulate_layers(self, depth: int) -> Collection[int]:
        """The layers of ``heads``. Raises ValueError for a layer that does not exist."""
        if self.heads is None:
            end = max(depth - 1, 1)
            return range(min(2, end - 1), end)
        if max(layer for layer, _ in self.heads) >= depth:
            raise ValueError(f"heads={self.heads}: the language model has {depth} layers")
        return {layer for layer, _ in self.heads}

    def modulate(self, view: ModulateView) -> torch.Tensor:
        """Find the sinks of a prompt, and recompute its rows without their full share.

        Raises:
            ValueError: ``heads`` names a head that the layer does not have.
        """
        chosen, real = self._heads(view), real_rows(view)
        first = torch.nn.functional.one_hot(first_key(view), view.key.shape[2]).bool()[:, None, None]
        whole = self._sinks(view) if view.prefill else None

        def change(probabilities: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sinks = probabilities > self.threshold
            if whole is not None:
                found, brings = whole[:, :, None], view.brings
                sinks = found if brings is None else torch.where(brings[:, None, None, None], found, sinks)
            new = calibrate(probabilities, sinks & ~first, self.kept)
            return new, chosen[:, None] & real.gather(1, rows)[:, None]

        return rewrite_rows(view, all_rows(view), view.logit_edits, change)

    def _heads(self, view: ModulateView) -> torch.Tensor:
        """The heads to calibrate in this layer: bool ``(heads,)``."""
        count = view.query.shape[1]
        if self.heads is None:
            return view.query.new_ones(count, dtype=torch.bool)
        mine = [head for layer, head in self.heads if layer == view.layer]
        if max(mine) >= count:
            raise ValueError(f"heads={self.heads}: the language model has {count} attention heads")
        chosen = view.query.new_zeros(count, dtype=torch.bool)
        chosen[mine] = True
        return chosen

    def _sinks(self, view: ModulateView) -> torch.Tensor:
        """Keys with more than ``threshold``, averaged over the rows that see them: bool ``(batch, heads, keys)``."""
        queries, keys = view.query.shape[2], view.key.shape[2]
        real = real_rows(view)
        total = view.query.new_zeros(*view.query.shape[:2], keys, dtype=torch.float32)
        for rows in all_rows(view).split(BLOCK, dim=1):
            probabilities = row_probabilities(view, rows, view.logit_edits)
            total = total + (probabilities * real.gather(1, rows)[:, None, :, None]).sum(2)
        seen_by = real.flip(-1).cumsum(-1).flip(-1)
        seen_by = torch.cat([seen_by[:, :1].expand(-1, keys - queries), seen_by], 1).clamp(min=1)
        return total / seen_by[:, None] > self.threshold
