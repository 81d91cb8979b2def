"""Policies of the KV cache against plain loops over the attention maps of the stock model.

What a loop keeps is cut out of a stock cache by hand; the pruned model's cache must hold the same rows, and its next
steps must say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar

import pytest
import torch

from tests.models import IMAGE, prompt, shared
from tests.policy_checks import generate
from tests.policy_table import options
from tests.test_eviction import CLOSE, RATIO, by_hand, dropped
from vlm_prune import PolicyError, prune, pruned
from vlm_prune.policies.by_head import KeepsByHead
from vlm_prune.policies.fastv import FastV
from vlm_prune.policies.h2o import H2O
from vlm_prune.policies.lookm import LookM
from vlm_prune.policies.prompt_attention import last_of
from vlm_prune.policies.pyramidkv import PyramidKV, pyramid_counts
from vlm_prune.policies.snapkv import SnapKV, pooled
from vlm_prune.policies.streamingllm import StreamingLLM, sinks_then_recent
from vlm_prune.policies.vlcache import VLCache, layer_counts
from vlm_prune.versions import CACHE, cache_of

FAMILIES = ["llava", "llava-gqa", "internvl"]
LAYOUTS = {"one": (3, -1, 9), "two": (1, -1, 2, -2, 3), "image-last": (4, -1)}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def maps(family, batch):
    """Attention of an eager stock prefill: for each layer ``(heads, rows, rows)``."""
    return [layer[0] for layer in shared(family, "eager")(**batch.inputs, output_attentions=True).attentions]


def image_rows(batch):
    return [i for i, token in enumerate(batch.ids[0].tolist()) if token == IMAGE]


def asking(batch):
    """Rows of text behind the image, or the last row."""
    rows = len(batch.ids[0])
    return list(range(image_rows(batch)[-1] + 1, rows)) or [rows - 1]


def grouped(layer, family):
    """Which query heads share each KV head."""
    heads = shared(family).config.text_config.num_key_value_heads
    return layer.unflatten(0, (heads, -1)).tolist()


def best(score, images, count):
    """The ``count`` images of highest score, and all text, ascending."""
    chosen = sorted(images, key=lambda i: -score[i])[:count]
    return sorted({*range(len(score))} - {*images} | {*chosen})


def snapkv_by_hand(family, batch, window, kernel, pooling, counts=None):
    images, voters = image_rows(batch), asking(batch)[-window:]
    keep = []
    for number, layer in enumerate(maps(family, batch)):
        count = counts[number] if counts else round(RATIO * len(images))
        keep.append([])
        for group in grouped(layer, family):
            votes = [0.0] * len(batch.ids[0])
            for i in images:
                votes[i] = sum(head[row][i] for head in group for row in voters) / len(group)
            half = kernel // 2
            around = [
                [votes[j] if 0 <= j < len(votes) else 0.0 for j in range(i - half, i + half + 1)]
                for i in range(len(votes))
            ]
            score = [sum(near) / kernel if pooling == "mean" else max(near) for near in around]
            keep[-1].append(best(score, images, count))
    return keep


def pyramid(target, held, layers, beta):
    """Rows of each layer, with fractions."""
    first = min(2 * target - Fraction(target, beta), held)
    last = 2 * target - first
    line = [first + (last - first) * Fraction(n, layers - 1) for n in range(layers)]
    ends = [int(sum(line[:n]) + Fraction(1, 2)) for n in range(layers + 1)]
    return [b - a for a, b in pairwise(ends)]


def pyramidkv_by_hand(family, batch, beta):
    images = image_rows(batch)
    counts = pyramid(round(RATIO * len(images)), len(images), len(maps(family, batch)), beta)
    return snapkv_by_hand(family, batch, 32, 5, "mean", counts)


def h2o_by_hand(family, batch):
    images, keep = image_rows(batch), []
    for layer in maps(family, batch):
        keep.append([])
        for group in grouped(layer, family):
            score = [0.0] * len(batch.ids[0])
            for head in group:
                for row in head:
                    for i, paid in enumerate(row):
                        score[i] += paid / len(group)
            keep[-1].append(best(score, images, round(RATIO * len(images))))
    return keep


def shared_out(density, held, total):
    """Rows of each layer: one each, then in proportion, what a full layer cannot take going to the others."""
    layers, left, full = range(len(density)), total - len(density), set()
    while True:
        weight = sum(density[n] for n in layers if n not in full)
        given = sum(held[n] - 1 for n in full)
        share = [held[n] - 1 if n in full else (left - given) * density[n] / weight for n in layers]
        over = {n for n in layers if n not in full and share[n] > held[n] - 1}
        if not over:
            break
        full |= over
    counts, end, before = [], 0.0, 0
    for part in share:
        end += part
        counts.append(1 + int(end + 0.5) - before)
        before = int(end + 0.5)
    return counts


def vlcache_by_hand(family, batch, threshold):
    images, voters = image_rows(batch), asking(batch)
    layers, density, keep = maps(family, batch), [], []
    for layer in layers:
        rows = [head[row][: row + 1] for head in layer.tolist() for row in voters]
        dense = sum(paid >= threshold * max(row) for row in rows for paid in row)
        density.append(dense / sum(map(len, rows)))
    total = round(RATIO * len(images)) * len(layers)
    counts = shared_out(density, [len(images)] * len(layers), total)
    assert sum(counts) == total
    for layer, count in zip(layers, counts, strict=True):
        keep.append([])
        for group in grouped(layer, family):
            score = [sum(head[row][i] for head in group for row in voters) for i in range(len(batch.ids[0]))]
            keep[-1].append(best(score, images, count))
    return keep


def streaming_by_hand(family, batch, sinks):
    images = image_rows(batch)
    count = round(RATIO * len(images))
    first = images[: min(sinks, count)]
    late = images[len(images) - (count - len(first)) :]
    kept = sorted({*range(len(batch.ids[0]))} - {*images} | {*first, *late})
    model = shared(family).config.text_config
    return [[kept] * model.num_key_value_heads for _ in range(model.num_hidden_layers)]


CASES = {
    "streamingllm": (StreamingLLM(), lambda f, b: streaming_by_hand(f, b, 4)),
    "streamingllm-more-sinks-than-budget": (
        StreamingLLM(sinks=50),
        lambda f, b: streaming_by_hand(f, b, 50),
    ),
    "snapkv": (SnapKV(), lambda f, b: snapkv_by_hand(f, b, 32, 5, "mean")),
    "snapkv-window-max": (
        SnapKV(window=2, kernel=3, pooling="max"),
        lambda f, b: snapkv_by_hand(f, b, 2, 3, "max"),
    ),
    "h2o": (H2O(), h2o_by_hand),
    "lookm-without-merging": (LookM(merge=None), h2o_by_hand),
    "pyramidkv": (PyramidKV(), lambda f, b: pyramidkv_by_hand(f, b, 20)),
    "pyramidkv-flat": (PyramidKV(beta=1), lambda f, b: snapkv_by_hand(f, b, 32, 5, "mean")),
    "vlcache": (VLCache(), lambda f, b: vlcache_by_hand(f, b, 0.01)),
    "vlcache-high-threshold": (VLCache(threshold=0.3), lambda f, b: vlcache_by_hand(f, b, 0.3)),
}


def steps(model, batch, policy, count=3):
    """The cache after a pruned prefill, and the logits of the steps behind it."""
    with pruned(model, policy, ratio=RATIO):
        out = model(**batch.inputs, use_cache=True)
        cache, logits = cache_of(out), []
        held = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        token, mask = out.logits[:, -1:].argmax(-1), batch.mask
        for _ in range(count):
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            logits.append(
                model(input_ids=token, attention_mask=mask, **{CACHE: cache}, use_cache=True).logits[:, -1]
            )
            token = logits[-1].argmax(-1, keepdim=True)
    return held, torch.stack(logits, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_rows_and_next_steps_by_hand(case, family, layout):
    policy, by_loops = CASES[case]
    model, batch = shared(family), prompt(family, [LAYOUTS[layout]])
    keep = by_loops(family, batch)
    held, logits = steps(model, batch, policy)
    _, stock = dropped(model, batch, keep, by_layer=True)
    for (keys, values), layer in zip(held, stock.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys, **CLOSE)
        torch.testing.assert_close(values, layer.values, **CLOSE)
    torch.testing.assert_close(logits, by_hand(model, batch, keep, by_layer=True), **CLOSE)


def test_layers_and_heads_choose_for_themselves():
    """Guards the cases above: they would show little if all heads kept the same."""
    batch = prompt("llava-gqa", [LAYOUTS["one"]])
    for case in ("snapkv", "h2o"):
        keep = CASES[case][1]("llava-gqa", batch)
        assert len({tuple(rows) for layer in keep for rows in layer}) == sum(map(len, keep))


def test_layers_get_shares_of_their_own():
    keep = CASES["vlcache-high-threshold"][1]("llava-gqa", prompt("llava-gqa", [LAYOUTS["one"]]))
    assert len({len(layer[0]) for layer in keep}) > 1


def test_shares_of_a_budget_by_hand():
    density = torch.tensor([[0.5, 0.25, 0.25], [0.98, 0.01, 0.01], [0.98, 0.01, 0.01], [0.2, 0.3, 0.5]])
    held = torch.tensor([[20, 20, 20], [20, 20, 20], [20, 20, 20], [4, 0, 9]])
    counts = layer_counts(density, held, torch.tensor([23, 30, 60, 100]))
    assert counts.tolist() == [[11, 6, 6], [20, 5, 5], [20, 20, 20], [4, 0, 9]]


def test_shares_of_random_budgets_add_up():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        layers = int(torch.randint(1, 9, (), generator=generator))
        density = torch.rand(1, layers, generator=generator) ** 3 + 1e-3
        total = int(torch.randint(layers, 12 * layers + 1, (), generator=generator))
        counts = layer_counts(density, torch.full((1, layers), 12), torch.tensor([total]))[0]
        assert counts.sum() == total
        assert counts.min() >= 1
        assert counts.max() <= 12
        want = shared_out(density[0].tolist(), [12] * layers, total)
        assert max(abs(a - b) for a, b in zip(counts.tolist(), want, strict=True)) <= 1  # of equal halves


def test_pyramids_add_up_and_fall():
    for target, held, layers, beta in [
        (36, 144, 32, 20),
        (5, 7, 4, 20),
        (36, 144, 2, 3),
        (9, 9, 6, 20),
        (1, 50, 28, 20),
    ]:
        counts = pyramid_counts(torch.tensor([target]), torch.tensor([held]), layers, beta)[0].tolist()
        assert sum(counts) == target * layers
        assert 0 <= min(counts) <= max(counts) <= held
        want = pyramid(target, held, layers, beta)
        assert max(abs(a - b) for a, b in zip(counts, want, strict=True)) <= 1  # of equal halves
        assert counts[0] > counts[-1] or target == held
    assert pyramid_counts(torch.tensor([3, 0]), torch.tensor([9, 0]), 1, 20).tolist() == [[3], [0]]


def test_a_pyramid_behind_a_cut_keeps_as_much_as_equal_layers():
    model, batch = shared("llava"), prompt("llava", [LAYOUTS["one"]])
    held = []
    for policy in (SnapKV(), PyramidKV()):
        with pruned(model, [FastV(k=1), policy], ratio=0.5):
            cache = cache_of(model(**batch.inputs, use_cache=True))
        held.append([layer.keys.shape[2] for layer in cache.layers])
    flat, falling = held
    assert len({*flat}) == 1
    assert sum(falling) == sum(flat)
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > falling[-1]


def test_sinks_then_the_last_ones():
    visual = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    order = sinks_then_recent(visual, 1).masked_fill(~visual, -1).argsort(descending=True, stable=True)
    assert order[0, :4].tolist() == [1, 5, 4, 2]
    assert order[1, :5].tolist() == [0, 4, 3, 2, 1]


@torch.no_grad()
def test_a_static_cache_whose_later_layers_hold_more_than_the_first():
    """Slots of a later layer that the first one has dropped are attended in decoding steps."""
    model, row = shared("llava-gqa"), prompt("llava-gqa", [(-1, 2, -1, 1)], seed=100789)
    with pruned(model, **options("vlcache")):
        want = generate(model, row.inputs)
        ours = generate(model, row.inputs, cache_implementation="static")
    held = [layer.physical for layer in cache_of(want).layers]
    assert held[0] < max(held)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(want.logits), **CLOSE)


def test_no_other_policy_drops_rows_where_heads_choose_for_themselves():
    model, batch = shared("llava"), prompt("llava", [LAYOUTS["one"]])
    for pair in ("mustdrop+snapkv", "h2o+snapkv", "streamingllm+vlcache"):
        with pytest.raises(PolicyError, match="for each head"):
            prune(model, **options(pair))
    with pruned(model, **options("mustdrop+streamingllm")):
        assert model(**batch.inputs, use_cache=True).logits.isfinite().all()


def test_last_of():
    rows = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    assert last_of(rows, 2).int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_pooling_by_hand():
    votes = torch.tensor([[[3.0, 0, 0, 6]]])
    assert pooled(votes, 3, "mean").tolist() == [[[1, 1, 2, 2]]]
    assert pooled(votes, 3, "max").tolist() == [[[3, 3, 6, 6]]]
    assert pooled(votes, 1, "mean").tolist() == votes.tolist()


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (StreamingLLM, {"sinks": -1}, "sinks=-1: choose a number from 0"),
        (SnapKV, {"window": 0}, "window=0: choose a number from 1"),
        (SnapKV, {"kernel": 4}, "kernel=4: choose an odd number"),
        (VLCache, {"threshold": 1.5}, "threshold=1.5: choose a number from 0 to 1"),
        (SnapKV, {"pooling": "avg"}, "'mean' or 'max'"),
        (PyramidKV, {"beta": 0.5}, "beta=0.5: choose a number from 1"),
    ],
)
def test_settings(policy, settings, message):
    with pytest.raises(ValueError, match=message):
        policy(**settings)


def merged_by_hand(keys, values, kept, pivot):
    """Rows of one head that stay, each the mean of itself and of the rows that go to it."""
    mine = {i: [] for i in kept}
    for gone in (i for i in range(len(keys)) if i not in mine):
        near = max(kept, key=lambda i: float(keys[gone] @ keys[i] / (keys[gone].norm() * keys[i].norm())))
        mine[near].append(gone)
    pairs = []
    for x in (keys, values):
        added = {i: [(x[g] + x[i]) / 2 if pivot else x[g] for g in those] for i, those in mine.items()}
        pairs.append(torch.stack([torch.stack([x[i], *added[i]]).mean(0) for i in kept]))
    return pairs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merge", ["pivot", "average"])
def test_lookm_merges_what_leaves(merge, family, layout):
    model, batch = shared(family), prompt(family, [LAYOUTS[layout]])
    keep = h2o_by_hand(family, batch)
    whole = cache_of(model(**batch.inputs, use_cache=True))
    held, logits = steps(model, batch, LookM(merge=merge))
    out, cache = dropped(model, batch, keep, by_layer=True)
    for number, (layer, stock) in enumerate(zip(whole.layers, cache.layers, strict=True)):
        heads = [
            merged_by_hand(layer.keys[0, h], layer.values[0, h], rows, merge == "pivot")
            for h, rows in enumerate(keep[number])
        ]
        stock.keys, stock.values = (torch.stack([pair[k] for pair in heads])[None] for k in (0, 1))
        torch.testing.assert_close(held[number][0], stock.keys, **CLOSE)
        torch.testing.assert_close(held[number][1], stock.values, **CLOSE)
    token = out.logits[:, -1:].argmax(-1)
    out = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(token),
        position_ids=torch.tensor([[batch.ids.shape[1]]]),
        **{CACHE: cache},
        use_cache=True,
    )
    torch.testing.assert_close(logits[:, 0], model.lm_head(out.last_hidden_state)[:, -1], **CLOSE)


@dataclass(frozen=True)
class Doubles(KeepsByHead):
    """Doubles the values of all rows, of which it drops none."""

    name: ClassVar[str] = "doubles"
    by_head: ClassVar[bool] = False

    def observe(self, view):
        return view.visual.float()

    def evict(self, view):
        return torch.ones_like(view.visual), view.keys, 2 * view.values


@dataclass(frozen=True)
class DoublesAgain(Doubles):
    name: ClassVar[str] = "doubles again"


@pytest.mark.parametrize(("policies", "factor"), [([Doubles()], 2), ([Doubles(), DoublesAgain()], 4)])
def test_merged_rows_stay_where_none_leaves_and_the_next_policy_sees_them(policies, factor):
    model, batch = shared("llava"), prompt("llava", [LAYOUTS["one"]])
    stock = cache_of(model(**batch.inputs, use_cache=True))
    with pruned(model, policies, ratio=RATIO):
        cache = cache_of(model(**batch.inputs, use_cache=True))
    for layer, other in zip(cache.layers, stock.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, factor * other.values)


@pytest.mark.parametrize("wrong", ["no mask", "fewer rows", "no values"])
def test_merged_rows_of_other_shapes_are_refused(wrong):
    @dataclass(frozen=True)
    class Odd(Doubles):
        def evict(self, view):
            keep, keys, values = super().evict(view)
            return {
                "no mask": (None, keys, values),
                "fewer rows": (keep, keys[:, :, 1:], values),
                "no values": (keep, keys),
            }[wrong]

    model, batch = shared("llava"), prompt("llava", [LAYOUTS["one"]])
    with pruned(model, Odd(), ratio=RATIO), pytest.raises(PolicyError, match="merged rows"):
        model(**batch.inputs, use_cache=True)
