"""VHR: reinforce the heads that the image changes (He et al., ACL 2025, arXiv 2412.13949).

A reconstruction from the paper's equations 4, 6 and 7 and its algorithm 1; the authors' code could not be obtained.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Policy
from .attention_rows import final_row
from .settings import check_choice, check_number

if TYPE_CHECKING:
    from ..contract.views import ModulateView


def head_divergence(with_image: torch.Tensor, without_image: torch.Tensor) -> torch.Tensor:
    """How much the image changes each head's output (VHD, Eq. 4): Euclidean distance, ``(batch, heads)``.

    Arguments are ``(batch, heads, head_dim)``, the last position's head outputs before ``o_proj``; the result is fp32
    or better, since squares of fp16 outputs overflow.
    """
    dtype = torch.promote_types(with_image.dtype, torch.float32)
    moved = with_image.to(dtype) - without_image.to(dtype)
    return moved.square().sum(-1).sqrt()


def text_activation(without_image: torch.Tensor) -> torch.Tensor:
    """Squared norm of each head's output ``(batch, heads, head_dim)`` without the image (TA): ``(batch, heads)``."""
    dtype = torch.promote_types(without_image.dtype, torch.float32)
    return without_image.to(dtype).square().sum(-1)


def surging_heads(divergence: torch.Tensor, activation: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Heads that respond to the missing image (Eq. 6): both figures exceed mean + std over the heads.

    ``divergence`` and ``activation`` are ``(batch, heads)``, as is the bool result. The paper does not say which
    standard deviation it means: ``unbiased`` divides by ``heads - 1``, otherwise by ``heads``.
    """

    correction = int(unbiased and divergence.shape[-1] > 1)

    def high(x: torch.Tensor) -> torch.Tensor:
        return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, correction=correction)

    return high(divergence) & high(activation)


def vision_aware_heads(
    with_image: torch.Tensor, without_image: torch.Tensor, drop_surging: bool = True, unbiased: bool = True
) -> torch.Tensor:
    """Heads whose divergence exceeds the median over the heads (Eq. 7): bool ``(batch, heads)``, at most half.

    Arguments as in `head_divergence`; ``drop_surging`` takes `surging_heads` out first.
    """
    divergence = head_divergence(with_image, without_image)
    if drop_surging:
        surging = surging_heads(divergence, text_activation(without_image), unbiased)
        divergence = divergence.masked_fill(surging, 0)
    return divergence > divergence.quantile(0.5, dim=-1, keepdim=True)


def reinforce(output: torch.Tensor, heads: torch.Tensor, alpha: float) -> torch.Tensor:
    """Multiply the outputs of ``heads`` (bool ``(batch, heads)``) by ``alpha``, in every row.

    ``output`` is ``(batch, queries, heads, head_dim)``, as is the result; other heads do not change by a bit.
    """
    return torch.where(heads[:, None, :, None], output * alpha, output)


@dataclass(frozen=True)
class VHR(Policy):
    """VHR, on head outputs before ``o_proj`` (modulate stage).

    One extra pass over the prompt without its image gives each head's output without the image. The half of the heads
    that the image changes most is reinforced, layer by layer, so later layers are measured with earlier ones
    reinforced. Heads are chosen once, at the end of the prompt, and keep their factor for the rest of the call; no
    attention map is needed.

    The paper leaves these points open: here the pass without the image is not reinforced; all rows of the prompt are
    scaled, not only the last, so that the cache is consistent; the distance is plain, the text activation squared.
    A sequence without visual tokens in a layer (none in the prompt, or dropped before) is unchanged there.

    Attributes:
        alpha: factor for the chosen heads. The paper has 2; at 4 its captions degenerate.
        layers: decoder layers to act in, 0-based; ``None`` is the paper's choice for LLaVA, the second layer and
            the last 14 of 32, and the same share of the last layers in models of another depth.
        drop_surging: apply the outlier rule.
        unbiased: standard deviation of the outlier rule, see `surging_heads`.
    """

    name: ClassVar[str] = "vhr"
    stages: ClassVar[tuple[str, ...]] = ("modulate",)
    needs_text_only: ClassVar[bool] = True
    modulates: ClassVar[Literal["logits", "probabilities", "outputs"]] = "outputs"

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    drop_surging: bool = True
    unbiased: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:  # configuration files have lists
            object.__setattr__(self, "layers", tuple(self.layers))
        check_number(self, alpha=(0, 100))
        check_choice(self, drop_surging=(True, False), unbiased=(True, False))
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(
                f"layers={self.layers}: choose 0-based decoder layers, such as (1, 18, 19), or None"
            )

    def modulate_layers(self, depth: int) -> Collection[int]:
        """``layers``, or the paper's choice scaled to ``depth``. Raises ValueError for a layer that does not exist."""
        if self.layers is None:
            return {min(1, depth - 1), *range(depth - round(depth * 14 / 32), depth)}
        if max(self.layers) >= depth:
            raise ValueError(f"layers={self.layers}: the language model has {depth} layers, 0 to {depth - 1}")
        return set(self.layers)

    def modulate(self, view: ModulateView) -> torch.Tensor | None:
        """Choose this layer's heads in the call with the image; reinforce them then and in every later call."""
        heads = view.state.get("vhr_heads")
        if view.prefill and view.text_only is not None:
            last = final_row(view)[..., None, None].expand(-1, -1, *view.output.shape[2:])
            with_image = view.output.gather(1, last)[:, 0]
            chosen = vision_aware_heads(with_image, view.text_only, self.drop_surging, self.unbiased)
            chosen = chosen & view.visual.any(-1, keepdim=True)
            if view.brings is not None:
                chosen = chosen & view.brings[:, None]
            # another image does not change the heads with which the cached tokens were computed
            heads = chosen if heads is None else torch.where(heads.any(-1, keepdim=True), heads, chosen)
            view.state["vhr_heads"] = heads
        return None if heads is None else reinforce(view.output, heads, self.alpha)
