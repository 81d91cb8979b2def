"""Attention that some rows pay in a decoder layer, ranking by it, and FastV, against the whole map."""

import pytest
import torch

from tests.models import LAYOUTS, make, prompt
from vlm_prune import pruned
from vlm_prune.contract.views import AttentionView, PrefillView
from vlm_prune.kernels import reference
from vlm_prune.policies.fastv import FastV
from vlm_prune.policies.scores import attention_mass, last_row, top_mask


def random_view(batch=3, heads=6, shared=2, rows=13, past=0, valid=None) -> AttentionView:
    query = torch.randn(batch, heads, rows, 8)
    key, value = torch.randn(2, batch, shared, past + rows, 8)
    return AttentionView(query, key, value, 0.4, has_cls=False, valid=valid)


def whole_map(view: AttentionView) -> torch.Tensor:
    """Head-averaged attention ``(batch, rows, keys)``, keys repeated, one row and sequence at a time."""
    batch, heads, rows, _ = view.query.shape
    key = view.key.repeat_interleave(heads // view.key.shape[1], dim=1).double()
    past = key.shape[2] - rows
    out = torch.zeros(batch, rows, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for i in range(rows):
            seen = [j for j in range(past + i + 1) if view.valid is None or view.valid[b, j]]
            if not seen:
                continue
            logits = (key[b, :, seen] @ view.query[b, :, i, :, None].double())[..., 0] * view.scaling
            out[b, i, seen] = logits.softmax(-1).mean(0)
    return out


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_mass_equals_whole_map(shared, past, chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", chunk)
    valid = torch.ones(3, past + 13, dtype=torch.bool)
    valid[1, past : past + 4] = False
    view = random_view(shared=shared, past=past, valid=valid)
    voters = torch.zeros(3, 13, dtype=torch.bool)
    voters[0, 9:], voters[1, [6, 12]] = True, True  # the third sequence has none
    total, peak = attention_mass(view, voters)
    full = whole_map(view)[..., past:] * voters[..., None]
    torch.testing.assert_close(total.double(), full.sum(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(peak.double(), full.amax(1), atol=1e-6, rtol=1e-5)


def test_half_precision_is_summed_in_single():
    view = random_view()
    half = AttentionView(view.query.half(), view.key.half(), view.value.half(), 0.4, has_cls=False)
    total, peak = attention_mass(half, torch.ones(3, 13, dtype=torch.bool))
    assert total.dtype == peak.dtype == torch.float32
    torch.testing.assert_close(total.sum(-1), torch.full((3,), 13.0))


def test_last_row_under_padding_of_both_sides():
    valid = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert last_row(valid, valid).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert last_row(None, valid).tolist() == [[0, 0, 0, 1]] * 3


def test_top_mask():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[3.0, 9.0, 3.0, 1.0], [nan, 9.0, -inf, 1.0], [1.0, 2.0, inf, nan]])
    among = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert top_mask(scores, torch.tensor([1, 3, 9]), among).tolist() == [
        [1, 0, 0, 0],
        [1, 0, 1, 1],
        [1, 1, 1, 1],
    ]
    assert top_mask(scores, torch.tensor([0, 1, 3]), among).tolist() == [[0] * 4, [0, 0, 0, 1], [1, 1, 1, 0]]


def test_keeps_what_the_last_row_looks_at():
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[1, 11:] = False  # padded on the right
    view = random_view(batch=2, valid=valid)
    visual = torch.zeros_like(valid)
    visual[:, 2:9] = True
    target = torch.tensor([3, 2])
    keep = FastV(k=2).prefill(
        PrefillView(1, 4, torch.zeros(2, 13, 5), visual, valid, visual.sum(-1), target, view, {})
    )
    full = whole_map(view)
    for b, last in ((0, 12), (1, 10)):
        best = full[b, last, 2:9].topk(int(target[b])).indices + 2
        assert keep[b].nonzero()[:, 0].tolist() == sorted([*best.tolist(), 0, 1, *range(9, 13)])


def test_settings():
    assert FastV(k=3).prefill_layers(32) == (2,)
    for k in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="choose a number of layers"):
            FastV(k=k)
    with pytest.raises(ValueError, match="has 4 layers, choose 1 to 4"):
        FastV(k=5).prefill_layers(4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava-gqa", "internvl"])
def test_in_a_model_reaches_the_budget_and_a_batch_equals_its_rows(family):
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, FastV(k=1), ratio=0.25):
        together = model(**batch.inputs).logits
        receipt = model.pruning.receipt
        visual = max(len(tiles) for tiles in batch.tiles) * receipt.units
        assert receipt.decoder_tokens[1] < receipt.decoder_tokens[0] - visual // 2
        for b, row in enumerate(batch.rows()):
            logits = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], logits, atol=2e-4, rtol=1e-4)
            text = row.ids.shape[1] - len(row.tiles[0]) * receipt.units
            kept = round(len(row.tiles[0]) * receipt.units * 0.25)
            assert model.pruning.receipt.decoder_tokens[1] == text + kept
