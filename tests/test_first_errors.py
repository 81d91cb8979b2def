"""What people get wrong in their first hour: other spellings are understood, or the message says what to write."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import vlm_prune
from tests.models import make
from tests.refusal import refuses
from vlm_prune import (
    POLICIES,
    BudgetError,
    ModelNotFoundError,
    PolicyError,
    PruningError,
    UnsupportedModelError,
    prune,
    pruned,
)
from vlm_prune.eval import load_model
from vlm_prune.policies.elsewhere import ELSEWHERE
from vlm_prune.policies.flowcut import FlowCut
from vlm_prune.registry import ALIASES

NUMBERS = {
    "numpy": np.int64(9),
    "numpy, small": np.uint8(9),
    "numpy, without dimensions": np.array(9),
    "torch": torch.tensor(9),
}


@pytest.mark.parametrize("tokens", NUMBERS.values(), ids=NUMBERS)
def test_whole_numbers_of_any_kind_are_budgets(tokens):
    with pruned(make("llava"), "uniform", tokens=tokens) as model:
        assert type(model.pruning.budget.tokens) is int
        assert model.pruning.budget.tokens == 9
        assert json.loads(json.dumps(model.pruning.config))["tokens"] == 9


@pytest.mark.parametrize("ratio", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), np.int64(1)])
def test_numbers_of_any_kind_are_shares(ratio):
    with pruned(make("llava"), "uniform", ratio=ratio) as model:
        assert model.pruning.budget.ratio == float(ratio)
        json.dumps(model.pruning.config)


@pytest.mark.parametrize(
    "tokens", [np.bool_(True), torch.tensor(True), np.float64(9), torch.tensor(9.0), np.array([9])]
)
def test_what_is_no_whole_number_is_no_number_of_tokens(tokens):
    with refuses(model := make("llava"), BudgetError, "whole number", "ratio="):
        prune(model, "uniform", tokens=tokens)


def test_numbers_of_any_kind_are_settings():
    with pruned(make("llava"), "random", ratio=0.25, seed=np.int64(3)) as model:
        assert json.loads(json.dumps(model.pruning.config))["settings"]["seed"] == 3


def test_spaces_around_a_plus():
    with pruned(make("llava"), " flowcut + vhr ", tokens=9, vhr={"alpha": 1.5}) as model:
        assert model.pruning.name == "flowcut+vhr"


BUDGETS = {
    "keep_ratio": (0.25, "ratio=0.25"),
    "num_tokens": (64, "tokens=64"),
    "budget": (64, "tokens=64 or ratio=0.25"),
    "prune_ratio": (0.75, "tokens=64 or ratio=0.25"),
    "keep": (64, "tokens=64 or ratio=0.25"),
}


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("policy", ["flowcut", "flowcut+vhr"])
def test_the_budget_by_another_name(policy, name):
    value, remedy = BUDGETS[name]
    with refuses(model := make("llava"), PolicyError, f"{name}={value!r} is no setting", f"Give {remedy}"):
        prune(model, policy, **{name: value})


CASES = {
    "seed in words": ({"policy": "random", "seed": "a"}, ["seed='a'", "whole number"]),
    "half a seed": ({"policy": "random", "seed": 0.5}, ["seed=0.5", "whole number"]),
    "seed of 64 bits": ({"policy": "random", "seed": 2**63}, ["63 bits"]),
    "none with tokens": (
        {"policy": "none", "tokens": 9},
        ['policy="none" drops no tokens', "tokens=9 has no meaning", "Leave it out"],
    ),
    "none with a ratio": (
        {"policy": "none", "ratio": 0.25},
        ['policy="none" drops no tokens', "ratio=0.25 has no"],
    ),
    "none composed": ({"policy": "none+vhr", "tokens": 9}, ['policy="none+vhr" drops no tokens', "tokens=9"]),
    "nothing after +": ({"policy": "flowcut+"}, ['policy="flowcut+"', "name is missing"]),
    "policy beside config": (
        {"policy": "flowcut", "config": {"policy": "uniform"}},
        ["nothing beside it", "(policy given)"],
    ),
    "per beside config": ({"per": "tile", "config": {"policy": "uniform"}}, ["(per given)"]),
    "setting beside config": ({"compat": None, "config": {"policy": "uniform"}}, ["(compat given)"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_when_pruning(case):
    arguments, words = CASES[case]
    with refuses(model := make("llava"), PruningError, *words):
        prune(model, **arguments)


def test_none_takes_all_of_the_tokens_and_leaves_the_budget_to_others():
    with pruned(make("llava"), "none") as model:
        assert model.pruning.budget.ratio == 1.0
    with pruned(make("llava"), "none+fastv", tokens=9) as model:
        assert model.pruning.budget.tokens == 9


def test_a_config_alone_is_taken_by_all_three():
    with pruned(make("llava"), config={"policy": "uniform", "tokens": 9}) as model:
        assert model.pruning.name == "uniform"
    for function in (prune, pruned):
        assert inspect.signature(function).parameters["policy"].default == "flowcut"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ToMe", ["ToMe, which merges similar tokens", '"visionzip"']),
        ("tome", ["ToMe, which merges similar tokens", "docs/contributing.md"]),
        ("prefixkv", ["PrefixKV, which evicts rows of the KV cache", '"snapkv"']),
        ("snap_kv", ['Did you mean "snapkv"?']),
        ("llava-prumerge", ['Did you mean "prumerge"?']),
        ("opera", ["OPERA", '"vcd"']),
        ("flowcutt", ['Did you mean "flowcut"?']),
    ],
)
def test_methods_of_the_field_that_are_not_here(name, words):
    with refuses(
        model := make("llava"), PolicyError, f'policy="{name}" is not known.', *words, "Available: "
    ):
        prune(model, name)


def test_a_method_that_is_not_here_is_not_taken_for_a_misspelt_one():
    with pytest.raises(PolicyError) as caught:
        prune(make("llava"), "fastervlm")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda: load_model("llava-hf/llava-1.5-7b-hf"), "from_pretrained"),
        (lambda: prune(make("llava"), FlowCut), r"such as FlowCut\(\)"),
    ],
)
def test_what_to_give_instead(asked, words):
    with pytest.raises(ValueError, match=words):
        asked()


def test_the_nearest_is_there():
    assert {nearest for _, _, nearest in ELSEWHERE.values()} <= set(POLICIES)
    assert len(ELSEWHERE) > 60


def test_another_name_of_a_policy():
    assert set(ALIASES.values()) <= set(POLICIES)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_models_without_an_adapter_say_what_they_lack():
    text = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=32))
    with refuses(text, UnsupportedModelError, '"llama"', "no vision tower", "no visual tokens to prune"):
        prune(text)
    tower = CLIPVisionModel(CLIPVisionConfig(**SMALL))
    with refuses(tower, UnsupportedModelError, "only a vision tower", "whole vision-language model"):
        prune(tower)
    other = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=32))
    other.config.model_type, other.config.vision_config = "idefics9", {}
    with refuses(other, UnsupportedModelError, '"idefics9"', "docs/contributing.md", "Available: "):
        prune(other)
    for model in (text, tower, other):
        with pytest.raises(UnsupportedModelError) as caught:
            prune(model)
        assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "llava-hf/llava-1.5-7b-hf",
            'vlm_prune.from_pretrained("llava-hf/llava-1.5-7b-hf", policy="flowcut")',
        ),
        ("tiny-llava", 'vlm_prune.eval.load_model("tiny-llava")'),
        ("tiny-lava", 'Did you mean the test model "tiny-llava"?'),
    ],
)
def test_a_name_in_place_of_a_model(name, remedy):
    with pytest.raises(UnsupportedModelError) as caught:
        prune(name)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"policy": "flowcut"}, {"config": {"policy": "uniform"}}])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny-lava", ["no folder of that name", 'Did you mean "tiny-llava"?']),
        ("/no/such/folder", ["no folder of that name"]),
        ("llava-hf/llava-1.5-7b-hf", ["HF_HUB_OFFLINE=1", "hf download llava-hf/llava-1.5-7b-hf"]),
    ],
)
def test_a_model_that_is_not_there(name, words, options):
    with pytest.raises(ModelNotFoundError) as caught:
        vlm_prune.from_pretrained(name, **options)
    assert isinstance(caught.value, OSError)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_a_model(tmp_path):
    for policy in (None, "uniform"):
        with pytest.raises(ModelNotFoundError, match=r"holds no complete checkpoint \(no config\.json\)"):
            vlm_prune.from_pretrained(tmp_path, policy)


def test_a_shipped_model_by_its_name():
    model = vlm_prune.from_pretrained("tiny-llava", "uniform", tokens=64)
    assert model.pruning.budget.tokens == 64
    with pytest.raises(PolicyError, match="per= and capture= go with a policy"):
        vlm_prune.from_pretrained("tiny-llava", per="image")
    with pytest.raises(PolicyError, match=r"nothing beside it \(per given\)"):
        vlm_prune.from_pretrained("tiny-llava", per="image", config={"policy": "uniform"})


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (
            {"policy": "flowcut", "tokens": 9},
            "<Pruning: flowcut on llava, tokens=9 per image, stages encode>",
        ),
        (
            {"policy": "fastv+vhr", "ratio": 0.25, "fastv": {"k": 1}},
            "<Pruning: fastv+vhr on llava, ratio=0.25 per image, stages prefill, modulate>",
        ),
        ({"policy": "vhr"}, "<Pruning: vhr on llava, all tokens, stages modulate>"),
        ({"policy": "none"}, "<Pruning: none on llava, all tokens, stages encode>"),
    ],
)
def test_what_is_at_work(arguments, shown):
    with pruned(make("llava"), **arguments) as model:
        assert repr(model.pruning) == shown
