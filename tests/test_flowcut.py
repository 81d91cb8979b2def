"""FlowCut in a tower that keeps its shapes: it masks what it drops, and keeps what a tower that cuts keeps."""

from __future__ import annotations

import pytest
import torch

from tests.models import prompt, shared
from vlm_prune import pruned
from vlm_prune.contract.keep import top_mask
from vlm_prune.contract.views import AttentionView
from vlm_prune.encode import fixed
from vlm_prune.policies.flowcut import information_score, layer_scores, value_magnitude
from vlm_prune.policies.scores import global_attention, global_similarity


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next"])
@pytest.mark.parametrize("segments", [[(3, -1, 5)], [(2, -1, 4), (1, -1, 6)]], ids=["one", "batch"])
@torch.no_grad()
def test_masking_keeps_what_cutting_keeps(family, segments, monkeypatch):
    model, inputs = shared(family), prompt(family, segments).inputs
    for seed in range(3):
        inputs["pixel_values"] = torch.randn(
            inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed)
        )
        with pruned(model, "flowcut", ratio=0.3):
            cut = model(**inputs)
            receipt = model.pruning.receipt
            assert not receipt.tower_masked
            monkeypatch.setitem(fixed.STILL, "cpu", 1e12)
            masked = model(**inputs)
            monkeypatch.delitem(fixed.STILL, "cpu")
        torch.testing.assert_close(masked.logits, cut.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_receipt_says_what_was_computed_and_what_was_left(monkeypatch):
    model, inputs = shared("llava"), prompt("llava", [(3, -1, 5)]).inputs
    with pruned(model, "flowcut", ratio=0.3):
        model(**inputs)
        cut = model.pruning.receipt
        monkeypatch.setitem(fixed.STILL, "cpu", 1e12)
        model(**inputs)
        masked = model.pruning.receipt
    assert masked.tower_masked
    assert "masked and not cut" in str(masked)
    assert "masked" not in str(cut)
    assert masked.tower_units == cut.tower_units
    assert masked.kept == cut.kept
    assert len(set(cut.tower_tokens)) > 2
    assert len(set(masked.tower_tokens)) == 2  # all tokens, until the last cut takes out what was masked
    assert masked.flops > cut.flops


@torch.no_grad()
def test_many_images_are_cut_where_few_are_masked(monkeypatch):
    model = shared("llava")
    with pruned(model, "flowcut", ratio=0.3):
        encoder = model.pruning._encoder
        one = fixed.tower_flops(encoder.tower.width, encoder.tower.weights, [[37]])
        monkeypatch.setitem(fixed.STILL, "cpu", 1.5 * one)
        for segments, still in (([(3, -1, 5)], True), ([(3, -1, 5)] * 2, False)):
            model(**prompt("llava", segments).inputs)
            assert model.pruning.receipt.tower_masked is still


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_layers_scored_together_have_the_scores_that_each_has_by_itself(has_cls, ragged):
    torch.manual_seed(0)
    valid = None
    if ragged:
        valid = torch.rand(2, 9) < 0.6
        valid[:, 0] = True
    layers = [AttentionView(*torch.randn(3, 2, 4, 9, 8), 0.3, has_cls, valid) for _ in range(2)]
    attention, scores = layer_scores(layers)
    for number, view in enumerate(layers):
        alone = global_attention(view)
        magnitude = value_magnitude(view.value[:, :, 1:] if has_cls else view.value)
        score = information_score(alone, global_similarity(view), magnitude) if has_cls else alone * magnitude
        torch.testing.assert_close(attention[number], alone)
        torch.testing.assert_close(scores[number], score)


def test_top_mask_is_a_loop_over_ranks():
    torch.manual_seed(0)
    scores = torch.randint(0, 4, (5, 12)).float()
    scores[0, 3] = torch.nan
    among, count = torch.rand(5, 12) < 0.7, torch.tensor([0, 1, 4, 9, 12])
    for row, (score, mine, wanted) in enumerate(zip(scores, among, count.tolist(), strict=True)):
        ranked = sorted(
            (i for i in range(12) if mine[i]), key=lambda i: (-score[i].nan_to_num(nan=-1e9).item(), i)
        )
        chosen = top_mask(scores, count, among)[row].nonzero()[:, 0].tolist()
        assert chosen == sorted(ranked[:wanted])
