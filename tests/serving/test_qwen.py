"""Qwen2.5-VL: a pruned engine answers as the pruned Hugging Face model does, whose tokens keep their places."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import torch

from tests.serving.checkpoints import random_qwen2_5_vl
from tests.serving.engines import Ask, ask, engine, expect, hugging_face, same, scene
from vlm_prune.policies.flowcut import FlowCut
from vlm_prune.serving import qwen

POLICIES = ("agilepruner", "divprune", "flowcut", "pool", "random", "uniform", "visionzip")
See = partial(Ask, mark="<|vision_start|><image><|vision_end|>\n")
WIDE, TALL = (224, 136), (112, 256)
PLAN = {"policy": "flowcut", "ratio": 0.25}
STAR = "Is there a star in the image?"

ASKS = [
    See((scene(1, WIDE),)),
    See((scene(2, WIDE), scene(3, TALL))),
    See((scene(4, TALL),), budget={"tokens": 7}),
    See((scene(5, (168, 168)), scene(5, (168, 168)), scene(6, WIDE)), budget={"tokens": 1}),
    See((), STAR),
    See((scene(1, WIDE),), budget={"ratio": 1.0}),
    See((scene(7, TALL), scene(8, WIDE)), STAR, mark="<image>"),
]
"""One image and several, of different sizes, apart and side by side, budgets of their own, and none."""


@pytest.fixture(scope="module", autouse=True)
def mended():
    qwen.mend_cpu_runner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_qwen2_5_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def served(folder):
    with engine(folder, PLAN, enable_mm_embeds=True) as llm:
        yield llm


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_as_on_hugging_face(folder, policy):
    plan = {"policy": policy, "ratio": 0.25}
    # random draws by the bits of pixels, which are others in the last place if the tower normalises them
    options = {"mm_device_do_normalize": False} if policy == "random" else {}
    with engine(folder, plan, **options) as llm:
        same(ask(llm, ASKS), expect(folder, ASKS, plan))


def test_answers_of_this_model_depend_on_image_and_budget(folder):
    answers = [tuple(one.tokens) for one in expect(folder, ASKS, PLAN)]
    assert len(set(answers)) == len(answers)


def test_prompts_that_are_cached(folder, served):
    expected = expect(folder, ASKS, PLAN)
    for one, answer in zip(ASKS, expected, strict=True):
        same(ask(served, [one]), [answer])
        same(ask(served, [one]), [answer])
    again = [See(one.images, "Where is it?", one.budget) for one in ASKS]
    same(ask(served, again), expect(folder, again, PLAN))


def test_chunks_that_end_within_an_image(folder):
    asks = [*ASKS, See((scene(9, WIDE), scene(10, TALL), scene(11, WIDE)), budget={"ratio": 0.9})]
    options = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "enable_prefix_caching": True}
    with engine(folder, PLAN, **options) as llm:
        expected = expect(folder, asks, PLAN)
        same(ask(llm, asks), expected)
        same(ask(llm, asks), expected)
        for one, answer in zip(asks, expected, strict=True):
            same(ask(llm, [one]), [answer])


def test_without_a_plan_the_stock_model_answers(folder):
    asks = [ASKS[0], ASKS[1], ASKS[4]]
    with engine(folder, None) as llm:
        same(ask(llm, asks), expect(folder, asks, None))
        assert "video" in llm.llm_engine.renderer.get_mm_processor().info.allowed_mm_limits
        with pytest.raises(Exception, match="does not prune"):
            ask(llm, [ASKS[2]])


def test_images_that_come_as_embeddings_are_whole(folder, served):
    one = See((scene(1, WIDE), scene(2, TALL)))
    model, processor = hugging_face(folder)
    inputs = processor.image_processor(list(one.images), return_tensors="pt")
    with torch.no_grad():
        embeds = model.get_image_features(**inputs).pooler_output
    images = {"image_embeds": torch.cat([*embeds]), "image_grid_thw": inputs["image_grid_thw"]}
    request = {"prompt": one.prompt, "multi_modal_data": {"image": images}}
    same(ask(served, [one], requests=[request]), expect(folder, [one], None))


def test_what_is_refused_leaves_the_engine_going(folder, served):
    video = np.zeros((4, 112, 112, 3), np.uint8)
    request = {
        "prompt": "<|vision_start|><video><|vision_end|>",
        "multi_modal_data": {"video": [(video, {"fps": 2.0, "frames_indices": [0, 1, 2, 3]})]},
    }
    with pytest.raises(Exception, match="video"):
        ask(served, [See(())], requests=[request])
    ends = {"prompt": "USER: <image>", "multi_modal_data": {"image": [scene(1)]}}
    with pytest.raises(Exception, match="ends with an image"):
        ask(served, [See(())], requests=[ends])
    with pytest.raises(Exception, match="at least one token"):
        ask(served, [See((scene(1),), budget={"tokens": 0})])
    same(ask(served, ASKS[:1]), expect(folder, ASKS[:1], PLAN))


def test_engines_that_would_be_wrong_do_not_start(folder, monkeypatch):
    refused = [
        ({"policy": "flowcut", "compat": "official"}, {}, "released code"),
        ({"policy": "flowcut", "positions": "compact"}, {}, "place in the image"),
        (PLAN, {"mm_encoder_tp_mode": "data"}, "mm_encoder_tp_mode"),
    ]
    for plan, options, word in refused:
        with pytest.raises(Exception, match=word), engine(folder, plan, **options):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(FlowCut, "encode", lambda *args: None)
        with pytest.raises(Exception, match="room for 4"), engine(folder, PLAN):
            pass


def test_an_engine_on_cpu_says_what_has_to_be_mended(folder, monkeypatch):
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    monkeypatch.setattr(CPUModelRunner, "load_model", CPUModelRunner.load_model.stock)
    with pytest.raises(Exception, match="mend_cpu_runner"), engine(folder, PLAN):
        pass
    with engine(folder, None) as llm:
        same(ask(llm, ASKS[:1]), expect(folder, ASKS[:1], None))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own")
@pytest.mark.parametrize("policy", ["flowcut", "visionzip"])
def test_two_ranks_answer_as_one(folder, policy, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    plan = {"policy": policy, "ratio": 0.25}
    with engine(folder, plan, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        same(ask(llm, ASKS), expect(folder, ASKS, plan))
