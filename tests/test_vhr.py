"""VHR: which heads are reinforced, and in which layers."""

from dataclasses import replace

import pytest
import torch

from tests.modulation import ACTIVE, view
from vlm_prune.policies.vhr import VHR, head_divergence, surging_heads, text_activation, vision_aware_heads


@pytest.mark.parametrize(("heads", "chosen"), [(8, 4), (7, 3), (1, 0)])
def test_half_of_the_heads_are_chosen(heads, chosen):
    torch.manual_seed(0)
    with_image, without = torch.randn(2, 3, heads, 16)
    assert (vision_aware_heads(with_image, without).sum(-1) == chosen).all()


def test_head_that_surges_without_the_image_is_not_chosen():
    torch.manual_seed(0)
    with_image, without = torch.randn(2, 1, 16, 8)
    without[0, 3] *= 30
    surging = surging_heads(head_divergence(with_image, without), text_activation(without))
    assert surging[0].nonzero().tolist() == [[3]]
    assert not vision_aware_heads(with_image, without)[0, 3]
    assert vision_aware_heads(with_image, without, drop_surging=False)[0, 3]


def test_vhr_scales_the_papers_layers_to_the_depth():
    assert VHR().modulate_layers(32) == {1, *range(18, 32)}
    assert VHR().modulate_layers(8) == {1, 4, 5, 6, 7}
    assert VHR().modulate_layers(1) == {0}


def test_second_image_keeps_the_heads_of_the_first():
    v, policy = view(), ACTIVE["vhr"]
    policy.modulate(v)
    heads = v.state["vhr_heads"].clone()
    policy.modulate(replace(v, text_only=torch.randn_like(v.text_only)))
    assert torch.equal(v.state["vhr_heads"], heads)
