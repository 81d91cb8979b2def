"""Unpruning is bit-identical to never having pruned, and a pruned model is stock to everyone who copies or saves it."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import LogitsProcessorList, StoppingCriteriaList

from tests.models import FAMILIES, LAYOUTS, attention_functions, fingerprint, make, prompt
from tests.reference import CASES, POLICIES, budget
from vlm_prune import StateError, UnsupportedCallError, prune, pruned, unprune
from vlm_prune.adapters.versions import flat_tower
from vlm_prune.call.encode_call import current_encode
from vlm_prune.call.forward_call import current_forward
from vlm_prune.versions import CACHE, cache_of

cases = pytest.mark.parametrize(("policy", "family", "positions"), CASES)


def answers(model, batch):
    with torch.no_grad():
        return model(**batch.inputs).logits, model.generate(**batch.inputs, max_new_tokens=4)


def assert_same(ours, stock):
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a, b)


def assert_nothing_under_way():
    assert current_encode() is None
    assert current_forward() is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_nothing_stays_behind(policy, family, backend):
    model, batch = make(family, backend), prompt(family, LAYOUTS["ragged"])
    stock = answers(model, batch)  # the first call installs stock hooks that record hidden states
    before = fingerprint(model)
    assert prune(model, policy, **budget(policy)) is model
    answers(model, batch)
    assert unprune(model) is model
    assert fingerprint(model) == before
    assert_nothing_under_way()
    assert_same(answers(model, batch), stock)
    with pruned(model, policy):
        pass
    assert fingerprint(model) == before


def test_attention_function_stays_while_any_model_is_pruned():
    before = attention_functions()
    first, second = make("llava"), make("internvl")
    prune(first, "flowcut")
    prune(second, "flowcut")
    unprune(first)
    assert attention_functions() > before
    answers(second, prompt("internvl", LAYOUTS["single"]))
    unprune(second)
    assert attention_functions() == before
    prune(second, "flowcut")
    del second  # never unpruned
    assert attention_functions() == before


class BrokenError(RuntimeError):
    pass


class Fault:
    """Raises at its ``number``-th call."""

    def __init__(self, number, error):
        self.left, self.error = number, error

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise self.error("as planned")

    def hook(self, *_):
        self()

    def process(self, ids, scores):
        self()
        return scores

    def stop(self, ids, scores, **_):
        self()
        return torch.zeros(len(ids), dtype=torch.bool)


PLACES = {
    "tower": lambda m: flat_tower(m.model.vision_tower).encoder,
    "projector": lambda m: m.model.multi_modal_projector.linear_2,
    "decoder layer": lambda m: m.model.language_model.layers[1],
    "head": lambda m: m.lm_head,
}
FAULTS = [
    ("tower", 1, BrokenError),
    ("tower", 1, KeyboardInterrupt),
    ("projector", 1, BrokenError),
    ("decoder layer", 1, BrokenError),
    ("decoder layer", 1, KeyboardInterrupt),
    ("decoder layer", 2, BrokenError),
    ("head", 1, BrokenError),
    ("processor", 2, BrokenError),
    ("criterion", 2, KeyboardInterrupt),
]


@pytest.mark.parametrize(("policy", "family", "positions"), CASES[1:3])
@pytest.mark.parametrize(("place", "number", "error"), FAULTS)
@pytest.mark.parametrize("method", ["generate", "__call__"])
def test_after_an_exception(method, place, number, error, policy, family, positions):
    if method == "__call__" and (number > 1 or place in ("processor", "criterion")):
        pytest.skip("one forward comes by once")
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    stock = answers(model, batch)
    before = fingerprint(model)
    prune(model, policy, positions=positions, **budget(policy))
    ours = answers(model, batch)

    fault, options = Fault(number, error), {"max_new_tokens": 4} if method == "generate" else {}
    if place == "processor":
        options["logits_processor"] = LogitsProcessorList([fault.process])
    elif place == "criterion":
        options["stopping_criteria"] = StoppingCriteriaList([fault.stop])
    else:
        handle = PLACES[place](model).register_forward_pre_hook(fault.hook)
    with pytest.raises(error):
        getattr(model, method)(**batch.inputs, **options)
    if place in PLACES:
        handle.remove()

    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    if (
        error is not KeyboardInterrupt
    ):  # after which torch runs no hooks: the next call of the model tidies up
        assert_nothing_under_way()
    with torch.no_grad():
        model(**text)
        plain = model.model.language_model(**text).last_hidden_state
        embedded = model.model.language_model(inputs_embeds=model.get_input_embeddings()(text["input_ids"]))
    assert torch.equal(embedded.last_hidden_state, plain)
    assert_same(answers(model, batch), ours)
    unprune(model)
    assert_nothing_under_way()
    assert fingerprint(model) == before
    assert_same(answers(model, batch), stock)


def test_unpruning_right_after_an_interrupt_leaves_nothing():
    model, batch = make("llava"), prompt("llava", LAYOUTS["single"])
    prune(model)
    handle = model.model.language_model.layers[1].register_forward_pre_hook(Fault(1, KeyboardInterrupt).hook)
    with pytest.raises(KeyboardInterrupt):
        model(**batch.inputs)
    handle.remove()
    unprune(model)
    assert_nothing_under_way()


def test_the_with_block_unprunes_after_an_exception():
    model = make("llava")
    before = fingerprint(model)
    with pytest.raises(BrokenError), pruned(model):
        raise BrokenError
    assert fingerprint(model) == before


@cases
def test_state_dict_and_saved_files_are_stock(policy, family, positions, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "stock")
    keys, config = list(model.state_dict()), model.config.to_json_string()
    with pruned(model, policy, positions=positions, **budget(policy)):
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules() if "prun" in name] == []
        assert model.config.to_json_string() == config
        for module in model.modules():
            json.loads(module.config.to_json_string() if hasattr(module, "config") else "0")
        model.save_pretrained(tmp_path / "pruned")
    for name in ("config.json", "generation_config.json"):
        stock, ours = (json.loads((tmp_path / kind / name).read_text()) for kind in ("stock", "pruned"))
        assert ours == stock
    stock, ours = (load_file(tmp_path / kind / "model.safetensors") for kind in ("stock", "pruned"))
    assert stock.keys() == ours.keys()
    for name in stock:
        assert torch.equal(stock[name], ours[name])


@cases
def test_a_deep_copy_is_pruned_by_itself(policy, family, positions):
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    stock, before = answers(model, batch), attention_functions()
    prune(model, policy, positions=positions, **budget(policy))
    ours = answers(model, batch)
    twin = copy.deepcopy(model)
    unprune(model)
    assert_same(answers(model, batch), stock)
    assert_same(answers(twin, batch), ours)
    assert twin.pruning.receipt.kept
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert_same(answers(twin, batch), ours)
    unprune(twin)
    assert_same(answers(twin, batch), stock)
    assert attention_functions() == before


@pytest.mark.parametrize("again", [False, True])
@torch.no_grad()
def test_a_pruned_cache_needs_a_pruned_model(again):
    model, batch = make("llava"), prompt("llava", [(3, -1, 4)])
    step = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, batch.ids.shape[1] + 1).long()}
    with pruned(model, "uniform", ratio=0.3):
        cache = cache_of(model(**batch.inputs))
        want = model(**step, **{CACHE: copy.deepcopy(cache)}).logits
    if again:
        with pruned(model, "random", ratio=0.5):
            assert torch.equal(model(**step, **{CACHE: cache}).logits, want)
        return
    with pytest.raises(UnsupportedCallError, match="or no longer"):
        model(**step, **{CACHE: cache})


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl"])
def test_a_pruned_model_is_not_pickled(family):
    model = make(family)
    with pruned(model, "flowcut"), pytest.raises(StateError, match="save_pretrained"):
        pickle.dumps(model)
    pickle.dumps(model)
