"""PAINT: lift the attention to local and summary tokens (Arif et al. 2025, arXiv 2501.12206).

Known as "Fixing Imbalanced Attention to Mitigate In-Context Hallucination" before it was renamed. Follows the
released ``clip_encoder.py`` (which tokens) and ``attention.py`` (how they are lifted).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Policy
from ..kernels import to_device
from .attention_rows import all_rows, final_row, rewrite_rows
from .scores import global_attention
from .settings import check_choice, check_number

if TYPE_CHECKING:
    from ..contract.views import ModulateView, TowerView

LOCAL, SUMMARY = "paint_local", "paint_summary"
"""Names under which the two token sets are passed from the tower to the decoder."""


def local_tokens(attention: torch.Tensor, ratio: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The ``int(ratio * tokens)`` tokens that CLS attends to most in an early layer: bool ``(batch, tokens)``.

    ``attention`` is ``(batch, tokens)``, ``valid`` marks real tokens. Official: ``top_tokens`` before the summary
    tokens are taken out.
    """
    if valid is not None:
        attention = attention.masked_fill(~valid, -torch.inf)
    top = attention.topk(int(attention.shape[1] * ratio), dim=-1).indices
    chosen = torch.zeros_like(attention, dtype=torch.bool).scatter(1, top, True)
    return chosen if valid is None else chosen & valid


def summary_tokens(
    attention: torch.Tensor, valid: torch.Tensor | None = None, official: bool = False
) -> torch.Tensor:
    """Tokens whose attention from CLS is an outlier, above Q3 + 1.5 (Q3 - Q1): bool ``(batch, tokens)``.

    ``attention`` ``(batch, tokens)`` belongs to the layer that feeds the projector, ``valid`` marks real tokens.
    ``official`` computes the number of outliers from their share of all tokens, which is rounded down and so loses
    one for some counts (never for 64, 256 or 576 tokens). Official: ``get_top_ratio``.
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    if valid is not None:
        attention = attention.masked_fill(~valid, torch.nan)
    levels = to_device([0.25, 0.75], attention.device).to(attention.dtype)
    low, high = attention.nanquantile(levels, dim=-1, keepdim=True)
    outlier: torch.Tensor = attention > high + 1.5 * (high - low)
    if not official:
        return outlier
    tokens = torch.full_like(outlier[:, :1], attention.shape[1], dtype=torch.float64)
    if valid is not None:
        tokens = valid.sum(-1, keepdim=True).to(torch.float64)
    count = (tokens * (outlier.sum(-1, keepdim=True) / tokens)).floor()
    ranked = attention.nan_to_num(nan=-torch.inf)
    place = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return outlier & (place < count)


def lift(logits: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Raise each logit by ``gain`` times its magnitude: positive ones grow, negative ones shrink towards zero.

    ``gain`` broadcasts to ``logits``, which must not be masked yet (infinity times zero is NaN). Official:
    ``llama_new_forward``.
    """
    return torch.addcmul(logits, gain.to(logits.dtype), logits.abs())


def lifted_layers(depth: int, first_layer: int | None, end_layer: int | None) -> range:
    """Layers ``first_layer`` (``None``: the third, or the last) to ``end_layer``. Raises ValueError if that is none."""
    end = depth if end_layer is None else end_layer
    first = min(2, end - 1) if first_layer is None else first_layer
    if not first < end <= depth:
        raise ValueError(
            f"first_layer={first_layer}, end_layer={end_layer}: the language model has {depth} layers; choose "
            f"first_layer < end_layer <= {depth}"
        )
    return range(first, end)


