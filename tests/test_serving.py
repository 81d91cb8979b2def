"""The serving plug-in without vLLM: plans and what they refuse, and the tower on modules of the shape of vLLM's."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tests.models import make, prompt, shared
from tests.policy_table import TABLE
from tests.served_models import served, with_plan
from vlm_prune import (
    POLICIES,
    BudgetError,
    PolicyError,
    StateError,
    UnsupportedCallError,
    UnsupportedModelError,
    prune,
    pruned,
)
from vlm_prune.contract.policy import Keep, Policy
from vlm_prune.registry import policy_class
from vlm_prune.serving import image_embeds
from vlm_prune.serving.encoder import ServedEncoder, live_rows
from vlm_prune.serving.plan import Plan, check_served
from vlm_prune.serving.requests import place_budget

SERVED = (
    "agilepruner", "divprune", "dycoke", "fastvid", "flowcut", "holov", "pool", "random", "scope", "uniform", "vidcom2",
    "visionzip", "vispruner", "zooprune",
)  # fmt: skip
FAMILIES = ("llava", "llava-full", "internvl")


def one_rank(x):
    raise AssertionError("there is one rank only")


def encoder(model, policy):
    return ServedEncoder(model.parts, one_rank, policy)


def features_of(model, pixels):
    """Of a pruned Hugging Face model, holes left out: a list of ``(tokens, channels)``."""
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels).pooler_output
    return [rows[~rows[:, 0].isnan()] for rows in found]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", SERVED)
def test_a_served_tower_gives_the_rows_of_a_pruned_model(family, policy):
    model, settings = (
        shared(family),
        TABLE[policy].settings | {"positions": "compact"},
    )  # as vLLM numbers them
    plan = Plan.of(with_plan(model, policy=policy, ratio=0.3, **settings))
    pixels = prompt(family, [(2, -3, 4)]).pixels
    with pruned(model, policy, ratio=0.3, **settings):
        expected = features_of(model, pixels)
    copy, tokens = served(model), plan.kept(plan.budget, plan.tiles.tokens)
    tower = encoder(copy, plan.policy)
    with torch.no_grad(), tower.keeping(plan.units(tokens)):
        rows = live_rows(copy.features(pixels), tokens)
    assert rows.shape[1] == len(expected[0]) < plan.tiles.tokens
    for ours, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_of_a_call_and_at_full_budget_the_tower_is_stock(family):
    model = shared(family)
    pixels = prompt(family, [(2, -2, 4)]).pixels
    expected = torch.stack(features_of(model, pixels))
    copy = served(model)
    plan = Plan.of(with_plan(model, policy="flowcut", ratio=0.3))
    tower = encoder(copy, plan.policy)
    tokens = plan.kept(plan.asked({"ratio": 1.0}), plan.tiles.tokens)
    with torch.no_grad():
        outside = copy.features(pixels)
        with tower.keeping(plan.units(tokens)):
            inside = copy.features(pixels)
    torch.testing.assert_close(outside, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(live_rows(inside, tokens), outside)


def test_a_batch_of_tiles_gives_what_they_give_alone():
    model = served(shared("llava"))
    tower = encoder(model, policy_class("flowcut")())
    pixels = prompt("llava", [(2, -4, 4)]).pixels
    with torch.no_grad(), tower.keeping(9):
        together = live_rows(model.features(pixels), 9)
        alone = torch.cat([live_rows(model.features(tile[None]), 9) for tile in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_ranks_that_hold_half_of_the_heads_choose_as_one_that_holds_all():
    model = served(shared("llava"))
    tower, pixels = encoder(model, policy_class("flowcut")()), prompt("llava", [(2, -1, 4)]).pixels
    with torch.no_grad(), tower.keeping(9):
        expected = live_rows(model.features(pixels), 9)
    split = served(shared("llava"))
    halves = encoder(split, policy_class("flowcut")())
    whole: list[torch.Tensor] = []
    for layer in split.vision_tower.vision_model.encoder.layers:
        layer.self_attn.attn = TwoRanks(layer.self_attn.attn, whole)
    halves.gather = lambda mine: whole.pop()
    with torch.no_grad(), halves.keeping(9):
        ours = live_rows(split.features(pixels), 9)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


class TwoRanks(torch.nn.Module):
    """Calls an attention module with each half of the heads, the first time as this rank, then as the other one."""

    def __init__(self, attention, whole):
        super().__init__()
        self.attention, self.whole = attention, whole

    def forward(self, *states):
        first, second = zip(*(x.chunk(2, -1) for x in states), strict=True)
        self.whole.append(torch.stack(states))
        mine = self.attention(*first)
        self.whole.clear()
        other = type(self.attention).forward(self.attention, *second)
        return torch.cat([mine, other], -1)


@dataclass(frozen=True)
class Loud(Policy):
    """Keeps as many tokens as an image has loud ones."""

    name = "loud"
    stages = ("encode",)

    def encode_final(self, view):
        norm = view.features.norm(dim=-1)
        loud = norm > norm.mean(-1, keepdim=True)
        return Keep.from_mask(loud, int(loud.sum(-1).max()))


def test_a_count_that_depends_on_the_image_is_refused():
    model = served(shared("llava"))
    tower = encoder(model, Loud())
    with torch.no_grad(), tower.keeping(9), pytest.raises(UnsupportedCallError, match="exactly its budget"):
        live_rows(model.features(prompt("llava", [(2, -2, 4)]).pixels), 9)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_that_vllm_has_no_place_for_say_why(name):
    if name in SERVED:
        check_served(policy_class(name)())
        return
    reason = {
        "cdpruner": "does not know the question",
        "downsample": "smaller image",
        "mmtok": "does not know the question",
        "none": "stock model",
        "mustdrop": "block table",
        "prumerge": "layer after the consumed one",
        "vhr": "attention kernels",
    }
    with pytest.raises(PolicyError, match=reason.get(name, "inside the language model")):
        check_served(policy_class(name)(**TABLE[name].settings))


REFUSED = {
    "not a dictionary": ("flowcut", PolicyError, "dictionary"),
    "no policy": ({"tokens": 64}, PolicyError, "has to name one"),
    "unknown policy": ({"policy": "flowcat"}, PolicyError, "flowcut"),
    "unknown setting": ({"policy": "flowcut", "token": 64}, PolicyError, "token"),
    "composition": ({"policy": "flowcut+vhr"}, PolicyError, "modulate"),
    "both budgets": ({"policy": "flowcut", "tokens": 4, "ratio": 0.5}, BudgetError, "one of them"),
    "too many": ({"policy": "flowcut", "tokens": 37}, BudgetError, "36"),
    "positions": ({"policy": "flowcut", "positions": "original"}, PolicyError, "compact"),
}


@pytest.mark.parametrize(("given", "error", "word"), REFUSED.values(), ids=REFUSED)
def test_a_bad_plan_is_refused(given, error, word):
    config = with_plan(shared("llava"))
    config.vlm_prune = given
    with pytest.raises(error, match=word):
        Plan.of(config)


def test_models_that_cannot_be_served_say_why():
    config = with_plan(shared("llava"), policy="flowcut")
    config.vision_feature_layer = [-2, -1]
    with pytest.raises(UnsupportedModelError, match="several layers"):
        Plan.of(config)
    config.model_type = "llava_next"
    with pytest.raises(UnsupportedModelError, match="image_embeds"):
        Plan.of(config)


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [(None, 9), ({"tokens": 1}, 1), ({"tokens": 36}, 36), ({"ratio": 0.5}, 18), ({"ratio": 1}, 36)],
)
def test_a_request_may_bring_its_own_budget(request_, tokens):
    plan = Plan.of(with_plan(shared("llava"), policy="flowcut", tokens=9))
    assert plan.kept(plan.asked(request_), plan.tiles.tokens) == tokens


@pytest.mark.parametrize("bad", [{"tokens": 37}, {"tokens": 0}, {"tokens": "9"}, {"policy": "random"}, {}, 9])
def test_a_bad_request_is_refused(bad):
    with pytest.raises(BudgetError):
        Plan.of(with_plan(shared("llava"), policy="flowcut", tokens=9)).asked(bad)


def test_a_ceiling_bounds_what_requests_may_ask_for():
    plan = Plan.of(with_plan(shared("llava"), policy="flowcut", tokens=9, ceiling={"ratio": 0.5}))
    assert plan.most(36) == 18
    assert plan.kept(plan.asked({"tokens": 18}), 36) == 18
    for bad in ({"tokens": 19}, {"ratio": 0.6}):
        with pytest.raises(BudgetError, match="keeps 18 of them at most"):
            plan.asked(bad)
    assert Plan.of(with_plan(shared("llava"), policy="flowcut", tokens=9)).most(36) == 36
    assert (
        str(plan)
        == "flowcut keeps 9 of 36 tokens of each image; requests may ask for 0.5 of the tokens at most"
    )


@pytest.mark.parametrize(
    ("ceiling", "word"),
    [({"tokens": 8}, "within it"), ({"tokens": 99}, "36"), (0.5, "may ask for"), ({}, "may ask")],
)
def test_a_bad_ceiling_is_refused(ceiling, word):
    with pytest.raises(BudgetError, match=word):
        Plan.of(with_plan(shared("llava"), policy="flowcut", tokens=9, ceiling=ceiling))


def test_a_budget_in_a_body_goes_where_the_processor_looks():
    config = with_plan(shared("llava"), policy="flowcut", tokens=9)
    request = SimpleNamespace(model_extra={"vlm_prune": {"tokens": 4}}, mm_processor_kwargs={"other": 1})
    place_budget(request, config)
    assert request.mm_processor_kwargs == {"other": 1, "vlm_prune": {"tokens": 4}}
    for extra, options, word in (
        ({"vlm_prune": {"tokens": 40}}, None, "36"),
        ({"vlm_prune": {"tokens": 4}}, {"vlm_prune": {"tokens": 5}}, "one of them"),
        ({}, {"vlm_prune": "all"}, "sets its own budget"),
    ):
        with pytest.raises(BudgetError, match=word):
            place_budget(SimpleNamespace(model_extra=extra, mm_processor_kwargs=options), config)
    plain = SimpleNamespace(model_extra={}, mm_processor_kwargs=None)
    place_budget(plain, config)
    assert plain.mm_processor_kwargs is None
    with pytest.raises(UnsupportedCallError, match="does not prune"):
        place_budget(request, shared("llava").config)


def test_caches_can_tell_policies_settings_and_budgets_apart():
    def identity(own=None, **plan):
        made = Plan.of(with_plan(shared("llava"), **plan))
        return made.identity(made.asked(own))

    same = identity(policy="random", tokens=9)
    assert same == identity(policy="random", ratio=0.25) == identity({"tokens": 9}, policy="random", tokens=3)
    others = [
        identity(policy="random", tokens=8),
        identity(policy="random", tokens=9, seed=1),
        identity(policy="uniform", tokens=9),
    ]
    assert len({same, *others}) == 4


class Processor:
    """Hands over images that are pixels already."""

    @staticmethod
    def image_processor(image, return_tensors):
        return {"pixel_values": image}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_sends_what_is_left_of_each_image(family):
    model, pixels = make(family), prompt(family, [(2, -2, 4)]).pixels
    prune(model, Loud(), ratio=0.5)
    embeds = image_embeds(model, Processor, [tile[None] for tile in pixels])
    assert len({len(rows) for rows in embeds}) == 2, "the images have as many loud tokens as each other"
    for rows, expected in zip(embeds, features_of(model, pixels), strict=True):
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)


def test_a_client_is_refused_what_an_engine_would_not_run():
    with pytest.raises(StateError):
        image_embeds(shared("llava"), Processor, [])
    with pruned(shared("llava"), "fastv", k=1), pytest.raises(PolicyError, match="prefill"):
        image_embeds(shared("llava"), Processor, [])
