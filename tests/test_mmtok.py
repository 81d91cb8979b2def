"""MMTok against the loop of the paper, and where its released code picks a token twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_encode import mmtok_units
from tests.test_diversity import UNITS, tiles
from vlm_prune.policies.mmtok import MMTok, multimodal_cover, spread

WORDS, WIDTH = 5, 48


def question(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of three questions, and projected tokens: ``(3, WORDS, WIDTH)``, ``(3, UNITS, WIDTH)``."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(3, WORDS + UNITS, WIDTH, generator=generator, dtype=torch.float64)
    return both[:, :WORDS], both[:, WORDS:]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, UNITS), alpha=st.sampled_from([0.5, 3.0]))
def test_is_the_loop_of_the_paper(seed, keep, alpha):
    features, _ = tiles(seed)
    text, projected = question(seed)
    order = multimodal_cover(features, keep, text, projected, alpha=alpha)
    assert order.sort(-1).values.tolist() == [
        mmtok_units(features[b], keep, text[b], projected[b], alpha=alpha) for b in range(3)
    ]
    alone = multimodal_cover(features, keep)
    assert alone.sort(-1).values.tolist() == [mmtok_units(x, keep) for x in features]


def test_a_question_changes_the_choice():
    features, _ = tiles(1)
    text, projected = question(1)
    asked = multimodal_cover(features, 6, text, projected, alpha=0.05)
    assert not torch.equal(asked, multimodal_cover(features, 6))
    assert not torch.equal(asked, multimodal_cover(features, 6, text.flip(0), projected, alpha=0.05))


def test_words_that_do_not_count():
    features, _ = tiles(2)
    text, projected = question(2)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    together = multimodal_cover(features, 6, text, projected, valid)
    assert torch.equal(together[:1], multimodal_cover(features[:1], 6, text[:1, :3], projected[:1]))
    assert torch.equal(together[1:2], multimodal_cover(features[1:2], 6, text[1:2], projected[1:2]))
    assert torch.equal(together[2:], multimodal_cover(features[2:], 6))
    assert torch.equal(together[2:], multimodal_cover(features[2:], 6, text[2:, :0], projected[2:]))


def test_each_row_spreads_one_share():
    text, projected = question(3)
    share = spread(text, projected, 0.02)
    torch.testing.assert_close(share.sum(-1), torch.full((3, WORDS), 1 / WORDS, dtype=torch.float64))
    valid = torch.tensor([[1, 0, 1, 0, 0]] * 3).bool()
    torch.testing.assert_close(
        spread(text, projected, 0.02, valid).sum(-1)[:, 0], torch.full((3,), 0.5).double()
    )


def test_barred_tokens_are_never_picked_but_take_part():
    features, _ = tiles(4)
    candidates = torch.ones(3, UNITS, dtype=torch.bool)
    candidates[:, :10] = False
    order = multimodal_cover(features, UNITS - 10, candidates=candidates)
    assert order.sort(-1).values.tolist() == [list(range(10, UNITS))] * 3
    few = multimodal_cover(features, 4, candidates=candidates)
    cut_out = multimodal_cover(features[:, 10:], 4) + 10
    assert not torch.equal(few, cut_out), "they are covered, and drew a share of the softmax"


def test_a_row_of_zeros_in_half_precision():
    features = tiles(5)[0].half()
    features[:, 7] = 0
    order = multimodal_cover(features, UNITS)
    assert order.sort(-1).values.tolist() == [list(range(UNITS))] * 3
    assert not spread(features, features, 0.2).isnan().any()
    assert spread(features, features, 0.2, official=True).isnan().any()


def test_temperatures_as_released():
    assert MMTok().for_family("llava", mrope=False).text_temperature == 0.02
    assert MMTok().for_family("qwen2_5_vl", mrope=True).text_temperature == 0.01
    assert MMTok(text_temperature=0.1).for_family("qwen2_5_vl", mrope=True).text_temperature == 0.1


def test_settings():
    for wrong in ({"alpha": -1}, {"text_temperature": 0}, {"image_temperature": 0}, {"compat": "paper"}):
        with pytest.raises(ValueError, match="choose"):
            MMTok(**wrong)
