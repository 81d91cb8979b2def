"""Serving Qwen2.5-VL without vLLM: plans, the tower on modules of the shape of vLLM's, and places of kept tokens."""

from __future__ import annotations

import pytest
import torch

from tests.models import prompt, shared
from tests.packed import skip_unless_it_counts_on
from tests.policy_table import TABLE
from tests.served_models import with_plan
from tests.served_qwen import Qwen
from vlm_prune import BudgetError, PolicyError, UnsupportedCallError, pruned
from vlm_prune.registry import policy_class
from vlm_prune.serving.packed import ServedPackedEncoder
from vlm_prune.serving.places import placed, prompt_positions, split_places, with_places
from vlm_prune.serving.plan import Plan

FAMILY = "qwen2_5_vl"
SERVED = ("agilepruner", "divprune", "flowcut", "pool", "random", "uniform", "visionzip")


def one_rank(x):
    raise AssertionError("there is one rank only")


def images():
    """Patches, sizes, and units of four images of different sizes."""
    media = prompt(FAMILY, [(2, -4, 4)]).media
    return media["pixel_values"], media["image_grid_thw"], (media["image_grid_thw"].prod(-1) // 4).tolist()


def live(rows):
    return rows[~rows[:, 0].isnan()]


@torch.no_grad()
def encode(model, tower, tokens):
    pixels, sizes, units = images()
    with tower.keeping(tokens):
        return [live(rows) for rows in model.visual(pixels, grid_thw=sizes.tolist()).split(units)]


@pytest.mark.parametrize("policy", SERVED)
def test_a_served_tower_gives_the_rows_of_a_pruned_model(policy):
    model, settings = shared(FAMILY), TABLE[policy].settings
    pixels, sizes, units = images()
    with pruned(model, policy, tokens=5, **settings), torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels, image_grid_thw=sizes).pooler_output
        expected = [live(rows) for rows in torch.cat([*expected]).split(units)]
    copy = Qwen(model)
    tower = ServedPackedEncoder(
        copy.parts, one_rank, Plan.of(with_plan(model, policy=policy, **settings)).policy
    )
    for ours, theirs in zip(encode(copy, tower, 5), expected, strict=True):
        assert len(ours) == 5
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_outside_of_a_call_and_at_full_budget_the_tower_is_stock():
    model, (pixels, sizes, units) = shared(FAMILY), images()
    copy = Qwen(model)
    tower = ServedPackedEncoder(copy.parts, one_rank, policy_class("flowcut")())
    with torch.no_grad():
        expected = model.model.visual(pixels, sizes).pooler_output
        outside = copy.visual(pixels, grid_thw=sizes.tolist())
    torch.testing.assert_close(outside, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat(encode(copy, tower, max(units))), outside)
    assert len(encode(copy, tower, 5)[0]) == 5


def test_ranks_that_hold_half_of_the_heads_choose_as_one_that_holds_all():
    copy = Qwen(shared(FAMILY))
    tower = ServedPackedEncoder(copy.parts, one_rank, policy_class("flowcut")())
    expected, whole = encode(copy, tower, 5), []
    split = Qwen(shared(FAMILY))
    halves = ServedPackedEncoder(split.parts, lambda mine: whole.pop(), policy_class("flowcut")())
    for block in split.visual.blocks:
        block.attn.attn = TwoRanks(block.attn.attn, whole)
    for ours, theirs in zip(encode(split, halves, 5), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class TwoRanks(torch.nn.Module):
    """Calls an attention module with each half of the heads, as this rank and as the other one."""

    def __init__(self, attention, whole):
        super().__init__()
        self.attention, self.whole, self.head_size = attention, whole, attention.head_size

    def forward(self, query, key, value, **sequences):
        first, second = zip(*(x.chunk(2, 2) for x in (query, key, value)), strict=True)
        self.whole.append(torch.stack([x.flatten(2) for x in (query, key, value)]))
        mine = self.attention(query=first[0], key=first[1], value=first[2], **sequences)
        self.whole.clear()
        other = type(self.attention).forward(self.attention, *second, **sequences)
        return torch.cat([mine, other], 2)


def test_flashinfer_is_refused():
    copy = Qwen(shared(FAMILY))
    tower = ServedPackedEncoder(copy.parts, one_rank, policy_class("flowcut")())
    block = copy.visual.blocks[0]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **{**kwargs, "sequence_lengths": torch.ones(1)})
    with pytest.raises(UnsupportedCallError, match="FlashInfer"):
        encode(copy, tower, 5)


