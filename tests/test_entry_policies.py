"""Policies that choose at the decoder's entry, at work in whole models."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.models import LAYOUTS, make, prompt
from tests.reference_entry import ENTRY, entry_choose
from vlm_prune import pruned
from vlm_prune.registry import policy_class

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
policies = pytest.mark.parametrize("policy", ENTRY)
families = pytest.mark.parametrize("family", ["llava", "llava-full", "internvl"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@families
@policies
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("layout", ["ragged", "several-images"])
def test_live_rows_are_those_of_the_shortened_prompt(policy, family, positions, layout):
    model, batch = make(family), prompt(family, LAYOUTS[layout])
    target = round(reference.RATIO * reference._units(model))
    kept = entry_choose(model, batch, policy, target)
    short = reference.shorten(model, batch, kept, positions)
    want = model(**short.inputs).logits
    with pruned(model, policy_class(policy)(positions=positions), ratio=reference.RATIO):
        logits = model(**batch.inputs).logits
        assert model.pruning.receipt.kept == kept.units
    for b, rows in enumerate(short.rows):
        torch.testing.assert_close(logits[b, rows], want[b, -len(rows) :], **CLOSE)


@families
@policies
def test_the_question_decides(policy, family):
    model, batch = make(family), prompt(family, [(3, -1, 9)])
    other = prompt(family, [(3, -1, 9)])
    other.ids[:, -9:] = other.ids[:, -9:].flip(-1) // 2 + 3
    kept = []
    with pruned(model, policy, ratio=reference.RATIO):
        for one in (batch, other):
            model(**one.inputs)
            kept.append(model.pruning.receipt.kept)
    assert kept[0] != kept[1]


@families
@policies
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_budget(policy, family, dtype):
    model, batch = make(family).to(dtype), prompt(family, LAYOUTS["several-images"])
    inputs = {**batch.inputs, "pixel_values": batch.pixels.to(dtype)}
    for compat in (None, "official"):
        with pruned(model, policy_class(policy)(compat=compat), tokens=7 + int(family == "llava-full")):
            assert not model(**inputs).logits.isnan().any()
            assert [len(units) for units in model.pruning.receipt.kept] == [7] * len(batch.pixels)
