"""DART: tokens that duplicate a few pivots least (Wen et al., EMNLP 2025, arXiv 2502.11494).

Follows ``DART.forward`` and ``get_retained_image_token`` of the authors' EPIC repository
(``llava/model/language_model/dart/modeling_llama_self.py``). Some visual and some text tokens with large keys are the
pivots; each in turn picks the visual tokens least similar to it among those that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch.nn.functional import cosine_similarity, normalize, pad

from ..contract.policy import Policy, Positions
from .scores import top_mask
from .settings import check_choice

if TYPE_CHECKING:
    from ..contract.views import PrefillView


def key_norms(key: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """L1 norm of each row's keys over all heads: ``(batch, heads, rows, head_dim)`` to ``(batch, rows)``.

    Shared heads count once; repeating them for the queries would only scale all norms. ``dtype`` defaults to
    fp32, or fp64 for fp64 inputs.
    """
    key = key.to(dtype or torch.promote_types(key.dtype, torch.float32))
    return key.transpose(1, 2).flatten(2).norm(p=1, dim=-1)


def pivots(norms: torch.Tensor, among: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` rows of largest norm: int64 ``(batch, count)`` by descending norm, and bool, which of them exist.

    Args:
        norms: ``(batch, rows)``.
        among: bool ``(batch, rows)``; where it has fewer than ``count`` rows, the last entries are not pivots.
        count: rows wanted.
    """
    order = norms.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :count]
    found = among.gather(1, order)
    return pad(order, (0, count - order.shape[1])), pad(found, (0, count - found.shape[1]))


