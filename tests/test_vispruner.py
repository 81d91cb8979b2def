"""VisPruner's rounds on tokens one can place by hand."""

import pytest
import torch

from tests.reference_encode import vispruner_units
from vlm_prune.policies.vispruner import VisPruner, choose, drop_alike, looked_up


def on_a_circle(*degrees):
    angle = torch.tensor([degrees]).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], -1)


def test_a_round_drops_the_even_places_nearest_to_odd_ones():
    x = on_a_circle(0.0, 90.0, 100.0, 30.0, 180.0, 200.0)
    order = torch.arange(6)[None]
    # places 0, 2, 4 against 1, 3, 5: nearest at 30, 10 and 20 degrees
    assert drop_alike(order, looked_up(x), 5).tolist() == [[4, 0, 1, 3, 5]]
    assert drop_alike(order, looked_up(x), 4).tolist() == [[0, 1, 3, 5]]


def test_the_order_of_one_round_decides_the_next():
    similar = looked_up(torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(1)))
    whole = drop_alike(torch.arange(64)[None], similar, 20)
    half = drop_alike(torch.arange(64)[None], similar, 48)  # two rounds of eight
    assert torch.equal(drop_alike(half, similar, 20), whole)
    assert not torch.equal(drop_alike(half.sort().values, similar, 20), whole)


@pytest.mark.parametrize("tokens", [7, 16, 33, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_equals_a_loop(tokens, share):
    g = torch.Generator().manual_seed(tokens)
    attention, x = torch.rand(3, tokens, generator=g), torch.randn(3, tokens, 8, generator=g)
    for keep in {1, 2, tokens // 3, tokens - 1, tokens}:
        ours = torch.cat(choose(attention, x, keep, share), 1).sort().values
        wanted = [vispruner_units(attention[b].tolist(), x[b], keep, share) for b in range(3)]
        assert ours.tolist() == wanted


@pytest.mark.parametrize(("keep", "share"), [(66, 0.5), (8, 0.5), (16, 0.75)])
def test_budgets_that_stop_the_released_code(keep, share):
    """An odd number of tokens left to the rounds, and rounds that must drop more than half of what is left."""
    kept = torch.cat(choose(torch.rand(1, 576), torch.randn(1, 576, 16), keep, share), 1)
    assert len(set(kept[0].tolist())) == keep


def test_zeros_and_settings():
    x = torch.randn(1, 32, 4)
    x[0, 5] = 0
    kept = torch.cat(choose(torch.rand(1, 32), x, 10, 0.5), 1)
    assert len(set(kept[0].tolist())) == 10
    with pytest.raises(ValueError, match="important_share=2"):
        VisPruner(important_share=2)
