"""PAINT: which tokens are lifted, and when."""

from dataclasses import replace

import pytest
import torch

from tests.modulation import ACTIVE, view
from vlm_prune.contract.views import AttentionView, TowerView
from vlm_prune.policies.paint import LOCAL, SUMMARY, Paint, lift, local_tokens, summary_tokens


def test_lift_raises_positive_and_shrinks_negative_logits():
    logits, gain = torch.tensor([2.0, -2.0, 5.0]), torch.tensor([0.5, 0.5, 0.0])
    assert lift(logits, gain).tolist() == [3.0, -1.0, 5.0]


def tower_view(layer, attention, carry, slots=None):
    units = (attention.key.shape[2] - attention.has_cls) if slots is None else slots.shape[1]
    return TowerView(
        layer=layer,
        feature_layer=5,
        target=units,
        grid=(1, units),
        units=torch.arange(units).expand(len(attention.key), -1),
        hidden=torch.zeros(0),
        attention=attention,
        slots=slots,
        carry=carry,
    )


@pytest.mark.parametrize("has_cls", [True, False])
def test_paint_leaves_both_sets_in_the_carry(has_cls):
    torch.manual_seed(3)
    policy, carry = Paint(local_ratio=0.25), {}
    for layer in (0, 5):
        query, key, value = torch.randn(3, 2, 4, 20 + has_cls, 8)
        assert policy.encode(tower_view(layer, AttentionView(query, key, value, 1.0, has_cls), carry)) is None
    assert set(policy.tower_layers(5)) == {0, 5}
    assert carry[LOCAL].shape == carry[SUMMARY].shape == (2, 20)
    assert not (carry[LOCAL] & carry[SUMMARY]).any()
    assert ((carry[LOCAL].sum(-1) <= 5) & (carry[LOCAL].sum(-1) > 0)).all()


def test_paint_counts_merged_patches_together():
    query, key, value = torch.zeros(3, 1, 1, 8, 4)
    key[0, 0, [2, 3]], query[0, 0] = 1, 1
    slots = torch.tensor([[[0, 1], [2, 3], [4, 5], [6, 7]]])
    carry = {}
    Paint(local_ratio=0.25).encode(
        tower_view(0, AttentionView(query, key, value, 1.0, has_cls=False), carry, slots)
    )
    assert carry[LOCAL].tolist() == [[False, True, False, False]]


def test_ragged_tiles_select_as_they_do_alone():
    torch.manual_seed(0)
    attention = torch.rand(2, 30) ** 6
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, 21:] = False
    assert torch.equal(summary_tokens(attention, valid)[1, :21], summary_tokens(attention[1:, :21])[0])
    assert not summary_tokens(attention, valid)[1, 21:].any()
    assert not local_tokens(attention, 1.0, valid)[1, 21:].any()


def test_official_count_of_summary_tokens_loses_one_to_rounding():
    attention = torch.ones(1, 49)
    attention[0, 5] = 2  # int(49 * (1 / 49)) is 0
    assert summary_tokens(attention).sum() == 1
    assert summary_tokens(attention, official=True).sum() == 0


def test_paint_can_leave_the_first_token_alone():
    quiet = replace(ACTIVE["paint"], boost_prefill=False)
    assert quiet.modulate(view()) is None
    assert quiet.modulate(view(prefill=False, queries=1)) is not None
