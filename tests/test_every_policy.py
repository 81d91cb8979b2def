"""What every policy promises by itself: one set of tests for all rows of `tests.policy_table`."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from tests.models import IMAGE, fingerprint, prompt
from tests.policy_checks import (
    CLOSE,
    RAGGED,
    answer,
    assert_like_singles,
    assert_stock,
    entered,
    generate,
    stock,
    tiny,
)
from tests.policy_table import ENCODE, EVICTING, RATIO, TABLE, options
from vlm_prune import prune, pruned, unprune
from vlm_prune.registry import POLICIES
from vlm_prune.versions import cache_of

alone = pytest.mark.parametrize("policy", sorted(TABLE))
families = pytest.mark.parametrize("family", ["llava", "internvl"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_every_registered_policy_has_a_row():
    assert set(TABLE) == set(POLICIES)


@alone
@families
def test_keeping_everything_changes_nothing(policy, family):
    model, batch, row = tiny(family), prompt(family, RAGGED), TABLE[policy]
    logits, sequences = stock(family)
    with pruned(model, **options(policy, 1.0, **row.idle)):
        ours, said = model(**batch.inputs).logits, generate(model, batch.inputs).sequences
    if row.exact:
        assert torch.equal(ours, logits)
    else:
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(said, sequences)


@alone
@families
def test_policies_do_something(policy, family):
    """Guards the other tests: settings under which nothing happens show nothing."""
    if policy == "none":
        pytest.skip("keeps all by its nature")
    model, batch = tiny(family), prompt(family, RAGGED)
    logits, _ = stock(family)
    if policy in EVICTING:  # the prefill sees everything, and the second word is the first that may differ
        logits = answer(model, batch.inputs)[1][:, :2]
    with pruned(model, **options(policy)):
        ours = answer(model, batch.inputs)[1][:, :2] if policy in EVICTING else model(**batch.inputs).logits
    assert ((ours[:, -1] - logits[:, -1]).abs().amax(-1) > 1e-3).all()


@alone
@families
def test_a_batch_gives_what_its_rows_give_alone(policy, family):
    model, batch = tiny(family), prompt(family, RAGGED)
    with pruned(model, **options(policy)):
        receipt, left = assert_like_singles(model, batch, policy)
    dense = (batch.ids == IMAGE).sum(-1).tolist()
    counts = [len(kept) for kept in receipt.kept]
    holds, came = TABLE[policy].holds, entered(batch, receipt)
    if holds != "all" and policy in ENCODE:
        assert receipt.planned == round(RATIO * receipt.units)
    if holds == "tile":
        assert set(counts) == {receipt.planned}
    elif holds == "most":
        assert receipt.planned / 2 < max(counts) <= receipt.planned
    elif holds == "prompt":
        assert left == [round(RATIO * n) for n in dense]
    elif holds == "exit":
        assert left == [0] * len(dense)
    elif holds in ("all", "cache"):
        assert left == came == dense
    if holds in ("tile", "most"):
        assert left == came


@pytest.mark.parametrize("policy", EVICTING)
@families
def test_caches_hold_their_budget(policy, family):
    model = tiny(family)
    with pruned(model, **options(policy)):
        for row in prompt(family, RAGGED).rows():
            stored = [layer.keys.shape[2] for layer in cache_of(model(**row.inputs)).layers]
            images = int((row.ids == IMAGE).sum())
            share = row.ids.shape[1] - images + round(RATIO * images)
            assert sum(stored) == share * len(stored)


@families
def test_vflowopt_holds_its_budget_on_average(family):
    model = tiny(family)
    with pruned(model, **options("vflowopt")):
        for row in prompt(family, RAGGED).rows():
            model(**row.inputs)
            receipt, text = model.pruning.receipt, int((row.ids != IMAGE).sum())
            held = [n - text for n in receipt.decoder_tokens]
            tiles = len(row.tiles[0])
            assert sum(held) / len(held) == pytest.approx(
                receipt.planned * tiles, abs=0.5 + tiles / len(held)
            )


@alone
@families
def test_beams_of_a_batch_are_those_of_its_rows(policy, family):
    model, batch = tiny(family), prompt(family, RAGGED)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    start = batch.ids.shape[1]
    with pruned(model, **options(policy)):
        together = generate(model, batch.inputs, **beams)
        for b, row in enumerate(batch.rows()):
            single = generate(model, row.inputs, **beams)
            new = together.sequences[2 * b : 2 * b + 2, start:]
            assert single.sequences[:, row.ids.shape[1] :].tolist() == new.tolist()
            score = together.sequences_scores[2 * b : 2 * b + 2]
            torch.testing.assert_close(single.sequences_scores, score, **CLOSE)


class PlannedError(RuntimeError):
    pass


class Fault:
    """A logits processor that raises when it is called the second time."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls == 2:
            raise PlannedError
        return scores


@alone
@families
def test_unpruning_leaves_nothing(policy, family):
    model, batch = tiny(family), prompt(family, RAGGED)
    stock(family)
    before = fingerprint(model)
    with pytest.raises(PlannedError), pruned(model, **options(policy)):
        generate(model, batch.inputs, logits_processor=LogitsProcessorList([Fault()]))
    assert fingerprint(model) == before
    assert_stock(model, family)
    prune(model, **options(policy))
    with pytest.raises(PlannedError):
        generate(model, batch.inputs, logits_processor=LogitsProcessorList([Fault()]))
    ours = generate(model, batch.inputs).sequences
    unprune(model)
    with pruned(model, **options(policy)):
        assert torch.equal(generate(model, batch.inputs).sequences, ours)
    assert fingerprint(model) == before
    assert_stock(model, family)


@alone
@families
def test_eager_gives_what_sdpa_gives(policy, family):
    batch, seen = prompt(family, RAGGED), []
    for attention in ("sdpa", "eager"):
        model = tiny(family, attention)
        with pruned(model, **options(policy)):
            logits = model(**batch.inputs).logits
            receipt = model.pruning.receipt
            seen.append((logits, receipt.kept, receipt.decoder_tokens, answer(model, batch.inputs)[0]))
    (logits, *sdpa), (other, *eager) = seen
    real = batch.mask.bool()
    torch.testing.assert_close(logits[real], other[real], **CLOSE)
    assert sdpa[:2] == eager[:2]
    assert torch.equal(sdpa[2], eager[2])
