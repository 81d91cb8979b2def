"""Attention implementations and dtypes: the same tokens, close logits."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models import EVERY, FAMILIES, LAYOUTS, make, prompt
from tests.reference import CASES, POLICIES, budget, expect
from vlm_prune import prune, pruned, unprune
from vlm_prune.registry import policy_class

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
families = pytest.mark.parametrize("family", EVERY)
cutting = pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
cases = pytest.mark.parametrize(("policy", "family", "positions"), CASES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@families
@cutting
def test_eager_keeps_what_sdpa_keeps(policy, family):
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    prune(model, policy, **budget(policy))
    sdpa, kept = model(**batch.inputs).logits, model.pruning.receipt.kept
    model.set_attn_implementation("eager")
    eager = model(**batch.inputs).logits
    assert model.pruning.receipt.kept == kept
    torch.testing.assert_close(eager, sdpa, **CLOSE)
    unprune(model)
    assert model.config.vision_config._attn_implementation == "eager"
    with pruned(model, policy, **budget(policy)):
        assert torch.equal(model(**batch.inputs).logits, eager)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_implementation_sees_the_module_it_would_see_unpruned(family, monkeypatch):
    """Flash attention asks ``module.config`` which of its versions is wanted."""
    seen = set()

    def fake_flash(module, query, key, value, attention_mask, **kwargs):
        seen.add((module.config._attn_implementation, attention_mask is None or attention_mask.dim()))
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None].bool()
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", fake_flash)
    model, batch = make(family), prompt(family, [(2, -4, 3)], seed=0)
    with pruned(model, "flowcut", **budget("flowcut")):
        want, kept = model(**batch.inputs).logits, model.pruning.receipt.kept
        model.config.vision_config._attn_implementation_internal = "flash_attention_2"
        logits = model(**batch.inputs).logits
        assert model.pruning.receipt.kept == kept
    torch.testing.assert_close(logits, want, **CLOSE)
    assert seen == {("flash_attention_2", True), ("flash_attention_2", 2)}


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, policy, family, positions):
    model = make(family).to(dtype)
    batch = prompt(family, LAYOUTS["ragged"])
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}
    with pruned(model, policy, positions=positions, **budget(policy)):
        output = model(**inputs)
        kept = model.pruning.receipt.kept
        tokens = model.generate(**inputs, max_new_tokens=3)
    assert output.logits.dtype == dtype
    assert output.logits.isfinite().all()
    assert list(map(len, kept)) == list(map(len, expect(model.float(), batch, policy)[0].units))
    assert tokens.shape[1] == batch.ids.shape[1] + 3


@pytest.mark.parametrize("policy", ["flowcut", "uniform"])
def test_policies_compute_exactly_under_autocast(policy, monkeypatch):
    model, batch, seen = make("llava"), prompt("llava", LAYOUTS["ragged"]), []
    cls = policy_class(policy)
    for name in ("encode", "encode_final"):
        stock = getattr(cls, name)

        def spy(self, view, stock=stock):
            seen.append(torch.is_autocast_enabled("cpu"))
            return stock(self, view)

        monkeypatch.setattr(cls, name, spy)
    with pruned(model, policy, **budget(policy)), torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch.inputs).logits
        tokens = model.generate(**batch.inputs, max_new_tokens=2)
    assert logits.isfinite().all()
    assert tokens.shape[1] == batch.ids.shape[1] + 2
    assert set(seen) == {False}