def shares(count: torch.Tensor, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """How many tokens each pivot picks, so that ``count`` are kept in all: int64 ``(batch, pivots)``.

    Image pivots are kept themselves. The remainder goes to the first pivots, one each.

    Args:
        count: int64 ``(batch,)``.
        image, text: bool ``(batch, ...)``, which pivots exist, True ones first.
    """
    there = torch.cat([image, text], 1)
    rest, number = (count - image.sum(-1)).clamp(min=0)[:, None], there.sum(-1, keepdim=True).clamp(min=1)
    first = there.cumsum(-1) - 1 < rest % number
    return (rest // number + first) * there


def released_share(reduction_ratio: float, visual: int, pivots: int) -> int:
    """How many tokens each pivot takes in EPIC, of ``visual`` tokens: the same expression, rounded down."""
    return int((1 - reduction_ratio) * visual / pivots)


def released_order(rows: list[int]) -> list[int]:
    """The order in which the released code has pivots choose: that of a Python set of their ``rows``.

    They are inserted as image pivots by descending norm, then text pivots.
    """
    return list(set(rows))


def least_alike(
    state: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    candidates: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The rows that the pivots pick, each in turn among those left: bool ``(batch, rows)``.

    Args:
        state: ``(batch, rows, channels)``, the normed output of a layer.
        order: int64 ``(batch, pivots)``, rows in the order in which they choose.
        count: int64 ``(batch, pivots)``, how many each picks; fewer where fewer are left.
        candidates: bool ``(batch, rows)``.
        dtype: of the cosines; ``None`` for fp32 or better.
    """
    dtype = dtype or torch.promote_types(state.dtype, torch.float32)
    channels = state.shape[-1]
    leaders = state.gather(1, order[..., None].expand(-1, -1, channels)).to(dtype)
    state, left = state.to(dtype), candidates
    if dtype == torch.promote_types(dtype, torch.float32):
        alike = normalize(leaders, dim=-1) @ normalize(state, dim=-1).mT
    else:  # half precision rounds a cosine where torch's own function does
        alike = torch.stack([cosine_similarity(x[:, None], state, dim=-1) for x in leaders.unbind(1)], 1)
    for turn in range(order.shape[1]):
        left = left & ~top_mask(-alike[:, turn], count[:, turn], left)
    return candidates & ~left


@dataclass(frozen=True)
class DART(Policy):
    """DART, inside the decoder (prefill stage), after `k` layers.

    The DART repository itself was not available: the code followed is the class of that name which the same authors
    ship in EPIC. The two are known to differ in how many tokens a pivot takes, and DART's rule is known only
    second-hand (a copy of its file, and the numbers in its README): 192, 128 and 64 tokens there keep 196, 132 and 68.

    The default mode differs from it in these points:

    - Exactly the budget is kept: the remainder of the division among pivots goes to the first of them, one each.
    - Each sequence of a batch chooses separately, by its own text, and padding is ignored; the released code applies
      the choice of sequence 0 to all, and its norms depend on padding on the left. Images may be anywhere, and several
      are pruned together.
    - Pivots choose in descending order of norm, image pivots first; the released order is that of a Python set.
    - Where fewer rows than `text_pivots` follow the image, those are the text pivots; the released code raises there.
    - Cosines and norms are fp32 or better. In half precision the cosines of the released code are often tied at the
      cut.

    Attributes:
        k: decoder layers that see all visual tokens; the cut follows the last of them.
        image_pivots: visual tokens that are pivots, and kept.
        text_pivots: tokens after the image that are pivots.
        compat: ``"official"`` reproduces the released code for one sequence: order of a set, cosines in the model's
            dtype, and ``budget // pivots`` tokens for each pivot in addition to the image pivots, which may be a few
            more or less than the budget. Waits for the device to learn the row numbers.
    """

    name: ClassVar[str] = "dart"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    default_ratio: ClassVar[float] = 128 / 576
    reads_attention: ClassVar[bool] = True

    positions: Positions = "original"
    k: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, compat=(None, "official"))
        for name, least in (("k", 1), ("image_pivots", 1), ("text_pivots", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: choose a whole number, {least} or more")

    def prefill_layers(self, depth: int) -> tuple[int]:
        """The last of the first `k` layers."""
        if self.k > depth:
            raise ValueError(f"k={self.k}: this decoder has {depth} layers, choose 1 to {depth}")
        return (self.k - 1,)

    def left(
        self, layer: int, depth: int, entered: int, target: int, tiles: list[tuple[int, int]]
    ) -> int | None:
        """The budget; unknown in official mode."""
        return None if self.compat == "official" else target

    def prefill(self, view: PrefillView) -> torch.Tensor:
        """Keep the image pivots and what all pivots pick."""
        if view.attention is None:
            raise RuntimeError(
                f"{self.name} reads the attention of layer {view.layer}, which was not recorded"
            )
        official, rows = self.compat == "official", view.visual.shape[1]
        own = view.hidden.dtype if official else None
        key = view.attention.key[:, :, -rows:].detach()
        if not official:
            key = view.unpadded(key.to(torch.promote_types(key.dtype, torch.float32)))
        norms = key_norms(key, own)
        image, is_image = pivots(norms, view.visual, self.image_pivots)
        text, is_text = pivots(norms, view.text, self.text_pivots)
        # a budget below the image pivots keeps the first of them
        is_image = is_image & (torch.arange(self.image_pivots, device=norms.device) < view.target[:, None])
        kept = torch.zeros_like(norms).scatter_add(1, image, is_image.to(norms.dtype)) > 0
        order, count = torch.cat([image, text], 1), shares(view.target, is_image, is_text)
        if official:
            there = torch.cat([is_image, is_text], 1)
            order = _as_released(order, there)
            share = view.target // (self.image_pivots + self.text_pivots)
            count = share[:, None] * there.sort(dim=-1, descending=True).values
        state = view.norm(view.hidden.detach())
        taken = least_alike(state, order, count, view.visual & ~kept, own)
        return ~view.visual | kept | taken


def _as_released(order: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Pivots in their `released_order`, per sequence, filled up with row 0."""
    rows = []
    for pivots_of, real in zip(order.tolist(), there.tolist(), strict=True):
        in_turn = released_order([row for row, ok in zip(pivots_of, real, strict=True) if ok])
        rows.append(in_turn + [0] * (len(real) - len(in_turn)))
    return torch.tensor(rows, device=order.device)
