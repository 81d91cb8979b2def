"""Where decoders have windows or states: cuts between their layers, static caches, and what is refused and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tests.decoders import KINDS, PLAIN, STATEFUL, WINDOW, WINDOWED, shared
from tests.models import IMAGE, LAYOUTS, prompt
from tests.reference import budget
from tests.refusal import refuses
from tests.test_generate import generate
from tests.test_hybrid import FAMILY, decoders
from vlm_prune import PolicyError, UnsupportedCallError, UnsupportedModelError, prune, pruned
from vlm_prune.policies.base import Policy
from vlm_prune.policies.views import PrefillView
from vlm_prune.versions import CACHE, cache_of


@dataclass(frozen=True)
class EveryThird(Policy):
    """Keeps every third visual token after decoder layer ``layer``, whatever it holds."""

    name: ClassVar[str] = "every_third"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    reads_attention: ClassVar[bool] = False

    layer: int = 1
    positions: str = "original"

    def prefill_layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def prefill(self, view: PrefillView) -> torch.Tensor:
        return view.visual & (view.visual.long().cumsum(-1) % 3 == 1)


def by_hand(model, batch, cut):
    """Logits of one prompt whose visual tokens leave after layer ``cut``: stock layers, masks of my own."""
    decoder, config = model.model.language_model, model.config.text_config
    all_of_one = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [all_of_one] * config.num_hidden_layers
    entering = {}
    names = [
        decoder.layers[n].register_forward_pre_hook(
            lambda _, args, kwargs, n=n: entering.update({n: (args[0], kwargs)}), with_kwargs=True
        )
        for n in range(len(decoder.layers))
    ]
    model(**batch.inputs, use_cache=False)
    for handle in names:
        handle.remove()
    visual = batch.ids[0] == IMAGE
    kept = visual & (visual.long().cumsum(0) % 3 == 1)
    rows = (~visual | kept).nonzero()[:, 0]
    hidden = entering[cut + 1][0][:, rows]
    distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
    masks = {
        "full_attention": distance >= 0,
        "sliding_attention": (distance >= 0) & (distance < WINDOW),
    }
    for n in range(cut + 1, len(decoder.layers)):
        named = dict(entering[n][1])
        cos, sin = named["position_embeddings"]
        named["position_embeddings"] = cos[:, rows], sin[:, rows]
        mask = masks.get(kinds[n])
        named["attention_mask"] = None if mask is None else mask[None, None]
        hidden = decoder.layers[n](hidden, **{**named, "cache": None})
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    norm = decoder.embedding_norm if hasattr(decoder, "embedding_norm") else decoder.norm
    return rows, model.lm_head(norm(hidden))[0]


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("decoder", PLAIN)
def test_tokens_that_leave_between_layers(decoder, cut):
    model, batch = shared(decoder), prompt(FAMILY, [(4, -1, 6)])
    with torch.no_grad():
        rows, want = by_hand(model, batch, cut)
        with pruned(model, EveryThird(layer=cut)):
            ours = model(**batch.inputs).logits[0, rows]
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("decoder", PLAIN)
def test_they_stay_away_in_later_steps_and_turns(decoder, cut):
    """With a cache as without one, alone as in a batch."""
    model, batch = shared(decoder), prompt(FAMILY, LAYOUTS["ragged"])
    with torch.no_grad(), pruned(model, EveryThird(layer=cut)):
        said = generate(model, batch.inputs)
        assert torch.equal(generate(model, batch.inputs, use_cache=False), said)
        for b, one in enumerate(batch.rows()):
            alone = generate(model, one.inputs, return_dict_in_generate=True)
            assert torch.equal(alone.sequences[0, one.ids.shape[1] :], said[b, batch.ids.shape[1] :])
            ids = torch.cat([alone.sequences, torch.tensor([[7, 8, 9]])], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            want = generate(model, {**inputs, **one.media})
            assert torch.equal(generate(model, {**inputs, CACHE: cache_of(alone)}), want)


@pytest.mark.parametrize("decoder", PLAIN)
def test_fastv_reads_a_layer_of_full_attention(decoder):
    model, batch = shared(decoder), prompt(FAMILY, LAYOUTS["ragged"])
    if decoder == "mistral":
        with pytest.raises(
            PolicyError, match=r"layers \[1\] of MistralModel.*sliding attention.*only, which are \[\]"
        ):
            prune(model, "fastv", k=2, ratio=0.3)
        return
    with torch.no_grad(), pruned(model, "fastv", k=2, ratio=0.3):
        together = model(**batch.inputs).logits
        for b, one in enumerate(batch.rows()):
            alone = model(**one.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("decoder", [*WINDOWED[1:], *STATEFUL])
def test_other_layers_are_not_looked_at(decoder):
    kind = {"qwen3_5": "linear attention", "lfm2": "conv"}.get(decoder, "sliding attention")
    with pytest.raises(PolicyError, match=rf"layers \[2\].*{kind}.*which are \[1, 3\]"):
        prune(shared(decoder), "fastv", k=3)
    assert not hasattr(shared(decoder), "pruning")


@decoders
@pytest.mark.parametrize("layout", ["single", "ragged"])
def test_static_caches(layout, decoder):
    model, batch = shared(decoder), prompt(FAMILY, LAYOUTS[layout])
    with pruned(model, "flowcut", **budget("flowcut")):
        want = generate(model, batch.inputs, max_new_tokens=10)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=260)
        for _ in range(2):
            assert torch.equal(generate(model, batch.inputs, max_new_tokens=10, **{CACHE: cache}), want)
            cache.reset()


@pytest.mark.parametrize("decoder", WINDOWED)
def test_a_window_may_keep_all_rows(decoder):
    """As in a ``DynamicCache()`` made without the decoder's config."""
    model, batch = shared(decoder), prompt(FAMILY, LAYOUTS["ragged"])
    with pruned(model, "uniform", ratio=0.3):
        want = generate(model, batch.inputs)
        assert torch.equal(generate(model, batch.inputs, **{CACHE: DynamicCache()}), want)


