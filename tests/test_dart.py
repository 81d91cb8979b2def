"""DART against a loop that anyone can check, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from tests.models import LAYOUTS, make, prompt
from vlm_prune import pruned
from vlm_prune.contract.views import AttentionView, PrefillView
from vlm_prune.policies.dart import DART, key_norms, pivots, released_share, shares

ROWS, CHANNELS = 26, 12


def scene(seed: int, batch: int = 3) -> PrefillView:
    """A ragged batch: two images in the first sequence, padding and one text row in the last."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, ROWS, CHANNELS, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, 2, ROWS + 5, 4, generator=generator, dtype=torch.float64)
    visual = torch.zeros(batch, ROWS, dtype=torch.bool)
    visual[0, 2:9] = visual[0, 11:19] = True
    visual[1, 1:16] = True
    visual[2, 5:25] = True
    valid = torch.ones_like(visual)
    valid[2, :4] = False
    target = torch.tensor([9, 6, 11])
    attention = AttentionView(key, key, key, 0.5, has_cls=False)
    weight = torch.linspace(0.2, 2, CHANNELS, dtype=torch.float64)
    return PrefillView(
        1, 4, hidden, visual, valid, visual.sum(-1), target, attention, {}, lambda x: x * weight
    )


def loop(view: PrefillView, b: int, image: int = 4, text: int = 4) -> list[int]:
    """The visual rows that sequence ``b`` keeps, by the method's own words."""
    state = view.norm(view.hidden[b])
    norm = view.attention.key[b, :, -ROWS:].abs().sum((0, 2)).tolist()
    visual = view.visual[b].nonzero()[:, 0].tolist()
    behind = range(visual[-1] + 1, ROWS)
    first = sorted(visual, key=lambda i: -norm[i])[:image]
    second = sorted(behind, key=lambda i: -norm[i])[:text]
    target, leaders = int(view.target[b]), first + second
    kept, left = list(first), [i for i in visual if i not in first]
    for number, pivot in enumerate(leaders):
        rest = target - len(first)
        takes = rest // len(leaders) + (number < rest % len(leaders))
        cosine = {i: float(torch.cosine_similarity(state[i], state[pivot], dim=0)) for i in left}
        taken = sorted(left, key=cosine.get)[:takes]
        kept += taken
        left = [i for i in left if i not in taken]
    return sorted(kept)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("image", "text"), [(4, 4), (2, 6), (1, 0)])
def test_is_the_loop_of_the_paper(seed, image, text):
    view = scene(seed)
    keep = DART(image_pivots=image, text_pivots=text).prefill(view)
    assert keep[~view.visual].all()
    for b in range(3):
        kept = (keep[b] & view.visual[b]).nonzero()[:, 0].tolist()
        assert kept == loop(view, b, image, text)
        assert len(kept) == view.target[b]


def test_the_norms_weight_is_looked_at():
    view = scene(0)
    plain = scene(0)
    plain.norm = lambda x: x
    assert not torch.equal(DART().prefill(view), DART().prefill(plain))


@pytest.mark.parametrize("target", [0, 1, 3, 4, 5, 15, 20])
def test_any_budget_is_kept_exactly(target):
    view = scene(1)
    view.target = torch.minimum(torch.full((3,), target), view.visual.sum(-1))
    keep = DART().prefill(view) & view.visual
    assert keep.sum(-1).tolist() == view.target.tolist()


def test_a_sequence_without_an_image_keeps_its_text():
    view = scene(2)
    view.visual[1] = False
    view.target[1] = 0
    assert DART().prefill(view)[1].all()


def test_official_divides_and_rounds_down():
    view = scene(3)
    counts = (DART(compat="official").prefill(view) & view.visual).sum(-1)
    assert counts.tolist() == [4 + 8 * (9 // 8), 4, 4 + 5 * (11 // 8)]  # one text row, one pivot
    assert released_share(0.667, 576, 8) == 23
    assert released_share(0.778, 576, 8) == 15
    assert released_share(0.889, 576, 8) == 7


def test_shares():
    there = torch.tensor([[True, True, True, True], [True, True, False, False], [False] * 4])
    image, text = there[:, :2], there[:, 2:]
    assert shares(torch.tensor([9, 7, 0]), image, text).tolist() == [
        [2, 2, 2, 1],
        [3, 2, 0, 0],
        [0, 0, 0, 0],
    ]


def test_pivots_where_there_are_few():
    norms = torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 4.0]])
    among = torch.tensor([[True, False, True], [True, True, True]])
    order, there = pivots(norms, among, 4)
    assert order[0, :2].tolist() == [2, 0]
    assert order[1, :3].tolist() == [2, 0, 1]
    assert there.tolist() == [[True, True, False, False], [True, True, True, False]]


def test_norms_are_fp32_in_half_precision():
    key = torch.full((1, 2, 3, 4096), 100.0, dtype=torch.float16)
    assert key_norms(key).dtype == torch.float32
    assert key_norms(key).isfinite().all()
    assert key_norms(key, torch.float16).isinf().all()


def test_settings():
    assert DART(k=3).prefill_layers(32) == (2,)
    for wrong in ({"k": 0}, {"image_pivots": 0}, {"text_pivots": -1}, {"k": 1.0}, {"compat": "paper"}):
        with pytest.raises(ValueError, match="choose"):
            DART(**wrong)
    with pytest.raises(ValueError, match="has 4 layers, choose 1 to 4"):
        DART(k=5).prefill_layers(4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava-gqa", "internvl"])
def test_in_a_model_reaches_the_budget_and_a_batch_equals_its_rows(family):
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, DART(k=1), ratio=0.25):
        together = model(**batch.inputs).logits
        receipt = model.pruning.receipt
        for b, row in enumerate(batch.rows()):
            logits = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], logits, atol=2e-4, rtol=1e-4)
            text = row.ids.shape[1] - len(row.tiles[0]) * receipt.units
            kept = round(len(row.tiles[0]) * receipt.units * 0.25)
            assert model.pruning.receipt.decoder_tokens[1] == text + kept
