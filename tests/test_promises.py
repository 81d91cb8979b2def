"""A pruned model against the stock model that never had the dropped tokens: one forward of each policy and family."""

from __future__ import annotations

import pytest
import torch

from tests.models import EVERY, FAMILIES, IMAGE, LAYOUTS, PACKED, make, prompt, shared
from tests.reference import POLICIES, budget, expect
from vlm_prune import pruned
from vlm_prune.versions import cache_of

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
policies = pytest.mark.parametrize("policy", POLICIES)
cutting = pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
families = pytest.mark.parametrize("family", EVERY)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@families
@policies
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_is_bit_identical(policy, family, attention):
    model, batch = shared(family, attention), prompt(family, LAYOUTS["ragged"])
    stock = model(**batch.inputs, output_hidden_states=True)
    tokens = model.generate(**batch.inputs, max_new_tokens=4)
    with pruned(model, policy, ratio=1.0):
        ours = model(**batch.inputs, output_hidden_states=True)
        assert torch.equal(ours.logits, stock.logits)
        for a, b in zip(ours.hidden_states, stock.hidden_states, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(cache_of(ours).layers, cache_of(stock).layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)
        assert torch.equal(model.generate(**batch.inputs, max_new_tokens=4), tokens)


@families
@policies
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("positions", "pad"), [(None, "left"), ("original", "left"), (None, "right")])
def test_live_rows_are_those_of_the_shortened_prompt(policy, family, positions, pad, layout):
    model, batch = shared(family), prompt(family, LAYOUTS[layout], pad)
    kept, short = expect(model, batch, policy, positions)
    with short.given(model):
        want = model(**short.inputs).logits
    with pruned(model, policy, positions=positions, **budget(policy)):
        logits = model(**batch.inputs).logits
        assert model.pruning.receipt.kept == kept.units
    assert logits.shape == (*batch.ids.shape, want.shape[-1])
    for b, rows in enumerate(short.rows):
        torch.testing.assert_close(logits[b, rows], want[b, -len(rows) :], **CLOSE)
        dropped = (batch.ids[b] == IMAGE).index_fill(0, torch.tensor(rows), False)
        assert not logits[b, dropped].any()


@families
@policies
def test_a_prompt_may_end_with_an_image(policy, family):
    """The next token then follows from the last row that is left, as it does for the shortened prompt."""
    model, batch = shared(family), prompt(family, [(3, -1), (2, -1, 4)])
    _, short = expect(model, batch, policy)
    with short.given(model):
        want = model(**short.inputs).logits[:, -1]
        tokens = model.generate(**short.inputs, max_new_tokens=4)
    with pruned(model, policy, **budget(policy)):
        logits = model(**batch.inputs).logits[:, -1]
        ours = model.generate(**batch.inputs, max_new_tokens=4)[:, batch.ids.shape[1] :]
    torch.testing.assert_close(logits, want, **CLOSE)
    assert logits.any(-1).all()
    assert torch.equal(ours, tokens)


@families
@policies
@pytest.mark.parametrize("layout", ["ragged", "row-without-image"])
def test_a_batch_gives_what_its_rows_give_alone(policy, family, layout):
    model, batch = shared(family), prompt(family, LAYOUTS[layout])
    with pruned(model, policy, **budget(policy)):
        together, kept = model(**batch.inputs).logits, model.pruning.receipt.kept
        tokens = model.generate(**batch.inputs, max_new_tokens=4)[:, batch.ids.shape[1] :]
        alone = []
        for b, row in enumerate(batch.rows()):
            torch.testing.assert_close(
                together[b, batch.mask[b].bool()], model(**row.inputs).logits[0], **CLOSE
            )
            alone += model.pruning.receipt.kept if row.tiles[0] else []
            new = model.generate(**row.inputs, max_new_tokens=4)[0, row.ids.shape[1] :]
            assert new.tolist() == tokens[b].tolist()
        assert alone == kept


@families
@cutting
def test_text_only_calls_are_untouched(policy, family):
    model, batch = shared(family), prompt(family, [(5,), (8,)])
    logits, tokens = model(**batch.inputs).logits, model.generate(**batch.inputs, max_new_tokens=4)
    with pruned(model, policy):
        assert torch.equal(model(**batch.inputs).logits, logits)
        assert torch.equal(model.generate(**batch.inputs, max_new_tokens=4), tokens)
        assert model.pruning.receipt is None


@families
@cutting
def test_without_an_attention_mask(policy, family):
    model, batch = shared(family), prompt(family, [(3, -1, 5), (4, -1, 5 if family in PACKED else 4)])
    _, short = expect(model, batch, policy)
    with short.given(model):
        want = model(**short.inputs).logits
    inputs = {name: x for name, x in batch.inputs.items() if name != "attention_mask"}
    with pruned(model, policy, **budget(policy)):
        for options in ({}, {"use_cache": False}):
            logits = model(**inputs, **options).logits
            for b, rows in enumerate(short.rows):
                torch.testing.assert_close(logits[b, rows], want[b, -len(rows) :], **CLOSE)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_flowcut_cuts_inside_the_tower_and_differently_for_each_image(family, seed):
    """Guards the tests above: their images must drive the adaptive schedule apart."""
    model, batch = make(family, seed=seed), prompt(family, [(2, -4, 3)], seed=seed)
    with pruned(model, "flowcut", **budget("flowcut")):
        model(**batch.inputs)
        together = model.pruning.receipt.tower_tokens
        schedules = set()
        for tile in batch.pixels:
            model.get_image_features(tile[None])
            schedules.add(tuple(model.pruning.receipt.tower_tokens))
    assert len(schedules) > 1
    assert together == [max(counts) for counts in zip(*schedules, strict=True)]
