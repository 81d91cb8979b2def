"""SCOPE against the loop of the paper, and where its released code goes wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_encode import scope_units
from tests.test_diversity import UNITS, ask, cls_attention, tiles
from vlm_prune.policies.coverage import greedy_cover
from vlm_prune.policies.scope import SCOPE, salient_cover


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keep=st.integers(1, UNITS // 2),
    alpha=st.sampled_from([0.5, 1.0]),  # coverage alone is often tied: two tokens that only cover each other
    combine=st.sampled_from(["multi", "add"]),
)
def test_is_the_loop_of_the_paper(seed, keep, alpha, combine):
    features, attended = tiles(seed)
    answer = ask(SCOPE(alpha=alpha, combine=combine), features, attended, keep)
    heads = attended.query.shape[1]
    for b, x in enumerate(features):
        saliency = [heads * score for score in cls_attention(attended, b)]
        assert answer.index[b].tolist() == scope_units(saliency, x, keep, alpha, combine)


def test_saliency_and_coverage_both_count():
    features, attended = tiles(3)
    default = ask(SCOPE(), features, attended, 8).index
    assert not torch.equal(default, ask(SCOPE(alpha=0), features, attended, 8).index)
    attended.query[:, :, 0] = 0
    assert not torch.equal(default, ask(SCOPE(), features, attended, 8).index)


def test_duplicates_come_last():
    features, _ = tiles(0)
    features = features[:, torch.arange(UNITS) % 5]
    order, cover = salient_cover(features, torch.ones(3, UNITS), 5)
    assert [{i % 5 for i in row} for row in order.tolist()] == [set(range(5))] * 3
    torch.testing.assert_close(cover, torch.ones_like(cover))


def test_a_row_of_zeros_and_a_tile_without_saliency_do_not_decide():
    features, _ = tiles(1)
    saliency = torch.rand(3, UNITS, dtype=features.dtype, generator=torch.Generator().manual_seed(0))
    features[:, 4] = 0
    for keep in (1, 9, UNITS - 1):
        order, _ = salient_cover(features, saliency, keep)
        assert 4 not in order.flatten().tolist()
    even, _ = salient_cover(features, torch.ones_like(saliency), 9)
    assert torch.equal(salient_cover(features, torch.zeros_like(saliency), 9)[0], even)
    released, _ = salient_cover(features, saliency, 9, official=True)
    assert released.tolist() == [list(range(9))] * 3, "the released code takes the first tokens"


def test_only_candidates_are_picked():
    worth = torch.rand(2, 7, 6, generator=torch.Generator().manual_seed(0))
    candidates = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    order, cover = greedy_cover(worth, 3, candidates=candidates)
    assert order[0].sort().values.tolist() == [0, 2, 4]
    assert set(order[1].tolist()) < {2, 3, 4, 5}
    for b in range(2):
        torch.testing.assert_close(cover[b], worth[b][:, order[b]].amax(-1))


def test_settings():
    for wrong in ({"alpha": -1}, {"alpha": "1"}, {"combine": "sum"}, {"compat": "paper"}):
        with pytest.raises(ValueError, match="choose"):
            SCOPE(**wrong)
