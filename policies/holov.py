"""HoloV: a budget per region of the image, so that no salient spot takes it all (Zou et al., NeurIPS 2025,
arXiv 2510.02912).

Follows the released ``llava/model/utils.py`` and ``qwen-model-HoloV/utils.py``. The tokens, in raster order, are split
into consecutive *runs*; each run gets a share of the budget by its score, and spends it on the tokens that CLS attends
to most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..contract.policy import Keep, Policy
from ..contract.views import FeaturesView, TowerView
from ..kernels import gather_rows
from .scores import global_attention
from .settings import check_choice

SIMILARITY_WEIGHT = 0.09
"""Weight of the spread of similarities in the released score of a token; that of attention is 1."""
EPS = 1e-6


def run_table(tokens: int, runs: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The tokens of each of ``runs`` equal stretches: int64 ``(runs, longest)``; shorter ones end with -1.

    The first runs are one token longer where they do not divide the tokens. Fewer tokens than runs are runs of one.
    """
    size, longer = divmod(tokens, min(runs, tokens))
    run = torch.arange(min(runs, tokens), device=device)
    place = torch.arange(size + (longer > 0), device=device)
    number = (run * size + run.clamp(max=longer))[:, None] + place
    return torch.where(place < (size + (run < longer))[:, None], number, -1)


