"""The census of a prefill: counted as a loop would, and the same whether the host or the device does it."""

from __future__ import annotations

import pytest
import torch

from tests.models import prompt, shared
from tests.policy_table import options
from vlm_prune import pruned
from vlm_prune.call import forward_call as calls
from vlm_prune.call.budget import Budget
from vlm_prune.call.row_counts import Census
from vlm_prune.language.layers import DecoderLayers


@pytest.mark.parametrize("kinds", [0, 1, 2])
@pytest.mark.parametrize("holes", [False, True])
def test_counts_what_a_loop_counts(kinds, holes):
    generator = torch.Generator().manual_seed(kinds)
    kind = torch.randint(0, 3, (4, 50), generator=generator)
    alive = torch.rand(4, 50, generator=generator) > 0.3 if holes else torch.ones(4, 50, dtype=torch.bool)
    live = alive & (torch.rand(4, 50, generator=generator) > 0.2)
    found = Census.take([kind == n for n in range(kinds)], live, alive if holes else None)
    for row in range(4):
        cells = list(zip(kind[row].tolist(), live[row].tolist(), alive[row].tolist(), strict=True))
        assert found.live[row] == sum(lives for _, lives, _ in cells)
        assert found.visual[row] == sum(lives and which < kinds for which, lives, _ in cells)
        assert found.text[row] == sum(lives and which >= kinds for which, lives, _ in cells)
        for n in range(kinds):
            assert found.placeholders[n][row] == sum(which == n for which, _, _ in cells)
    assert found.holes == (~alive).sum()
    assert found.width == max(found.live)
    assert not found.even


def test_a_turn_of_nothing_has_one_row():
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    found = Census.take([~nothing], nothing, nothing)
    assert (found.width, found.even) == (1, False)


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("policy", ["fastv", "vflowopt", "dyvte", "mustdrop"])
def test_the_host_plans_what_the_device_would_count(policy, family, monkeypatch):
    model, inputs = shared(family), prompt(family, [(3, -2, 5)]).inputs
    seen = []

    def count(self, *masks):
        planned = original(self, *masks)
        live = masks[0] if masks and masks[0] is not None else torch.ones_like(self.image_masks[0])
        seen.append((planned, Census.take(self.image_masks, live, masks[1] if len(masks) > 1 else None)))
        return planned

    original = calls.ForwardCall.count
    monkeypatch.setattr(calls.ForwardCall, "count", count)
    with pruned(model, **options(policy)), torch.no_grad():
        model(**inputs)
    assert seen
    assert seen[0][0] == seen[0][1]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1 / 9, 0.15, 0.45, 0.7])
def test_host_and_device_round_a_share_alike(ratio):
    budget = Budget(ratio=ratio)
    counts = torch.arange(3000)
    assert budget.of_visual(counts, None).tolist() == [budget.of_prompt(n, []) for n in counts.tolist()]


@torch.no_grad()
def test_a_cut_that_the_device_counts_is_not_forgotten():
    """MustDrop asks the device what it leaves; FastV, after it, is planned on the host."""
    settings = {"mustdrop": {"layers": (0, 1), "merge_threshold": 1.0}, "fastv": {"k": 2}}
    model, batch = shared("llava"), prompt("llava", [(3, -1, 5), (2, -1, 1)])
    with pruned(model, "mustdrop+fastv", ratio=0.2, **settings):
        together = model(**batch.inputs).logits
        kept = model.pruning.receipt.decoder_tokens
        for b, row in enumerate(batch.rows()):
            alone = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], alone, atol=5e-4, rtol=1e-3)
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("policy", ["fastv", "vflowopt"])
@torch.no_grad()
def test_placeholders_that_are_masked_out(policy):
    """They are no rows that could be left, so the host does not plan with them."""
    model, batch = shared("llava"), prompt("llava", [(9, -1, 5), (2, -1, 4)])
    inputs = {**batch.inputs, "attention_mask": batch.mask.clone()}
    first = int((batch.ids[0] == batch.ids[0].mode().values).nonzero()[0])
    inputs["attention_mask"][0, first : first + 20] = 0
    with pruned(model, **options(policy)):
        planned = model(**inputs).logits
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecoderLayers, "_left", lambda *_: None)
            counted = model(**inputs).logits
    assert torch.equal(planned, counted)


@torch.no_grad()
def test_a_placeholder_that_stands_for_nothing(monkeypatch):
    """Stock code takes it for an ordinary token where its own check is off."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    model, batch = shared("qwen3_vl"), prompt("qwen3_vl", [(3, -1, 5), (4, -1, 3)])
    inputs = batch.inputs  # mm_token_type_ids say that it is text
    inputs["input_ids"][1, -1] = 61
    with pruned(model, "fastv"):
        assert model(**inputs).logits.isfinite().all()
