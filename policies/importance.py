"""VFlowOpt's importance of visual tokens: attention paid by the tokens that receive most, and entropy of the pixels."""

from __future__ import annotations

import torch

from ..contract.views import AttentionView


def mean_attention(view: AttentionView, queries: torch.Tensor) -> torch.Tensor:
    """Attention that some patches pay to each patch, averaged over them and the heads: ``(batch, patches)``.

    ``queries`` ``(batch, patches)`` are the weights of the average, summing to 1. CLS takes part in the softmax as a
    key; its row and column are left out. fp32 or better. A step computes so many rows of the attention map that all
    heads together stay below half of ``tokens x tokens`` entries.
    """
    dtype = torch.promote_types(view.query.dtype, torch.float32)
    first, (heads, tokens) = int(view.has_cls), view.query.shape[1:3]
    query, key = view.query[:, :, first:].to(dtype) * view.scaling, view.key.to(dtype).mT
    paid = key.new_zeros(len(key), tokens)
    step = max(1, tokens // (2 * heads))
    for rows, weight in zip(query.split(step, dim=2), queries.to(dtype).split(step, dim=1), strict=True):
        logits = rows @ key
        if view.valid is not None:
            logits = logits.masked_fill(~view.valid[:, None, None], -torch.inf)
        paid += (weight[:, None, None] @ logits.softmax(-1)).sum((1, 2))
    return paid[:, first:] / heads


def calibrated_attention(view: AttentionView, t: float, fallback: bool = True) -> torch.Tensor:
    """Attention paid by the tokens that receive more than ``t`` times the mean themselves: ``(batch, patches)``.

    Where no token receives that much, the one that receives most is used; ``fallback=False`` gives NaN there, as
    the released code does (``SigLipEncoderLayer.forward``).
    """
    first = int(view.has_cls)
    if view.valid is None:
        patches = view.query.shape[2] - first
        real = torch.ones(len(view.query), patches, dtype=torch.bool, device=view.query.device)
    else:
        real = view.valid[:, first:]
    count = real.sum(-1, keepdim=True)
    drawn = mean_attention(view, real / count) * real
    chosen = (drawn > t * drawn.sum(-1, keepdim=True) / count) & real
    if fallback:
        most = torch.zeros_like(chosen).scatter(1, drawn.argmax(-1, keepdim=True), True)
        chosen = torch.where(chosen.any(-1, keepdim=True), chosen, most)
    return mean_attention(view, chosen / chosen.sum(-1, keepdim=True))


def wrapped_grey(pixels: torch.Tensor) -> torch.Tensor:
    """Grey levels as VFlowOpt's released code gets them: int64 ``(batch, height, width)`` from 0 to 255.

    ``pixels`` ``(batch, 3, height, width)`` are normalised, and converted to bytes as they are: 255 times the value,
    truncated, negatives wrapping around modulo 256. With a mean and standard deviation of 0.5, bytes v and v + 128
    come out alike. The product is formed in the dtype of ``pixels``, as a model in half precision would.
    """
    channels = (pixels * 255).to(torch.int64) & 255
    return (0.3333 * channels.sum(1).float()).round().long()


def true_grey(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Mean of the three bytes that a pixel had before normalisation: int64 ``(batch, height, width)``.

    ``mean`` and ``std`` hold one number per channel, the processor's ``image_mean`` and ``image_std``.
    """
    exact = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    shift, scale = (exact.new_tensor(x).view(1, -1, 1, 1) for x in (mean, std))
    channels = ((exact * scale + shift) * 255).round().clamp(0, 255)
    return channels.mean(1).round().long()


def patch_entropy(grey: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Entropy of the grey levels within each patch, in bits: fp32 ``(batch, rows * columns)``, raster order.

    ``grey`` is int64 ``(batch, height, width)`` from 0 to 255. Patches are as large as ``grid`` (rows and columns of
    them) allows; pixels right of and below the last whole patch are left out, as a strided convolution leaves them
    out. Official: ``SigLipVisionEmbeddings.forward``.
    """
    (rows, columns), (height, width) = grid, grey.shape[1:]
    high, wide = height // rows, width // columns
    cut = grey[:, : rows * high, : columns * wide].reshape(len(grey), rows, high, columns, wide)
    levels = cut.transpose(2, 3).reshape(-1, high * wide)
    # not bincount, which waits for the device to find the largest level
    count = torch.zeros(len(levels), 256, device=grey.device)
    count = count.scatter_add(1, levels, torch.ones_like(levels, dtype=count.dtype))
    share = count / (high * wide)
    return -(share * torch.log2(share + 1e-10)).sum(-1).view(len(grey), -1)


def entropy_share(entropy: torch.Tensor, grid: tuple[int, int], merge: int = 1) -> torch.Tensor:
    """Softmax of patch entropy over a tile, averaged over the patches of each unit: ``(batch, units)``.

    ``entropy`` is ``(batch, patches)``; ``grid`` counts units, which are squares of ``merge`` x ``merge`` patches.
    """
    share = entropy.softmax(-1).view(len(entropy), grid[0], merge, grid[1], merge)
    return share.mean((2, 4)).flatten(1)
