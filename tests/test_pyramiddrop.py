"""PyramidDrop equals a decoder that is walked layer by layer, ranking with the weights of the layer to come."""

from dataclasses import dataclass

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.models import LAYOUTS, prompt, shared
from tests.test_decoder_stage import IMAGE, UNITS, make
from tests.test_decoder_stage import prompt as text_and_image
from tests.test_fastv import random_view, whole_map
from vlm_prune import pruned
from vlm_prune.errors import UnsupportedModelError
from vlm_prune.language.look_ahead import look_ahead
from vlm_prune.policies.pyramiddrop import PyramidDrop, attention_of_row, scaled_layers
from vlm_prune.policies.scores import last_row
from vlm_prune.versions import CACHE, cache_of


@torch.no_grad()
def walk(model, inputs, layers, counts, positions):
    """Last logits of the prompt, and the visual tokens left at each layer."""
    decoder = model.model.language_model
    features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    ids = inputs["input_ids"]
    h = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], features)
    visual, place, left = (ids == IMAGE)[0], torch.arange(ids.shape[1])[None], []
    for number, layer in enumerate(decoder.layers):
        if number in layers:
            normed, attention = layer.input_layernorm(h), layer.self_attn
            query, key = (
                getattr(attention, f"{x}_proj")(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
                for x in "qk"
            )
            query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(h, place))
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            paid = (query[0, :, -1:] @ key[0].mT * attention.scaling).softmax(-1).mean(0)[0]
            best = paid.masked_fill(~visual, -1).topk(counts[layers.index(number)]).indices
            stays = ~visual
            stays[best] = True
            h, visual, place = h[:, stays], visual[stays], place[:, stays]
            if positions == "compact":
                place = torch.arange(h.shape[1])[None]
        left.append(int(visual.sum()))
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()[None, None]
        h = layer(
            h, attention_mask=mask, position_ids=place, position_embeddings=decoder.rotary_emb(h, place)
        )
    return model.lm_head(decoder.norm(h))[0, -1], left


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_walk(text, positions, implementation):
    model, inputs = make(text), text_and_image(3, 5, 1)
    wanted, left = walk(model, inputs, [1, 2, 3], [8, 4, 2], positions)
    model.set_attn_implementation(implementation)
    with pruned(model, PyramidDrop(positions=positions)):
        output = model(**inputs)
    torch.testing.assert_close(output.logits[0, -1], wanted, atol=2e-4, rtol=1e-4)
    rows = [layer.keys.shape[2] - inputs["input_ids"].shape[1] + UNITS for layer in cache_of(output).layers]
    assert rows == left == [16, 8, 4, 2]


@torch.no_grad()
def test_the_last_cut_may_leave_nothing():
    model, inputs = make("llama"), text_and_image(3, 5, 1)
    wanted, _ = walk(model, inputs, [1, 3], [4, 0], "compact")
    with pruned(model, PyramidDrop(layers=(1, 3), ratios=(0.25, 0.0))):
        torch.testing.assert_close(model(**inputs).logits[0, -1], wanted, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_second_turn_ranks_behind_the_first():
    """The ranking softmax runs over the rows that an earlier turn left in the cache of the next layer."""
    model = shared("llava-gqa")
    first = prompt("llava-gqa", LAYOUTS["single"])
    seen = []

    @dataclass(frozen=True)
    class Watched(PyramidDrop):
        def prefill(self, view):
            attention = view.next_attention()
            paid = attention_of_row(attention, last_row(view.valid, view.visual))
            seen.append((view.hidden.shape[1], attention.key.shape[2], paid))
            return super().prefill(view)

    with pruned(model, Watched(layers=(1,)), ratio=0.25):
        output = model(**first.inputs)
        stored = cache_of(output).layers[1].keys.shape[2]
        ids = torch.cat([first.ids, first.ids], 1)
        again = {"input_ids": first.ids, "pixel_values": first.pixels, "attention_mask": torch.ones_like(ids)}
        model(**again, **{CACHE: cache_of(output)})
        assert cache_of(output).layers[1].keys.shape[2] == 2 * stored
    (rows, keys, alone), (more, all_keys, behind) = seen
    assert (rows, keys) == (more, more)
    assert all_keys == more + stored
    assert behind.sum() < 0.999 * alone.sum()


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_attention_of_one_row(heads, past):
    valid = torch.ones(3, past + 13, dtype=torch.bool)
    valid[1, past : past + 4] = False
    view = random_view(shared=heads, past=past, valid=valid)
    row = torch.zeros(3, 13, dtype=torch.bool)
    row[[0, 1, 2], [12, 12, 9]] = True
    full = whole_map(view)[..., past:]
    torch.testing.assert_close(attention_of_row(view, row).double(), full[row], atol=1e-6, rtol=1e-5)


def test_layers_and_budget():
    assert scaled_layers(32) == (8, 16, 24)
    assert scaled_layers(3) == (1, 2)
    assert PyramidDrop().prefill_layers(28) == [6, 13, 20]
    left = [PyramidDrop().left(layer, 32, 576, 72, []) for layer in (7, 15, 23)]
    assert left == [288, 144, 72]
    assert PyramidDrop(ratios=(0.33, 0.2, 0.07)).left(15, 32, 100, 1, []) == 20
    assert PyramidDrop(compat="official").left(7, 32, 575, 1, []) == 287
    assert PyramidDrop(compat="official").left(7, 32, 575, 575, []) == 575


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"layers": (0, 1)}, "at least 1"),
        ({"layers": (2, 1)}, "ascending"),
        ({"ratios": (0.2, 0.5)}, "descending"),
        ({"layers": (1, 2), "ratios": (0.5,)}, "one ratio per layer"),
        ({"compat": "paper"}, "official"),
    ],
)
def test_settings(fields, match):
    with pytest.raises(ValueError, match=match):
        PyramidDrop(**fields)
    with pytest.raises(ValueError, match="0 to 2"):
        PyramidDrop(layers=(3,)).prefill_layers(3)
    with pytest.raises(ValueError, match="one ratio each"):
        PyramidDrop(ratios=(0.5,)).prefill_layers(32)
    with pytest.raises(ValueError, match="depth 1"):
        PyramidDrop().prefill_layers(1)


def test_layers_without_the_usual_norm_are_refused():
    with pytest.raises(UnsupportedModelError, match="input_layernorm"):
        look_ahead(torch.nn.Linear(2, 2), torch.zeros(1, 1, 2), (), None)
