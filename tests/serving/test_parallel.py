"""Two tensor-parallel ranks answer as one does, and as the Hugging Face model."""

from __future__ import annotations

import os

import pytest

from tests.serving.checkpoints import with_twice_the_heads
from tests.serving.engines import Ask, ask, engine, expect, same, scene


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own")
@pytest.mark.parametrize(("name", "tokens"), [("tiny-llava", 32), ("tiny-internvl", 16)])
@pytest.mark.parametrize("policy", ["flowcut", "visionzip"])
def test_two_ranks_answer_as_one(name, tokens, policy, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    plan = {"policy": policy, "tokens": tokens}
    asks = [Ask((scene(seed),)) for seed in range(4)]
    asks += [Ask((scene(4), scene(5)), budget={"tokens": 5}), Ask((scene(6, (256, 128)),))]
    folder = with_twice_the_heads(name, tmp_path / name)
    with engine(folder, plan, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        same(ask(llm, asks), expect(name, asks, plan))