def test_a_window_weighs_no_more_than_its_rows():
    model, batch = shared("mistral"), prompt(FAMILY, LAYOUTS["single"])
    with torch.no_grad(), pruned(model, "uniform", ratio=0.3):
        cache = cache_of(model(**batch.inputs))
        receipt = model.pruning.receipt
    assert {layer.keys.shape[2] for layer in cache.layers} == {WINDOW - 1}
    assert receipt.kv_bytes_dense == receipt.kv_bytes


@pytest.mark.parametrize("decoder", ["mistral", "exaone4", "qwen3_5", "lfm2"])
def test_sequences_that_would_be_filled_up_in_the_middle_are_refused(decoder):
    model = shared(decoder)
    first, second = prompt(FAMILY, [(3, -1, 5), (2, -1, 6)]), prompt(FAMILY, [(2, -1, 4), (43,)], seed=3)
    second_ids = second.ids[:, -42:]
    ids = torch.cat([first.ids, second_ids], 1)
    mask = torch.ones_like(ids)
    with torch.no_grad(), pruned(model, "uniform", ratio=0.3):
        cache = cache_of(model(**first.inputs))
        with pytest.raises(UnsupportedCallError, match=r"middle.*one sequence.*without the cache"):
            model(input_ids=second_ids, attention_mask=mask, pixel_values=second.pixels, **{CACHE: cache})
        assert cache.get_seq_length() == first.ids.shape[1]


def test_a_window_where_the_decoder_has_none_is_refused():
    model, batch = shared("deepseek_v3"), prompt(FAMILY, LAYOUTS["single"])
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=8)
    with pruned(model), refuses(model, UnsupportedCallError, "DynamicSlidingWindowLayer", "DynamicLayer"):
        model(**batch.inputs, **{CACHE: cache})


def test_layers_that_share_something_need_all_tokens():
    for decoder, why in (
        ("gemma3n", "inputs of its own"),
        ("glm5_next", "tokens their attention has chosen"),
    ):
        if decoder in KINDS and KINDS[decoder][0] in CONFIG_MAPPING:
            with pytest.raises(PolicyError, match=f"need all tokens: .*{why}.*encode stage"):
                prune(shared(decoder), EveryThird())


def test_layers_that_keep_rows_in_a_way_of_their_own_are_refused(monkeypatch):
    class Odd(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            return super().update(key_states[:, :, ::2], value_states[:, :, ::2])

    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Odd)
    with refuses(
        shared("exaone4"), UnsupportedModelError, "Exaone4Model", "Odd", "linear attention can be pruned"
    ):
        prune(shared("exaone4"))
