"""PruMerge's choices and sums on numbers one can check by hand, and against loops."""

import pytest
import torch

from tests.models import LAYOUTS, prompt, shared
from tests.reference_encode import prumerge_rows
from vlm_prune import pruned
from vlm_prune.contract.views import FeaturesView
from vlm_prune.policies.prumerge import (
    KEPT,
    NEAR,
    ORDER,
    SCORE,
    PruMerge,
    merge,
    nearest,
    ordered,
    outliers,
    released_order,
    with_every,
    with_spread,
)


def answer(policy, score, keys, x, target):
    """The policy's answer where the tower's layer left scores and keys."""
    units, mask = score.shape[1], policy.chosen(score, target)
    order, kept = ordered(mask), mask.sum(-1, keepdim=True).expand(-1, units)
    most = policy._most(kept, target)
    near = torch.nn.functional.pad(nearest(keys, order, most), (0, 0, 0, units - most))
    carry = {SCORE: score, ORDER: order, KEPT: kept} | {
        f"{NEAR}{n}": c for n, c in enumerate(near.unbind(-1))
    }
    view = FeaturesView(x, (1, units), target, torch.zeros(len(x), dtype=torch.int64), None, carry)
    return policy.encode_final(view)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("units", [8, 40])
def test_equals_a_loop(units, plus):
    g = torch.Generator().manual_seed(units)
    score = torch.rand(3, units, generator=g).softmax(-1)
    keys, x = (torch.randn(3, units, 6, generator=g) for _ in range(2))
    for target in (2, 3, units // 2, units - 1):
        ours = answer(PruMerge(plus=plus), score, keys, x, target)
        for b in range(3):
            index, rows = prumerge_rows(score[b].tolist(), keys[b], x[b], target, plus)
            assert ours.index[b].tolist() == index
            torch.testing.assert_close(ours.rows[b], rows, atol=1e-5, rtol=1e-5)


def test_a_budget_of_one_has_no_extra_token():
    score, x = torch.tensor([[0.1, 0.6, 0.3]]), torch.eye(3)[None]
    ours = answer(PruMerge(), score, x, x, 1)
    assert ours.index.tolist() == [[1]]
    torch.testing.assert_close(ours.rows, torch.tensor([[[0.1, 1.0, 0.3]]]))


def test_outliers_are_beyond_the_upper_fence():
    flat = torch.full((100,), 0.01)
    peaky = flat.clone()
    peaky[:7] = 1.0
    assert outliers(torch.stack([flat, peaky])).tolist() == [0, 7]


@pytest.mark.parametrize("plus", [False, True])
def test_adaptive_images_decide_for_themselves(plus):
    far = torch.arange(1, 94, 14)  # seven outliers: beside these, every fourth token, as 100 // 7 // 3 = 4
    score, g = torch.full((2, 100), 0.01), torch.Generator().manual_seed(0)
    score[1, far] = 1.0
    kept = [{0}, set(far.tolist())]
    if plus:
        kept = [kept[0] | {0, 33, 66, 99}, kept[1] | set(range(0, 100, 4))]
    keys, x = (torch.randn(2, 100, 6, generator=g) for _ in range(2))
    ours = answer(PruMerge(plus=plus, adaptive=True), score, keys, x, 20)
    for units, some in zip(ours.tolist(), kept, strict=True):
        assert some < set(units)
        assert len(units) == len(some) + 1
    alone = answer(PruMerge(plus=plus, adaptive=True), score[:1], keys[:1], x[:1], 20)
    assert alone.tolist()[0] == ours.tolist()[0]
    torch.testing.assert_close(ours.rows[0][ours.valid[0]], alone.rows[0])


def test_places():
    taken = torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0]]).bool()
    assert with_spread(taken, 2, 3).nonzero()[:, 1].tolist() == [0, 1, 3, 5, 6]
    assert with_every(taken, torch.tensor([[3]])).nonzero()[:, 1].tolist() == [0, 1, 3, 5, 6]
    assert ordered(taken).tolist() == [[1, 5, 0, 2, 3, 4, 6, 7]]
    assert released_order(torch.tensor([[5, 1]]), 6).tolist() == [[5, 1, 0, 2, 3, 4]]
    # one token twice: the lowest other one is missing
    assert released_order(torch.tensor([[5, 1, 5]]), 6).tolist() == [[5, 1, 5, 2, 3, 4]]


def test_scores_are_weights_and_their_sum_does_not_matter():
    x, order = torch.eye(4)[None], torch.tensor([[2, 0, 1, 3]])
    near = torch.tensor([[[1, 3]]])  # places of tokens 0 and 3
    score = torch.tensor([[0.5, 0.25, 7.0, 0.125]])
    rows, rest = merge(x, score, order, torch.tensor([1]), near)
    assert rows.tolist() == [[[0.5, 0.0, 1.0, 0.125]]]
    assert rest.tolist() == [[0.5, 0.25, 0.0, 0.125]]


def test_budgets_at_which_the_released_code_stops():
    score = torch.rand(2, 576).softmax(-1)
    official = PruMerge(plus=True, compat="official")
    assert official.first(score, 145).shape == (2, 144)
    with pytest.raises(ValueError, match="keep 145 of 576"):
        official.first(score, 100)
    with pytest.raises(ValueError, match="takes one image"):
        PruMerge(plus=True, adaptive=True, compat="official").first(score, 100)
    with pytest.raises(ValueError, match="plus='yes'"):
        PruMerge(plus="yes")


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("fields", [{"plus": True}, {"adaptive": True}, {"plus": True, "adaptive": True}])
@torch.no_grad()
def test_modes_in_models(family, fields):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, PruMerge(**fields), ratio=0.4):
        together, kept = model(**batch.inputs).logits, model.pruning.receipt.kept
        alone = []
        for b, row in enumerate(batch.rows()):
            logits = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], logits, atol=3e-4, rtol=1e-3)
            alone += model.pruning.receipt.kept
    assert alone == kept


@pytest.mark.parametrize("fields", [{}, {"adaptive": True}])
@torch.no_grad()
def test_official_mode_in_a_model(fields):
    model, batch = shared("llava"), prompt("llava", LAYOUTS["single"])
    with pruned(model, PruMerge(compat="official", **fields), ratio=0.4):
        assert model(**batch.inputs).logits.isfinite().all()
        assert model.pruning.receipt.kept[0] == list(range(len(model.pruning.receipt.kept[0])))
