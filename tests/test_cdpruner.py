"""CDPruner against determinants of the whole kernel, and where its released code keeps too few tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.reference_encode import cdpruner_units
from tests.test_diversity import CHANNELS, KINDS, UNITS, tiles
from vlm_prune.policies.cdpruner import CDPruner, greedy_volume, patch_embeds, relevance, text_windows


def question(seed: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(3, rows, CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, UNITS))
def test_grows_the_volume(seed, keep):
    features, _ = tiles(seed)
    weighed = relevance(features, question(seed))
    order, _ = greedy_volume(features, weighed, keep)
    for b, x in enumerate(features):
        assert sorted(order[b].tolist()) == cdpruner_units(x, keep, weighed[b].tolist())
    plain, _ = greedy_volume(features, torch.ones_like(weighed), keep)
    assert plain.sort(-1).values.tolist() == [cdpruner_units(x, keep) for x in features]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("official", [True, False])
def test_exactly_the_budget_beyond_the_rank(kind, dtype, official):
    features, _ = tiles(4, kind=kind)
    weighed = relevance(features, question(4))
    for keep in range(1, UNITS + 1):
        order, gain = greedy_volume(features.to(dtype), weighed.to(dtype), keep, official)
        assert all(len(set(row)) == keep for row in order.tolist())
        assert not gain.isnan().any()


def test_beyond_the_rank_relevance_decides():
    features, _ = tiles(5)
    weighed = relevance(features, question(5))
    order, _ = greedy_volume(features, weighed, CHANNELS + 3)
    for b in range(3):
        within, filled = order[b, :CHANNELS], order[b, CHANNELS:]
        rest = weighed[b].clone()
        rest[within] = -1
        assert filled.tolist() == rest.topk(3).indices.tolist()


def test_a_row_of_zeros_comes_last():
    features, _ = tiles(6)
    features[:, 3] = 0
    order, _ = greedy_volume(features, torch.ones(3, UNITS), CHANNELS)
    assert 3 not in order.flatten().tolist()
    assert not order.isnan().any()


def test_relevance_is_the_mean_cosine_stretched():
    features, text = tiles(7)[0], question(7)
    for b, x in enumerate(features):
        cosine = torch.nn.functional.cosine_similarity(x[:, None], text[b][None], dim=-1).mean(-1)
        for least_alike, score in ((True, -cosine), (False, cosine)):
            ours = relevance(features, text, least_alike=least_alike)[b]
            want = (score - score.min() + 1e-6) / (score.max() - score.min())
            torch.testing.assert_close(ours, want)
    valid = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    some = relevance(features, text, valid)
    torch.testing.assert_close(some[0], relevance(features, text[:, :2])[0])
    torch.testing.assert_close(some[1], relevance(features, text)[1])
    assert (some[2] == 1).all(), "no question: all matter alike"
    one = relevance(features, text[0])
    torch.testing.assert_close(one[0], relevance(features, text)[0])


def test_the_range_is_that_of_a_tile_or_of_all():
    features, text = tiles(8)[0], question(8)[0]
    alone = torch.stack([relevance(x[None], text)[0] for x in features])
    assert torch.equal(relevance(features, text), alone)
    joint = relevance(features, text, joint=True)
    assert not torch.allclose(joint, alone)
    assert joint.max() == pytest.approx(1, abs=1e-4)


def test_text_windows():
    ids, mask = text_windows(torch.tensor([98, 5, 6, 7, 99]), 3)
    assert ids.tolist() == [[98, 5, 6], [7, 99, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert text_windows(torch.arange(1, 7), 3)[0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_patch_embeds_are_fp32_whatever_the_tower_is():
    norm, head = nn.LayerNorm(CHANNELS).half(), nn.Linear(CHANNELS, 6, bias=False).half()
    features = tiles(9)[0].half()
    ours = patch_embeds(features, norm, head)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, head.float()(norm(features).float()))


def test_settings():
    with pytest.raises(ValueError, match="compat='paper': choose"):
        CDPruner(compat="paper")
