"""Effective ranks by matrix products against those by singular values."""

from __future__ import annotations

import pytest
import torch

from vlm_prune.policies.agilepruner import effective_rank
from vlm_prune.policies.spectrum import rank_by_products


def rank(features: torch.Tensor) -> torch.Tensor:
    """The definition, one image at a time."""
    ranks = []
    for x in features.double():
        share = torch.linalg.svdvals(x - x.mean(0))
        share = share / share.sum()
        ranks.append(torch.special.entr(share).sum().exp())
    return torch.stack(ranks)


def products(features: torch.Tensor) -> torch.Tensor:
    x = features.double()
    x = x - x.mean(1, keepdim=True)
    return rank_by_products(x @ x.mT)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("tokens", [16, 100])
def test_products_come_within_the_tolerance(decay, tokens):
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(2, tokens, tokens)).Q
    right = torch.linalg.qr(torch.randn(2, 160, tokens)).Q
    values = torch.arange(1, tokens + 1).float() ** -decay
    features = (left * values) @ right.mT * torch.tensor([1e-3, 1e3])[:, None, None]
    exact = rank(features)
    torch.testing.assert_close(effective_rank(features), exact, rtol=1e-6, atol=0)
    tolerance = torch.where(exact >= 5, 0.005, 0.06)
    assert ((products(features) / exact - 1).abs() <= tolerance).all()


def test_tokens_that_are_all_alike_and_tokens_on_one_line_have_rank_one():
    torch.manual_seed(0)
    alike = torch.randn(1, 1, 32).expand(1, 20, 32)
    torch.testing.assert_close(products(torch.ones(1, 20, 32)), torch.ones(1).double())
    line = alike * torch.randn(1, 20, 1)
    assert 1 <= products(line).item() <= 1.06


def test_a_batch_is_its_images():
    torch.manual_seed(0)
    features = torch.randn(3, 24, 40) * torch.rand(3, 1, 40) ** 4
    alone = torch.cat([products(x[None]) for x in features])
    torch.testing.assert_close(products(features), alone)
