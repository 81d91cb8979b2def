"""The decode stage: rows leave the KV cache, and what follows is what the stock model says with such a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

from tests.models import IMAGE, PAD, prompt, shared
from vlm_prune import PolicyError, UnsupportedCallError, pruned
from vlm_prune.contract.policy import Policy, ScorerPolicy
from vlm_prune.versions import CACHE, cache_of

RATIO = 0.25
CLOSE = {"atol": 2e-4, "rtol": 1e-3}


@dataclass(frozen=True)
class FirstRows(ScorerPolicy):
    """Keeps the first visual rows in every layer's cache."""

    name: ClassVar[str] = "first-rows"
    place: ClassVar[str] = "cache"

    def score(self, view):
        return (
            -torch.arange(view.visual.shape[1], device=view.visual.device).float().expand(view.visual.shape)
        )


@dataclass(frozen=True)
class Seen(Policy):
    """Keeps what the last row attended to most, in each layer, as `observe` saw it."""

    name: ClassVar[str] = "seen"
    stages: ClassVar[tuple[str, ...]] = ("decode",)

    def observed_layers(self, depth):
        return range(depth)

    def observe(self, view):
        seen = view.recorded
        last = seen.query[:, :, -1:]
        key = seen.key.repeat_interleave(last.shape[1] // seen.key.shape[1], 1)
        logits = last @ key.mT * seen.scaling
        if seen.valid is not None:
            logits = logits.masked_fill(~seen.valid[:, None, None], -torch.inf)
        return logits.softmax(-1)[:, :, 0].mean(1)

    def evicted_layers(self, depth):
        return range(depth)

    def evict(self, view):
        from vlm_prune.contract.keep import top_mask

        return top_mask(view.scores, view.target, view.visual)


@dataclass(frozen=True)
class ByHead(Policy):
    """Keeps other visual rows in each KV head."""

    name: ClassVar[str] = "by-head"
    stages: ClassVar[tuple[str, ...]] = ("decode",)
    uneven: bool = False

    def evicted_layers(self, depth):
        return range(depth)

    def evict(self, view):
        heads = torch.arange(view.keys.shape[1])[:, None]
        number = view.visual.long().cumsum(-1) - 1
        first = heads * 3
        width = 6 + (heads if self.uneven else 0 * heads)
        return view.visual[:, None] & (number[:, None] >= first) & (number[:, None] < first + width)


@dataclass(frozen=True)
class OneAStep(ScorerPolicy):
    """Drops the last visual rows step by step until two are left."""

    name: ClassVar[str] = "one-a-step"
    place: ClassVar[str] = "decode"

    def score(self, view):
        return (
            -torch.arange(view.visual.shape[1], device=view.visual.device).float().expand(view.visual.shape)
        )

    def evict(self, view):
        from dataclasses import replace

        if view.step == 0:
            return None
        return super().evict(replace(view, target=(view.visual.sum(-1) - 1).clamp(min=2)))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def dropped(model, batch, keep, by_layer=False):
    """A stock prefill of one prompt whose cache then loses rows by hand; ``keep`` is by layer, by head, or for all."""
    out = model(**batch.inputs, use_cache=True)
    cache = DynamicCache()
    for number, layer in enumerate(cache_of(out).layers):
        index = torch.tensor(keep[number] if by_layer else keep)
        if index.dim() == 1:
            index = index.expand(layer.keys.shape[1], -1)
        index = index[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[3])
        cache.update(layer.keys.gather(2, index), layer.values.gather(2, index), number)
    return out, cache


def by_hand(model, batch, keep, steps=3, by_layer=False):
    """Greedy tokens and logits of the steps after the cache lost rows, positions given as they were."""
    out, cache = dropped(model, batch, keep, by_layer)
    token, logits = out.logits[:, -1:].argmax(-1), []
    for step in range(steps):
        position = torch.tensor([[batch.ids.shape[1] + step]])
        out = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(token),
            position_ids=position,
            **{CACHE: cache},
            use_cache=True,
        )
        logits.append(model.lm_head(out.last_hidden_state)[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits, 1)


def ours(model, batch, policy, steps=3, **options):
    """The same steps of the pruned model, and what its cache holds after the prefill and at the end."""
    with pruned(model, policy, ratio=RATIO, **options):
        out = model(**batch.inputs, use_cache=True)
        cache = cache_of(out)
        held = [layer.keys.shape[2] for layer in cache.layers]
        token, logits, mask = out.logits[:, -1:].argmax(-1), [], batch.mask
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(input_ids=token, attention_mask=mask, **{CACHE: cache}, use_cache=True)
            logits.append(out.logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
        return torch.stack(logits, 1), held, [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("family", ["llava", "llava-gqa", "internvl"])
def test_first_rows_by_hand(family):
    model, batch = shared(family), prompt(family, [(3, -1, 5)])
    count = int((batch.ids == IMAGE).sum())
    keep = [*range(3), *range(3, 3 + round(RATIO * count)), *range(3 + count, 8 + count)]
    logits, held, _ = ours(model, batch, FirstRows())
    assert held == [len(keep)] * len(held)
    torch.testing.assert_close(logits, by_hand(model, batch, keep), **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_keep_what_they_looked_at(attention):
    model, batch = shared("llava-gqa", attention), prompt("llava", [(3, -1, 5)])
    eager = shared("llava-gqa", "eager")
    maps = eager.model.language_model(
        inputs_embeds=_embeds(eager, batch), output_attentions=True, use_cache=False
    ).attentions
    keep = []
    for layer in maps:
        paid = layer[0, :, -1].mean(0)[3:39]
        keep.append([0, 1, 2, *(paid.topk(9).indices.sort().values + 3).tolist(), *range(39, 44)])
    assert len({tuple(rows) for rows in keep}) > 1
    logits, held, _ = ours(model, batch, Seen())
    assert held == [17] * 3
    torch.testing.assert_close(logits, by_hand(model, batch, keep, by_layer=True), **CLOSE)


def _embeds(model, batch):
    embeds = model.get_input_embeddings()(batch.ids)
    features = torch.cat(list(model.model.get_image_features(batch.pixels).pooler_output))
    return embeds.masked_scatter((batch.ids == IMAGE)[..., None], features)


def test_heads_keep_rows_of_their_own():
    model, batch = shared("llava-gqa"), prompt("llava", [(3, -1, 5)])
    heads = model.config.text_config.num_key_value_heads
    keep = [[*range(3), *range(3 + 3 * h, 9 + 3 * h), *range(39, 44)] for h in range(heads)]
    logits, held, _ = ours(model, batch, ByHead())
    assert held == [14] * 3
    torch.testing.assert_close(logits, by_hand(model, batch, keep), **CLOSE)
    with pytest.raises(PolicyError, match="equally many"):
        ours(model, batch, ByHead(uneven=True))


@pytest.mark.parametrize("policy", [FirstRows(), Seen(), ByHead(), OneAStep()], ids=lambda p: p.name)
def test_batch_gives_what_its_rows_give_alone(policy):
    model, batch = shared("llava-gqa"), prompt("llava", [(2, -1, 4), (1, -1, 2, -2, 3), (-1, 9)])
    together, _, _ = ours(model, batch, policy)
    for b, row in enumerate(batch.rows()):
        alone, _, _ = ours(model, row, policy)
        torch.testing.assert_close(together[b : b + 1], alone, **CLOSE)


def test_rows_leave_while_decoding():
    model, batch = shared("llava"), prompt("llava", [(3, -1, 5)])
    logits, held, end = ours(model, batch, OneAStep(), steps=4)
    assert held == [44] * 3  # the prefill drops none
    assert end == [44] * 3  # each step brings one row and drops one
    out = model(**batch.inputs, use_cache=True)
    cache, token, left = cache_of(out), out.logits[:, -1:].argmax(-1), 36
    for step in range(4):
        position = torch.tensor([[44 + step]])
        out = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(token),
            position_ids=position,
            **{CACHE: cache},
            use_cache=True,
        )
        got = model.lm_head(out.last_hidden_state)[:, -1]
        torch.testing.assert_close(logits[:, step], got, **CLOSE)
        token, left = got.argmax(-1, keepdim=True), left - 1
        for layer in cache.layers:
            rows = [*range(3 + left), *range(4 + left, layer.keys.shape[2])]
            layer.keys, layer.values = layer.keys[:, :, rows], layer.values[:, :, rows]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_generate(options):
    model, batch = shared("llava"), prompt("llava", [(2, -1, 4), (1, -1, 3), (-1, 9)])
    fixed = {"max_new_tokens": 4, "pad_token_id": PAD, "suppress_tokens": [IMAGE], "do_sample": False}
    with pruned(model, Seen(), ratio=RATIO):
        together = model.generate(**batch.inputs, **fixed, **options)
        for b, row in enumerate(batch.rows()):
            alone = model.generate(**row.inputs, **fixed, **options)
            assert alone[0, -4:].tolist() == together[b, -4:].tolist()


def test_static_caches_cannot_shrink_while_decoding():
    model, batch = shared("llava"), prompt("llava", [(3, -1, 5)])
    with pruned(model, OneAStep(), ratio=RATIO), pytest.raises(UnsupportedCallError, match="static cache"):
        model.generate(**batch.inputs, max_new_tokens=3, cache_implementation="static")


def test_several_turns():
    model, batch = shared("llava"), prompt("llava", [(3, -1, 5)])
    more = torch.tensor([[9, 10, 11]])
    with pruned(model, FirstRows(), ratio=RATIO):
        cache = cache_of(model(**batch.inputs, use_cache=True))
        second = model(input_ids=more, **{CACHE: cache}, use_cache=True).logits
    keep = [*range(12), *range(39, 44)]
    _, stock = dropped(model, batch, keep)
    want = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(more),
        position_ids=torch.arange(44, 47)[None],
        attention_mask=torch.ones(1, 20, dtype=torch.long),
        **{CACHE: stock},
        use_cache=True,
    )
    torch.testing.assert_close(second, model.lm_head(want.last_hidden_state), **CLOSE)
