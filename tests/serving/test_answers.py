"""A pruned engine answers as the pruned Hugging Face model does: tokens, log-probabilities and prompt lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.serving.engines import Ask, ask, engine, expect, same, scene
from vlm_prune.eval.pope import score_pope
from vlm_prune.eval.scenes import make_scenes, pope_questions

POLICIES = ("agilepruner", "divprune", "pool", "random", "uniform", "visionzip")
MODELS = {"tiny-llava": 256, "tiny-internvl": 64}
BUDGET = {"tiny-llava": 32, "tiny-internvl": 16}


@pytest.fixture(scope="module", params=MODELS)
def served(request):
    """A FlowCut engine of each model: its name, the engine, its plan, visual tokens of a tile."""
    plan = {"policy": "flowcut", "tokens": BUDGET[request.param]}
    with engine(request.param, plan, enable_mm_embeds=True) as llm:
        yield request.param, llm, plan, MODELS[request.param]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_every_policy_as_on_hugging_face(name, policy):
    plan = {"policy": policy, "ratio": 0.25}
    asks = [Ask((scene(seed),)) for seed in range(4)] + [Ask((scene(9, (256, 128)),))]
    with engine(name, plan) as llm:
        same(ask(llm, asks), expect(name, asks, plan))


@pytest.mark.parametrize("name", MODELS)
def test_without_a_plan_the_stock_model_answers(name):
    asks = [Ask((scene(1),)), Ask((scene(2), scene(3))), Ask((), "Is there a star in the image?")]
    with engine(name, None) as llm:
        same(ask(llm, asks), expect(name, asks, None))
        with pytest.raises(Exception, match="does not prune"):
            ask(llm, [replace(asks[0], budget={"tokens": 8})])


def test_budgets_of_requests_in_one_batch(served):
    name, llm, plan, dense = served
    budgets = [None, {"tokens": 1}, {"tokens": 7}, {"ratio": 0.5}, {"tokens": dense}, {"ratio": 1.0}]
    asks = [Ask((scene(number // 2),), budget=budget) for number, budget in enumerate(budgets)]
    same(ask(llm, asks), expect(name, asks, plan))


def test_several_images_and_none(served):
    name, llm, plan, _ = served
    asks = [
        Ask((scene(1), scene(2))),
        Ask((), "Is there a star in the image?"),
        Ask((scene(3), scene(3), scene(4)), budget={"tokens": 5}),
        Ask((scene(5, (256, 128)),)),
        Ask((scene(6, (128, 256)), scene(7))),
    ]
    same(ask(llm, asks), expect(name, asks, plan))


def test_caches_keep_budgets_apart(served):
    name, llm, plan, _ = served
    asks = [
        Ask((scene(8),), budget=budget) for budget in ({"tokens": 4}, None, {"tokens": 4}, {"ratio": 1.0})
    ]
    expected = expect(name, asks, plan)
    for one, answer in zip(asks, expected, strict=True):
        same(ask(llm, [one]), [answer])
    same(ask(llm, asks), expected)
    again = [replace(one, question="Is there a star in the image?") for one in asks]
    same(ask(llm, again), expect(name, again, plan))


@pytest.mark.parametrize(
    "budget", [{"tokens": 0}, {"tokens": 1000}, {"ratio": 2}, {"policy": "random"}, "all"]
)
def test_a_bad_budget_is_refused_and_the_engine_goes_on(served, budget):
    name, llm, plan, _ = served
    with pytest.raises(Exception, match=r"tokens|ratio"):
        ask(llm, [Ask((scene(1),), budget=budget)])
    asks = [Ask((scene(1),))]
    same(ask(llm, asks), expect(name, asks, plan))


@pytest.mark.parametrize("name", MODELS)
def test_chunked_prefill_and_small_blocks(name):
    plan = {"policy": "flowcut", "tokens": BUDGET[name]}
    asks = [Ask((scene(seed),)) for seed in range(3)] + [Ask((scene(4),), budget={"ratio": 1.0})]
    options = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "enable_prefix_caching": True}
    with engine(name, plan, **options) as llm:
        expected = expect(name, asks, plan)
        same(ask(llm, asks), expected)
        same(ask(llm, asks), expected)


def test_a_compiled_language_model(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    plan = {"policy": "flowcut", "tokens": 32}
    asks = [Ask((scene(seed),)) for seed in range(2)]
    with engine("tiny-llava", plan, enforce_eager=False) as llm:
        same(ask(llm, asks), expect("tiny-llava", asks, plan))


def test_pope_on_200_questions(served):
    name, llm, plan, _ = served
    scenes = list(make_scenes(34, seed=7, min_names=3))
    questions = pope_questions(scenes, "popular", seed=7)[:200]
    asks = [Ask((scenes[q["image"]].image,), q["text"]) for q in questions]
    ours, theirs = ask(llm, asks, 4), expect(name, asks, plan, 4)
    same(ours, theirs)
    tokenizer = llm.get_tokenizer()
    scores = [
        score_pope(
            questions,
            [
                {
                    "question_id": q["question_id"],
                    "text": tokenizer.decode(a.tokens, skip_special_tokens=True).strip(),
                }
                for q, a in zip(questions, answers, strict=True)
            ],
        ).summary()
        for answers in (ours, theirs)
    ]
    assert len(questions) == 200
    assert scores[0] == scores[1]
    assert scores[0]["f1"] > 0.9
    print(f"\n{name}, {plan}: POPE F1 {scores[0]['f1']:.3f} on {len(questions)} questions, both ways")
