"""Bad arguments of ``prune`` and models it cannot prune: one clear error, and the model is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from tests.models import clip_layers, make
from tests.refusal import refuses
from vlm_prune import BudgetError, PolicyError, StateError, UnsupportedModelError, prune, pruned, unprune
from vlm_prune.policies.flowcut import FlowCut

BAD_ARGUMENTS = {
    "unknown policy": (
        PolicyError,
        {"policy": "flowcutt"},
        ["flowcutt", 'Did you mean "flowcut"', "Available: ", "uniform"],
    ),
    "nothing like a policy": (PolicyError, {"policy": "zzz"}, ["zzz", "Available: "]),
    "not a policy": (PolicyError, {"policy": 3}, ["3", "name such as", "policy objects"]),
    "a class": (PolicyError, {"policy": FlowCut}, ["FlowCut", "policy objects"]),
    "unknown setting": (
        PolicyError,
        {"policy": "flowcut", "kompat": 1},
        ["kompat", 'Did you mean "compat"', "positions"],
    ),
    "bad setting": (PolicyError, {"policy": "flowcut", "compat": "x"}, ["compat='x'", '"official"']),
    "bad positions": (
        PolicyError,
        {"policy": "uniform", "positions": "x"},
        ["'x'", '"original"', '"compact"'],
    ),
    "setting beside an object": (
        PolicyError,
        {"policy": FlowCut(), "compat": None},
        ["compat", "on the object"],
    ),
    "too many tokens": (
        BudgetError,
        {"tokens": 37},
        ["37", "36 visual tokens per image", "1 to 36", "ratio="],
    ),
    "no token": (BudgetError, {"tokens": 0}, ["tokens=0", "1 to 36"]),
    "negative tokens": (BudgetError, {"tokens": -4}, ["tokens=-4", "1 to 36"]),
    "half a token": (BudgetError, {"tokens": 4.5}, ["tokens=4.5", "whole number"]),
    "tokens in words": (BudgetError, {"tokens": "12"}, ["tokens='12'", "whole number"]),
    "tokens as truth": (BudgetError, {"tokens": True}, ["tokens=True", "whole number"]),
    "no share": (BudgetError, {"ratio": 0}, ["ratio=0", "above 0 and up to 1"]),
    "negative share": (BudgetError, {"ratio": -0.5}, ["ratio=-0.5", "above 0"]),
    "more than all": (BudgetError, {"ratio": 1.01}, ["ratio=1.01", "up to 1"]),
    "not a number": (BudgetError, {"ratio": float("nan")}, ["ratio=nan", "above 0"]),
    "share in words": (BudgetError, {"ratio": "0.5"}, ["ratio='0.5'", "such as 0.25"]),
    "both budgets": (BudgetError, {"tokens": 9, "ratio": 0.25}, ["tokens=9", "ratio=0.25", "one of them"]),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_arguments_of_prune(case):
    error, arguments, words = BAD_ARGUMENTS[case]
    model = make("llava")
    with refuses(model, error, *words):
        prune(model, **arguments)
    assert issubclass(error, ValueError)


def test_budgets_count_what_the_language_model_gets():
    """CLS counts where it is handed on; units are tokens after the pixel shuffle, per tile."""
    with refuses(
        model := make("llava-full"), BudgetError, "tokens=38", "37 visual tokens per image", "2 to 37"
    ):
        prune(model, tokens=38)
    with refuses(model, BudgetError, "tokens=1", "2 to 37"):
        prune(model, tokens=1)
    with refuses(model := make("internvl"), BudgetError, "tokens=17", "16 visual tokens per tile", "1 to 16"):
        prune(model, tokens=17)


def test_pruned_twice_and_unpruned_unpruned():
    model = make("llava")
    with refuses(model, StateError, "not pruned"):
        unprune(model)
    prune(model, "uniform")
    with refuses(model, StateError, "pruned already (uniform)", "unprune(model)"):
        prune(model, "flowcut")
    with pytest.raises(StateError), pruned(model):
        pass
    assert model.pruning.policies[0].name == "uniform"
    unprune(model)
    with refuses(model, StateError, "not pruned"):
        unprune(model)


def tiny_text():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
        )
    )


def tiny_clip():
    return CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )


def siglip_llava():
    model = make("llava")
    model.config.vision_config = SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return model


def changed(family, **settings):
    model = make(family)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def compiled(pick):
    model = make("llava")
    pick(model).compile()
    return model


def with_module(path, replacement):
    model = make("llava")
    model.set_submodule(path, replacement)
    return model


class FusedAttention(nn.Module):
    """A fused kernel in a module's place: it reads no config."""

    def forward(self, hidden_states, *_, **__):
        return hidden_states, None


BAD_MODELS = {
    "text model": (
        tiny_text,
        ["LlamaForCausalLM", '"llama"', "no adapter", "Available: ", "internvl, janus, llava"],
    ),
    "tower alone": (tiny_clip, ["CLIPVisionModel", "clip_vision_model", "Available: "]),
    "plain module": (lambda: nn.Linear(2, 2), ["Linear", "config.model_type", "AutoModelForImageTextToText"]),
    "without head": (lambda: make("llava").model, ["LlavaModel", "language-modelling head"]),
    "other tower": (siglip_llava, ["siglip_vision_model", "CLIP"]),
    "shuffle with CLS": (
        lambda: changed("internvl", vision_feature_select_strategy="full"),
        ["full", "default"],
    ),
    "compiled in place": (lambda: compiled(lambda m: m), ["compiled", "torch.compile(prune(model))"]),
    "compiled tower": (lambda: compiled(lambda m: m.model.vision_tower), ["model.vision_tower", "compiled"]),
    "compiled": (lambda: torch.compile(make("llava")), ["compiled", "torch.compile(prune(model))"]),
    "scripted": (
        lambda: with_module("model.multi_modal_projector.act", torch.jit.script(nn.GELU())),
        ["multi_modal_projector.act", "hooks would not fire"],
    ),
    "traced": (
        lambda: with_module("model.multi_modal_projector.act", torch.fx.symbolic_trace(nn.GELU())),
        ["multi_modal_projector.act", "hooks would not fire"],
    ),
    "fused attention": (
        lambda: with_module(f"{clip_layers()}.1.self_attn", FusedAttention()),
        ["FusedAttention", "layer 1", "uniform or random"],
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("case", BAD_MODELS)
def test_models(case):
    build, words = BAD_MODELS[case]
    model = build()
    with refuses(model, UnsupportedModelError, *words):
        prune(model, "flowcut")


def test_not_a_module():
    with pytest.raises(UnsupportedModelError, match="str is not a torch module"):
        prune("llava-hf/llava-1.5-7b-hf")


def test_a_policy_that_reads_no_attention_takes_a_fused_tower():
    with pruned(with_module(f"{clip_layers()}.1.self_attn", FusedAttention()), "uniform") as model:
        assert model.pruning.policies[0].name == "uniform"