def by_run(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``x`` ``(batch, tokens, ...)`` as ``(batch, runs, longest, ...)``, zeros where a run is shorter."""
    real = (table >= 0).view(*table.shape, *[1] * (x.dim() - 2))
    return x[:, table.clamp(min=0)].where(real, 0)


def mean_scores(attention: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The score of each run as the mean attention of its tokens: ``(batch, tokens)`` -> ``(batch, runs)``."""
    return by_run(attention, table).sum(-1) / (table >= 0).sum(-1)


def released_scores(features: torch.Tensor, attention: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The score of each run by the released formula: fp32 ``(batch, runs)``.

    To a thousand times its attention a token adds how much its cosines with the rest of its run vary, scaled so that
    the run's mean of the one matches the other's. That multiplies all runs by the same factor: the similarities change
    no choice, unless a run's tokens are equal up to 1e-6. A run of one token gets its attention, without the thousand.

    Args:
        features: ``(batch, tokens, channels)``; cosines are computed in their dtype.
        attention: fp32 ``(batch, tokens)``.
        table: the tokens of each run, as `run_table` gives them.
    """
    real = table >= 0
    size = real.sum(-1)
    x = by_run(features, table)
    x = x / (x.norm(dim=-1, keepdim=True) + EPS)
    itself = torch.eye(x.shape[2], device=x.device, dtype=x.dtype)
    cosine = (x @ x.mT * (1 - itself)).float()
    others = (size - 1).clamp(min=1)[:, None]
    mean = cosine.sum(-1) / others
    # the zero of a token with itself counts, those that pad a short run do not
    spread = (cosine - mean[..., None]).square().where(real[:, None], 0).sum(-1).where(real, 0) / others
    paid = by_run(attention, table) * 1000
    scale = paid.abs().sum(-1) / size / (spread.sum(-1) / size + EPS)
    score = (paid + SIMILARITY_WEIGHT * spread * scale[..., None]).sum(-1) / size
    return torch.where(size > 1, score, paid[..., 0] / 1000)


def quotas(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """How many of ``keep`` tokens each run gets: int64 like ``scores`` ``(batch, runs)``.

    In proportion to the scores, rounded down; what is left over goes one by one to the runs of largest share.
    """
    share = scores / (scores.sum(-1, keepdim=True) + EPS)
    due = (share * keep).floor().long()
    rank = share.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return due + (rank < keep - due.sum(-1, keepdim=True))


def within_size(due: torch.Tensor, scores: torch.Tensor, size: torch.Tensor, keep: int) -> torch.Tensor:
    """``due`` ``(batch, runs)`` limited to the size of each run: the surplus goes to runs with room.

    The run of highest score is filled up first. Sums to ``keep`` in every row, if there are as many tokens.
    ``size`` is int64 ``(runs,)``.
    """
    taken = torch.minimum(due, size)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    room = (size - taken).gather(1, order)
    before = room.cumsum(-1) - room
    more = torch.minimum((keep - taken.sum(-1, keepdim=True) - before).clamp(min=0), room)
    return taken.scatter_add(1, order, more)


def ranked(attention: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The tokens of each run by descending attention, int64 ``(batch, runs, longest)``; shorter runs end with -1."""
    padded = by_run(attention, table).masked_fill(table < 0, -torch.inf)
    order = padded.argsort(dim=-1, descending=True, stable=True)
    return table.expand(len(order), -1, -1).gather(2, order)


def choose(attention: torch.Tensor, runs: int, keep: int) -> torch.Tensor:
    """The kept tokens, ascending: int64 ``(batch, keep)``, from attention ``(batch, tokens)``.

    In a tile without attention (all zero, or NaN) all runs get the same.
    """
    attention = attention.nan_to_num(nan=0.0, posinf=0.0)
    table = run_table(attention.shape[1], runs, attention.device)
    scores = mean_scores(attention, table)
    scores = torch.where(scores.sum(-1, keepdim=True) > 0, scores, 1.0)
    # attention summed over many tokens is no longer large compared with `EPS`
    scores = scores / scores.sum(-1, keepdim=True)
    due = within_size(quotas(scores, keep), scores, (table >= 0).sum(-1), keep)
    number = ranked(attention, table)
    stays = torch.arange(number.shape[2], device=number.device) < due[..., None]
    mask = torch.zeros(len(attention), attention.shape[1] + 1, dtype=torch.bool, device=attention.device)
    mask.scatter_(1, number.where(stays, attention.shape[1]).flatten(1), True)
    return Keep.from_mask(mask[:, :-1], keep).index


def choose_as_released(
    features: torch.Tensor, attention: torch.Tensor, runs: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kept tokens in the released order, their rows, and the scores of the runs.

    Run by run, by descending attention within one (a run of which all stay is in raster order). What exceeds the size
    of a run is lost: places at the end then hold -1, and rows of zeros.

    Args:
        features: ``(batch, tokens, channels)``.
        attention: fp32 ``(batch, tokens)``.
        runs, keep: how many.

    Returns:
        int64 ``(batch, keep)``, ``(batch, keep, channels)`` and fp32 ``(batch, runs)``.
    """
    table = run_table(attention.shape[1], runs, attention.device)
    scores = released_scores(features, attention, table)
    due = quotas(scores, keep)[..., None]
    number = torch.where(due >= (table >= 0).sum(-1)[:, None], table, ranked(attention, table))
    stays = (torch.arange(number.shape[2], device=number.device) < due) & (number >= 0)
    kept = number.masked_fill(~stays, -1).flatten(1)
    kept = torch.nn.functional.pad(kept, (0, max(0, keep - kept.shape[1])), value=-1)
    kept = kept.gather(1, (kept < 0).to(torch.int8).argsort(dim=-1, stable=True)[:, :keep])
    return kept, gather_rows(features, kept.clamp(min=0), kept >= 0), scores


@dataclass(frozen=True)
class HoloV(Policy):
    """HoloV, after the projector (encode stage). The budget applies to each tile separately.

    The released score of a run contains the variance of its tokens' similarities, but divided by its own mean over the
    run: it scales all runs alike and decides nothing, and inside a run attention alone does. So what is released, and
    what this computes, is a budget for each run in proportion to its mean CLS attention.

    The default mode differs from the released code in these points:

    - What exceeds the size of a run goes to the other runs, highest score first. The released code feeds the
      language model rows of zeros in its place.
    - Tokens stay in raster order; the released code orders those of a run by descending attention.
    - Runs of a single token have the same weight as others, not a thousandth of it.
    - Without attention (all zero, or NaN) the runs share the budget evenly; the released code keeps too few tokens, or
      none.
    - The similarities, which decide nothing, are not computed.

    The paper speaks of crops; released are stretches of the raster, whose ends do not fall on the ends of lines. The
    released Qwen2.5-VL code prunes a block that is shifted by one token, with scores in the order of the tower's
    windows; neither is reproduced. Its number of runs follows ``1024 / 576 * tokens / kept``, which is 16 at 64 of 576
    tokens. Without CLS the mean query is used; where a pixel shuffle merges patches, a unit's score is the
    sum over its patches.

    Attributes:
        runs: stretches of consecutive tokens, at most one per token.
        compat: ``"official"`` reproduces the released LLaVA code, rows of zeros and order included. Numbers of cells in
            the receipt are then those of the tokens, and of arbitrary others for rows of zeros.
    """

    name: ClassVar[str] = "holov"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 128 / 576
    reads_cls: ClassVar[bool] = True
    late: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True

    runs: int = 16
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, compat=(None, "official"))
        if type(self.runs) is not int or self.runs < 1:
            raise ValueError(f"runs={self.runs!r}: choose a number of runs, 1 or more")

    def tower_layers(self, feature_layer: int) -> tuple[int]:
        """The feature layer: its attention is the score."""
        return (feature_layer,)

    def encode(self, view: TowerView) -> None:
        """Note the CLS attention of each unit; nothing is cut inside the tower."""
        view.carry["cls_attention"] = view.per_unit(global_attention(view.attention))

    def encode_final(self, view: FeaturesView) -> Keep:
        """Choose among the projected features."""
        attention = view.carry["cls_attention"]
        if self.compat is None:
            return Keep(choose(attention, self.runs, view.target))
        kept, rows, _ = choose_as_released(view.features, attention.float(), self.runs, view.target)
        units = view.features.shape[1]
        mask = torch.zeros(len(kept), units + 1, dtype=torch.bool, device=kept.device)
        mask.scatter_(1, kept.where(kept >= 0, units), True)
        index = (
            mask[:, :units].view(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : view.target]
        )
        return Keep(index.sort(dim=-1).values, rows=rows)
