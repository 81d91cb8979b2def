"""What an engine refuses to start with, what it checks itself, and what its front end tells the scheduler."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from tests.serving.engines import Ask, ask, engine, scene
from vlm_prune.eval.models import model_path
from vlm_prune.policies.flowcut import FlowCut
from vlm_prune.serving.checks import check_ranks_agree

REFUSED = {
    "prefill policy": ({"policy": "fastv"}, {}, "block table"),
    "modulating policy": ({"policy": "vhr"}, {}, "attention kernels"),
    "unknown policy": ({"policy": "flowcat"}, {}, "flowcut"),
    "too many tokens": ({"policy": "flowcut", "tokens": 257}, {}, "256"),
    "other implementation": ({"policy": "flowcut"}, {"model_impl": "transformers"}, "own implementation"),
    "compiled tower": (
        {"policy": "flowcut"},
        {"compilation_config": {"compile_mm_encoder": True}},
        "compile_mm_encoder",
    ),
    "budget in the wrong place": (
        {"policy": "flowcut"},
        {"mm_processor_kwargs": {"vlm_prune": {"tokens": 8}}},
        "hf_overrides",
    ),
}


@pytest.mark.parametrize(("plan", "options", "word"), REFUSED.values(), ids=REFUSED)
def test_an_engine_that_would_not_prune_does_not_start(plan, options, word):
    with pytest.raises(Exception, match=word), engine("tiny-llava", plan, **options):
        pass


def test_a_model_that_cannot_be_pruned_does_not_start(tmp_path):
    config = AutoConfig.from_pretrained(model_path("tiny-llava"))
    config.text_config.architectures = ["LlamaForCausalLM"]
    config.text_config.save_pretrained(tmp_path)
    options = {"load_format": "dummy", "skip_tokenizer_init": True}
    with pytest.raises(Exception, match="cannot prune"), engine(tmp_path, {"policy": "flowcut"}, **options):
        pass


def test_the_self_check_sees_another_number_of_rows(monkeypatch):
    monkeypatch.setattr(FlowCut, "encode", lambda *args: None)
    plan = {"policy": "flowcut", "tokens": 32}
    with pytest.raises(Exception, match="room for 32"), engine("tiny-llava", plan):
        pass


def test_the_self_check_sees_ranks_that_disagree(monkeypatch):
    mine, other = torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]])
    votes = {"agree": mine.float() * 2, "disagree": mine.float() + other.float()}
    for name, seen in votes.items():
        monkeypatch.setattr("vllm.distributed.tensor_model_parallel_all_reduce", lambda x, seen=seen: seen)
        if name == "agree":
            check_ranks_agree(mine, 2)
        else:
            with pytest.raises(RuntimeError, match="different visual tokens"):
                check_ranks_agree(mine, 2)


@pytest.mark.parametrize(("name", "most"), [("tiny-llava", 256), ("tiny-internvl", 5 * 64)])
def test_the_scheduler_knows_the_largest_image_a_request_may_ask_for(name, most):
    with engine(name, {"policy": "flowcut", "tokens": 8}) as llm:
        info = processor(llm).info
        assert info.get_mm_max_tokens_per_item(1024, {"image": 1})["image"] == most


def test_the_image_hash_holds_policy_settings_and_budget():
    plans = [None, {"policy": "random", "tokens": 8}, {"policy": "random", "tokens": 8, "seed": 1}]
    plans += [{"policy": "uniform", "tokens": 8}, {"policy": "uniform", "tokens": 9}]
    hashes = []
    for plan in plans:
        with engine("tiny-llava", plan) as llm:
            hashes.append(image_hash(llm, {}))
            if plan == plans[-1]:
                assert image_hash(llm, {"vlm_prune": {"tokens": 8}}) == hashes[-2]
    assert len(set(hashes)) == len(plans)


def test_more_rows_than_the_prompt_has_room_for_stop_the_engine(monkeypatch):
    with engine("tiny-llava", {"policy": "flowcut", "tokens": 32}) as llm:
        monkeypatch.setattr(FlowCut, "encode", lambda *args: None)
        with pytest.raises(Exception, match="room for 32"):
            ask(llm, [Ask((scene(1),))])


def processor(llm):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(llm.model_config)


def image_hash(llm, kwargs):
    made = processor(llm)
    items = made.info.parse_mm_data({"image": [scene(1)]})
    return made("USER: <image>\nHi. ASSISTANT:", items, hf_processor_mm_kwargs=kwargs)["mm_hashes"]["image"][
        0
    ]
