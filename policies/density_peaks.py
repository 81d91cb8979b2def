"""Clusters of tokens around density peaks, with one token for each: how SparseVLM recycles dropped tokens.

Follows ``cluster_and_merge`` of its released ``llava/model/language_model/utils.py`` (Rodriguez and Laio, 2014), but
without the noise that breaks ties there: ties go to the first one.
"""

from __future__ import annotations

import torch


def density_peaks(
    x: torch.Tensor,
    count: torch.Tensor,
    most: int,
    real: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The centres of clusters, int64 ``(batch, most)``, and the cluster of each token, int64 ``(batch, tokens)``.

    A token's density falls with its mean squared distance from the ``count`` nearest ones, itself included. Centres are
    tokens that are dense and far from denser ones, best first; every other token joins the nearest.

    Args:
        x: ``(batch, tokens, channels)``; distances are computed in fp32 or better.
        dtype: in which distances and densities are compared, by default the same. The released code rounds to that of
            ``x``.
        count: int64 ``(batch,)``, clusters of each row, at least 1. Further places for centres hold any token.
        most: the largest of ``count``.
        real: bool ``(batch, tokens)``, the tokens of each row; ``None`` if all are. Others join cluster 0.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    pairs = real[:, None] & real[..., None]
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    distance = distance.to(dtype or x.dtype)
    slot = torch.arange(most, device=x.device) < count[:, None]
    near = distance.masked_fill(~pairs, torch.inf).topk(min(most, x.shape[1]), dim=-1, largest=False).values
    near = near.square().masked_fill(~slot[:, None, : near.shape[2]], 0)
    density = (-near.sum(-1) / count[:, None]).exp()
    denser = pairs & (density[:, None] > density[..., None])
    farthest = distance.masked_fill(~pairs, 0).flatten(1).amax(-1)
    gap = torch.where(denser, distance, farthest[:, None, None]).amin(-1)
    score = (gap * density).masked_fill(~real, -torch.inf)
    centre = score.argsort(dim=-1, descending=True, stable=True)[:, :most]
    away = distance.gather(1, centre[..., None].expand(-1, -1, x.shape[1])).masked_fill(
        ~slot[..., None], torch.inf
    )
    cluster = away.argmin(1)
    place = torch.arange(most, device=x.device).expand_as(centre)
    itself = torch.where(slot, centre, x.shape[1])
    cluster = torch.nn.functional.pad(cluster, (0, 1)).scatter(1, itself, place)[:, :-1]
    return centre, cluster


def cluster_means(
    x: torch.Tensor, cluster: torch.Tensor, most: int, real: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean of each cluster, ``(batch, most, channels)`` in fp32 or better; 0 where there is none.

    ``x``, ``cluster`` and ``real`` as in `density_peaks`. Divided by the number of members and 1e-6, as released.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    member = (cluster[:, None] == torch.arange(most, device=x.device)[:, None]).to(exact.dtype)
    member = member if real is None else member * real[:, None]
    return (member / (member.sum(-1, keepdim=True) + 1e-6)) @ exact
