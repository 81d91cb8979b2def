"""Qwen2.5-VL: a pruned engine answers as the pruned Hugging Face model does, whose tokens keep their places."""

from __future__ import annotations

from functools import partial

import pytest

from tests.serving.checkpoints import random_qwen2_5_vl
from tests.serving.engines import Ask, ask, engine, expect, same, scene
from vlm_prune.serving.qwen import mend_cpu_runner

POLICIES = ("agilepruner", "divprune", "flowcut", "pool", "random", "uniform", "visionzip")
See = partial(Ask, mark="<|vision_start|><image><|vision_end|>\n")
WIDE, TALL = (224, 136), (112, 256)
PLAN = {"policy": "flowcut", "ratio": 0.25}


@pytest.fixture(scope="module", autouse=True)
def mended():
    mend_cpu_runner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_qwen2_5_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def served(folder):
    with engine(folder, PLAN) as llm:
        yield llm


ASKS = [
    See((scene(1, WIDE),)),
    See((scene(2, WIDE), scene(3, TALL))),
    See((scene(4, TALL),), budget={"tokens": 7}),
    See((scene(5, (168, 168)), scene(5, (168, 168)), scene(6, WIDE)), budget={"tokens": 1}),
    See((), "Is there a star in the image?"),
    See((scene(1, WIDE),), budget={"ratio": 1.0}),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_as_on_hugging_face(folder, policy):
    plan = {"policy": policy, "ratio": 0.25}
    with engine(folder, plan) as llm:
        same(ask(llm, ASKS), expect(folder, ASKS, plan))


def test_prompts_that_are_cached(folder, served):
    expected = expect(folder, ASKS, PLAN)
    for one, answer in zip(ASKS, expected, strict=True):
        same(ask(served, [one]), [answer])
        same(ask(served, [one]), [answer])
    again = [See(one.images, "Is there a star in the image?", one.budget) for one in ASKS]
    same(ask(served, again), expect(folder, again, PLAN))