def lift_rows(view: ModulateView, gain: torch.Tensor, prefill: bool) -> torch.Tensor | None:
    """Lift the logits of the rows that predict new tokens: the last one of a prompt, every one after it.

    ``gain`` is ``(batch, keys)``, see `lift`; ``prefill`` says whether a prompt's last row is among them.
    """
    brings = view.brings if view.prefill and view.key.shape[2] > view.query.shape[2] else None
    if view.prefill and not prefill and brings is None:
        return None
    if brings is not None and not prefill:
        gain = gain.masked_fill(brings[:, None], 0)
    lifted = view.once("lifted", lambda: (gain != 0).any(-1)[:, None, None], gain)
    # rows of a later call are generated tokens or drafts: several when drafts are verified together
    chosen = final_row(view) if view.prefill else all_rows(view)
    # after an earlier turn, a sequence without a new image is in such a later call
    if brings is not None:
        chosen = torch.where(brings[:, None], chosen, all_rows(view))

    everywhere = not view.prefill

    def edit(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if everywhere:
            return lift(logits, gain[:, None, None])
        here = (rows[..., None] == chosen[:, None]).any(-1)
        return lift(logits, gain[:, None, None] * here[:, None, :, None])

    output = rewrite_rows(
        view, chosen, [*view.logit_edits, edit], lambda probabilities, rows: (probabilities, lifted)
    )
    view.logit_edits.append(edit)
    return output


@dataclass(frozen=True)
class Paint(Policy):
    """PAINT, on the logits of the row that predicts the next token (encode and modulate stage).

    *Local* tokens are those that CLS attends to most in the tower's first layer, *summary* tokens the outliers of the
    layer that feeds the projector; a token of both kinds is a summary token. In every decoder layer from
    ``first_layer`` on, ``alpha`` and ``beta`` lift their logits in all heads.

    The published setting (``local_ratio=0.25, alpha=0.7, beta=0.4``) makes LLaVA-1.5 loop: 64 % of the words in the
    authors' own caption files are repetitions, against 38 % at ``alpha=0.5`` or ``local_ratio=0.1``, so the default is
    milder in both. It presupposes that most visual tokens are neither kind: after a pruner that keeps what CLS attends
    to, choose an even smaller ``alpha``.

    Each image is scored by its own attention; the released code applies the tokens of a batch's first image to all.
    Not implemented: PAI's guided decoding, which the released command line adds (one more pass per token), its spatial
    tokens (their score is a row sum of a softmax, 1 for every token), and head-specific gains, which the abstract
    mentions and no released version has. For a tower without CLS its mean query is used.

    Attributes:
        local_ratio: local tokens, as a share of the tokens that enter the tower's first layer.
        alpha: gain of local tokens.
        beta: gain of summary tokens.
        first_layer: first decoder layer (0-based) to act in; ``None`` is the paper's 2, or the last one in models with
            fewer than three layers.
        end_layer: the decoder layer after the last one to act in; ``None`` acts up to the last layer.
        boost_prefill: whether the first new token is affected too. With guided decoding switched on, as in all
            released results, the released code skips it.
        compat: ``"official"`` takes scores in the model's dtype and rounds the number of summary tokens as the
            released code does; ``"paper"`` takes fp32 scores and every outlier.
    """

    name: ClassVar[str] = "paint"
    stages: ClassVar[tuple[str, ...]] = ("modulate",)
    reads_cls: ClassVar[bool] = True
    modulates: ClassVar[Literal["logits", "probabilities", "outputs"]] = "logits"

    local_ratio: float = 0.1
    alpha: float = 0.5
    beta: float = 0.3
    first_layer: int | None = None
    end_layer: int | None = None
    boost_prefill: bool = True
    compat: Literal["official", "paper"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, local_ratio=(0, 1), alpha=(0, 1), beta=(0, 1))
        check_number(self, optional=True, first_layer=(0, 1000), end_layer=(1, 1000))
        check_choice(self, boost_prefill=(True, False), compat=("official", "paper"))

    def tower_layers(self, feature_layer: int) -> Collection[int]:
        """The first layer gives the local tokens, the consumed layer the summary tokens."""
        return {0, feature_layer}

    def encode(self, view: TowerView) -> None:
        """Leave the token sets in ``view.carry``; nothing is dropped."""
        official = self.compat == "official"
        exact = view.attention.query.dtype if official else None
        score = view.per_unit(global_attention(view.attention, exact))
        if view.layer == 0:
            view.carry[LOCAL] = local_tokens(score, self.local_ratio, view.valid)
        if view.layer == view.feature_layer:
            summary = summary_tokens(score, view.valid, official)
            view.carry[SUMMARY] = summary
            view.carry[LOCAL] = view.carry[LOCAL].bool() & ~summary

    def modulate_layers(self, depth: int) -> Collection[int]:
        """Layers ``first_layer`` to ``end_layer``. Raises ValueError where the model has none of them."""
        return lifted_layers(depth, self.first_layer, self.end_layer)

    def modulate(self, view: ModulateView) -> torch.Tensor | None:
        """Recompute the rows that predict new tokens: the last one of a prompt, every one after it."""
        if LOCAL not in view.carry:
            return None
        local, summary = view.carry[LOCAL], view.carry[SUMMARY]
        gain = view.once(
            ("gain", self.alpha, self.beta),
            lambda: self.alpha * local.float() + self.beta * summary.float(),
            local,
            summary,
        )
        return lift_rows(view, gain, self.boost_prefill)
