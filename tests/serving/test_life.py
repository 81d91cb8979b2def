"""What servers are run with: adapters, speculative decoding, mixtures of experts, a ceiling."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.serving.checkpoints import random_qwen, with_adapter
from tests.serving.engines import TOLERANCE, Ask, ask, engine, expect, same, scene
from tests.serving.qwen_prompts import ASKS, PLAN
from vlm_prune import UnsupportedModelError
from vlm_prune.serving.checks import check_engine

STAR = "Is there a star in the image?"


def test_adapters_of_the_language_model(tmp_path):
    from vllm.lora.request import LoRARequest

    plan = {"policy": "flowcut", "tokens": 32}
    adapter, merged = with_adapter("tiny-llava", tmp_path)
    asks = [Ask((scene(1),)), Ask((scene(2),), STAR, {"tokens": 5}), Ask((), STAR)]
    expected = {False: expect("tiny-llava", asks, plan), True: expect(merged, asks, plan)}
    assert expected[False] != expected[True]
    with engine("tiny-llava", plan, enable_lora=True, max_lora_rank=8) as llm:
        for adapted in (False, True, False):
            request = LoRARequest("grown", 1, str(adapter)) if adapted else None
            # vLLM's kernels round what an adapter adds: dense answers of adapters differ as much
            same(ask(llm, asks, lora_request=request), expected[adapted], 2e-3 if adapted else TOLERANCE)


@pytest.mark.parametrize("name", ["tiny-llava", "qwen3_vl"])
def test_speculative_decoding_by_ngrams(name, tmp_path):
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    # the proposer imports numba, after which vLLM 0.32 starts no other engine in the same process
    options = {"speculative_config": guess, "distributed_executor_backend": "mp"}
    if name == "tiny-llava":
        model, plan = name, {"policy": "flowcut", "tokens": 32}
        asks = [Ask((scene(1),)), Ask((scene(2), scene(3)), STAR), Ask((scene(2),), STAR, {"tokens": 5})]
    else:
        model, plan, asks = random_qwen(name, tmp_path / name), PLAN, ASKS
    with engine(model, plan, **options, disable_log_stats=False) as llm:
        same(ask(llm, asks, 40), expect(model, asks, plan, 40))
        counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0


def test_a_mixture_of_experts(tmp_path):
    folder = random_qwen("qwen3_vl_moe", tmp_path / "moe")
    with engine(folder, PLAN) as llm:
        same(ask(llm, ASKS), expect(folder, ASKS, PLAN))


def test_a_ceiling_counts_the_tokens_of_each_image(tmp_path):
    # a quarter of a wide image are 10 tokens, of a tall one 9
    plan = {"policy": "flowcut", "ratio": 0.25, "ceiling": {"tokens": 9}}
    folder = random_qwen("qwen3_vl", tmp_path / "qwen")
    asks = [one for one in ASKS if one.budget != {"ratio": 1.0} and len(one.images) < 3]
    with engine(folder, plan) as llm:
        same(ask(llm, asks), expect(folder, asks, {"policy": "flowcut", "tokens": 9}))
        with pytest.raises(Exception, match="keeps 9 of them at most"):
            ask(llm, [ASKS[5]])
        same(ask(llm, asks[:1]), expect(folder, asks[:1], {"policy": "flowcut", "tokens": 9}))


REFUSED = {
    "a drafter that would see all tokens": ({"speculative_config": SimpleNamespace(method="eagle")}, "ngram"),
    "adapters of the tower": (
        {"lora_config": SimpleNamespace(enable_tower_connector_lora=True)},
        "enable_tower_connector_lora",
    ),
}


@pytest.mark.parametrize(("options", "word"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_wrong_is_refused(options, word):
    settings = {
        "speculative_config": None,
        "lora_config": None,
        "compilation_config": SimpleNamespace(),
        **options,
    }
    with pytest.raises(UnsupportedModelError, match=word):
        check_engine(SimpleNamespace(**settings))
