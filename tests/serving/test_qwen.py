"""Qwen-VL: a pruned engine answers as the pruned Hugging Face model does, whose tokens keep their places."""

from __future__ import annotations

import os

import pytest

from tests.serving.engines import ask, engine, expect, same, scene
from tests.serving.qwen_prompts import ASKS, PLAN, TALL, WIDE, See

POLICIES = ("agilepruner", "divprune", "flowcut", "pool", "random", "uniform", "visionzip")
SLOW = ("agilepruner", "divprune", "random", "uniform")
"""Act where others do; on Qwen3-VL, left to a long run."""


ALL = [
    pytest.param(kind, policy, marks=[pytest.mark.slow] if kind == "qwen3_vl" and policy in SLOW else [])
    for kind in ("qwen2_5_vl", "qwen3_vl")
    for policy in POLICIES
]


@pytest.mark.parametrize(("folder", "policy"), ALL, indirect=["folder"])
def test_every_policy_as_on_hugging_face(folder, policy):
    plan = {"policy": policy, "ratio": 0.25}
    # random draws by the bits of pixels, which are others in the last place if the tower normalises them
    options = {"mm_device_do_normalize": False} if policy == "random" else {}
    with engine(folder, plan, **options) as llm:
        same(ask(llm, ASKS), expect(folder, ASKS, plan))


def test_answers_of_this_model_depend_on_image_and_budget(folder):
    answers = {tuple(round(logprob, 3) for logprob in one.logprobs) for one in expect(folder, ASKS, PLAN)}
    assert len(answers) == len(ASKS)


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


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own")
@pytest.mark.parametrize("policy", ["flowcut", "visionzip"])
def test_two_ranks_answer_as_one(folder, policy, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    plan = {"policy": policy, "ratio": 0.25}
    with engine(folder, plan, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        same(ask(llm, ASKS), expect(folder, ASKS, plan))


def test_a_compiled_language_model(folder, tmp_path, monkeypatch):
    if "qwen3" in folder.name:
        pytest.skip("vLLM warms up on the words of the published tokenizer, which this random model's lacks")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with engine(folder, PLAN, enforce_eager=False) as llm:
        same(ask(llm, ASKS), expect(folder, ASKS, PLAN))


def test_requests_that_are_preempted_and_computed_again(folder):
    asks, most = [one for one in ASKS if one.budget != {"ratio": 1.0}] * 2, 60
    blocks = {"block_size": 32, "num_gpu_blocks_override": 10, "max_model_len": 160}
    with engine(folder, PLAN, **blocks, disable_log_stats=False) as llm:
        same(ask(llm, asks, most), expect(folder, asks, PLAN, most))
        counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counts["vllm:num_preemptions"] > 0
