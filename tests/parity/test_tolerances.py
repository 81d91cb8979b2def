"""The tolerances of comparisons with golden data: whatever rounds as it may passes, and no other count does."""

from __future__ import annotations

import pytest
import torch

from tests.parity.fixing_imbalance import check_ratio


@pytest.mark.parametrize("tokens", [64, 100, 576, 729])
def test_shares_of_whole_numbers_of_tokens(tokens):
    for count in range(tokens + 1):
        outliers = torch.arange(tokens) < count
        for dtype in (torch.float32, torch.float64):
            check_ratio(count, tokens, outliers.to(dtype).mean().item())
            check_ratio(count, tokens, (outliers.sum().to(dtype) / tokens).item())
        for other in (count - 1, count + 1):
            with pytest.raises(AssertionError):
                check_ratio(other, tokens, count / tokens)