def test_plans_of_images_of_any_size():
    plan = Plan.of(with_plan(shared(FAMILY), policy="flowcut", ratio=0.25))
    assert plan.policy.positions == "original"
    assert [plan.kept(plan.budget, dense) for dense in (1, 4, 40)] == [1, 1, 10]
    assert [plan.kept(plan.asked({"tokens": 9}), dense) for dense in (1, 9, 40)] == [1, 9, 9]
    budgets = [plan.budget, plan.asked({"tokens": 9}), plan.asked({"tokens": 10}), plan.asked({"ratio": 0.5})]
    assert len({plan.identity(budget) for budget in budgets}) == 4
    assert plan.identity(plan.asked({"ratio": 0.25})) == plan.identity(plan.budget)


@pytest.mark.parametrize(
    ("given", "error", "word"),
    [
        ({"policy": "flowcut", "positions": "compact"}, PolicyError, "place in the image"),
        ({"policy": "flowcut", "compat": "official"}, PolicyError, "released code"),
        ({"policy": "downsample"}, PolicyError, "smaller image"),
        ({"policy": "flowcut", "tokens": 0}, BudgetError, "at least one token"),
    ],
)
def test_a_bad_plan_is_refused(given, error, word):
    with pytest.raises(error, match=word):
        Plan.of(with_plan(shared(FAMILY), **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_travel_unrounded(dtype):
    rows = with_places(torch.zeros(3 * 999, 5, dtype=dtype), 999)
    assert rows.dtype == dtype
    embeds, places = split_places(rows)
    assert embeds.shape == (3 * 999, 5)
    assert torch.equal(places, torch.stack([torch.arange(2997) // 999, torch.arange(2997) % 999]))


def test_kept_tokens_have_the_positions_of_the_whole_prompt():
    """Two images that touch, of 2 x 4 and 3 x 1 units, in chunks of any length, one of them computed twice."""
    model = shared(FAMILY)
    skip_unless_it_counts_on(model, FAMILY)
    image, text = model.config.image_token_id, 5
    ids = torch.tensor([[text] * 3 + [62] + [image] * 8 + [63, 62] + [image] * 3 + [63] + [text] * 2])
    sizes = torch.tensor([[1, 4, 8], [1, 6, 2]])
    full, delta = model.model.get_rope_index(ids, (ids == image).int(), image_grid_thw=sizes)
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    keep[[4, 6, 7, 10, 11, 15]] = False
    is_image = (ids[0] == image)[keep]
    images = [(4, 3, 2, 4), (9, 2, 3, 1)]
    assert is_image.nonzero()[:, 0].tolist() == [4, 5, 6, 9, 10]
    positions, after = prompt_positions(int(keep.sum()), images)
    assert after + int(keep.sum()) == int(delta) + ids.shape[1]
    assert torch.equal(positions[:, ~is_image], full[:, 0, keep][:, ~is_image])
    places = torch.tensor([[0, 1, 1, 0, 2], [1, 0, 1, 0, 0]])  # rows and columns of the five that are left
    for length in range(1, len(is_image) + 1):
        left = positions
        for begin in [0, *range(0, len(is_image), length)]:
            done, now = int(is_image[:begin].sum()), int(is_image[: begin + length].sum())
            left = placed(left, is_image, begin, [places[:, done:now]] if now > done else [])
        assert torch.equal(left, full[:, 0, keep])
