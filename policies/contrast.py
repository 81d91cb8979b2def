"""What methods that compare two sets of logits share: the contrast, and the tokens that it excludes."""

from __future__ import annotations

import math

import torch


def contrasted(logits: torch.Tensor, second: torch.Tensor, alpha: float) -> torch.Tensor:
    """``(1 + alpha) logits - alpha second``, of one shape: tokens likely in the second pass, too, count for less."""
    return (1 + alpha) * logits - alpha * second


def implausible(logits: torch.Tensor, beta: float) -> torch.Tensor:
    """Tokens less than ``beta`` times as likely as the likeliest: bool, shaped like ``logits`` ``(..., vocabulary)``.

    Contrastive decoding's adaptive plausibility constraint (Li et al. 2022, arXiv 2210.15097): a contrast is noise
    where both sides are sure that a token is wrong. ``beta`` 0 excludes no token.
    """
    if beta == 0:
        return torch.zeros_like(logits, dtype=torch.bool)
    return logits < logits.amax(-1, keepdim=True) + math.log(beta)
