"""Decoders of every kind of layer give what the stock decoder gives for the shortened prompt."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.decoders import DECODERS, INDEXED, make, shared
from tests.models import LAYOUTS, attention_functions, fingerprint, prompt
from tests.reference import budget, expect
from tests.test_generate import generate
from tests.test_turns import all_media, follow_up
from vlm_prune import PolicyError, prune, pruned, unprune
from vlm_prune.versions import CACHE, cache_of

CLOSE = {"atol": 1e-3, "rtol": 1e-3}
decoders = pytest.mark.parametrize("decoder", DECODERS)
rules = pytest.mark.parametrize(
    ("policy", "positions"), [("uniform", "compact"), ("flowcut", "original"), ("random", "original")]
)
FAMILY = "llava"


@decoders
def test_none_and_unprune_are_bit_identical(decoder):
    model, batch = make(decoder), prompt(FAMILY, LAYOUTS["ragged"])
    with torch.no_grad():
        want, said = model(**batch.inputs).logits, generate(model, batch.inputs)
        before, functions = fingerprint(model), attention_functions()
        prune(model, "none")
        assert torch.equal(model(**batch.inputs).logits, want)
        assert torch.equal(generate(model, batch.inputs), said)
        unprune(model)
        prune(model, "flowcut", ratio=0.3)
        model(**batch.inputs)
        unprune(model)
        assert torch.equal(model(**batch.inputs).logits, want)
    assert fingerprint(model) == before
    assert attention_functions() == functions


@decoders
@rules
@pytest.mark.parametrize("layout", ["single", "ragged"])
def test_rows_are_those_of_the_stock_decoder(layout, policy, positions, decoder):
    model, batch = shared(decoder), prompt(FAMILY, LAYOUTS[layout])
    with torch.no_grad():
        _, short = expect(model, batch, policy, positions)
        want = model(**short.inputs).logits
        with pruned(model, policy, positions=positions, **budget(policy)):
            ours = model(**batch.inputs)
    for b, rows in enumerate(short.rows):
        torch.testing.assert_close(ours.logits[b, rows], want[b, -len(rows) :], **CLOSE)
    assert cache_of(ours).get_seq_length() == batch.ids.shape[1]


METHODS = {
    "greedy": {"max_new_tokens": 12},
    "beams": {"num_beams": 3},
    "several-samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 9},
    "no-cache": {"use_cache": False},
}


@decoders
@rules
@pytest.mark.parametrize("method", METHODS)
def test_generate(method, policy, positions, decoder):
    model, options = shared(decoder), METHODS[method]
    batch = prompt(FAMILY, LAYOUTS["ragged"])
    with torch.no_grad():
        _, short = expect(model, batch, policy, positions)
    want = generate(model, short.inputs, **{**options, "use_cache": True})
    with pruned(model, policy, positions=positions, **budget(policy)):
        output = generate(model, batch.inputs, **options)
    assert torch.equal(output[:, batch.ids.shape[1] :], want)


@decoders
def test_a_batch_gives_what_its_rows_give_alone(decoder):
    model, batch = shared(decoder), prompt(FAMILY, LAYOUTS["ragged"])
    with torch.no_grad(), pruned(model, "flowcut", ratio=0.3):
        together = model(**batch.inputs).logits
        said = generate(model, batch.inputs)[:, batch.ids.shape[1] :]
        for b, one in enumerate(batch.rows()):
            alone = model(**one.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], alone, **CLOSE)
            assert torch.equal(generate(model, one.inputs)[:, one.ids.shape[1] :], said[b : b + 1])


@decoders
@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_of_the_user_changes_nothing(pad, decoder):
    model = shared(decoder)
    batch = prompt(FAMILY, LAYOUTS["row-without-image"], pad=pad)
    with torch.no_grad(), pruned(model, "uniform", ratio=0.3):
        together = model(**batch.inputs).logits
        for b, one in enumerate(batch.rows()):
            alone = model(**one.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], alone, **CLOSE)


CONVERSATIONS = {
    "text-follows": [[(3, -1, 5)], [(4,)], [(1,)]],
    "image-follows": [[(3, -1, 5)], [(2, -1, 3)], [(4,)]],
    "image-comes-late": [[(6,)], [(2, -1, 3)], [(3,)]],
    "two-sequences": [[(3, -1, 5), (2, -1, 1, -1, 4)], [(4,), (4,)], [(2, -1, 2), (1, -1, 3)]],
}


@decoders
@rules
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_cache_carried_over_turns_gives_what_a_fresh_prompt_gives(conversation, policy, positions, decoder):
    if conversation == "two-sequences" and policy == "flowcut":
        pytest.skip("sequences would be cut differently, see the test of what is refused")
    model, (first, *later) = shared(decoder), CONVERSATIONS[conversation]
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    turns = [prompt(FAMILY, first)]
    mask = turns[0].mask
    with pruned(model, policy, positions=positions, **budget(policy)):
        output = generate(model, turns[0].inputs, **options)
        for number, rows in enumerate(later):
            turn, ids, mask = follow_up(output.sequences, mask, rows, FAMILY, seed=number + 5)
            turns.append(turn)
            inputs = {"input_ids": ids, "attention_mask": mask}
            want = generate(model, {**inputs, **all_media(turns)}, **options)
            output = generate(model, {**inputs, **turn.media, CACHE: cache_of(output)}, **options)
            for a, b in zip(output.logits, want.logits, strict=True):
                torch.testing.assert_close(a, b, atol=3e-3, rtol=3e-3)
            assert torch.equal(output.sequences, want.sequences)
            assert cache_of(output).get_seq_length() == cache_of(want).get_seq_length()


@decoders
def test_a_prefix_is_computed_once_and_continued_twice(decoder):
    model, batch = shared(decoder), prompt(FAMILY, [(3, -1, 4)])
    with torch.no_grad(), pruned(model, "uniform", ratio=0.3):
        prefix = cache_of(model(**batch.inputs))
        for end in (torch.tensor([[7, 8, 9]]), torch.tensor([[20, 21]])):
            ids = torch.cat([batch.ids, end], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            want = model.generate(**inputs, **batch.media, max_new_tokens=4)
            ours = model.generate(**inputs, **{CACHE: copy.deepcopy(prefix)}, max_new_tokens=4)
            assert torch.equal(ours, want)
        prefix.reset()
        again = model(**batch.inputs, **{CACHE: prefix})
        torch.testing.assert_close(again.logits, model(**batch.inputs).logits)


@pytest.mark.parametrize("decoder", [*DECODERS, *(pytest.param(d, marks=pytest.mark.slow) for d in INDEXED)])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_text_behind_the_cache_of_a_prompt(positions, decoder):
    """Several tokens at once, and one more, against the stock model with a cache of the shortened prompt."""
    if decoder == "minimax_m3" and positions == "original":
        pytest.skip("refused, see the test of positions")
    model, batch = shared(decoder), prompt(FAMILY, [(3, -1, 5)])
    steps = [torch.tensor([[7, 8, 9, 20]]), torch.tensor([[21]])]
    mask, length = batch.mask, batch.ids.shape[1]
    with torch.no_grad():
        _, short = expect(model, batch, "uniform", positions)
        known, place = short.mask, int(short.positions[0, -1]) + 1
        stock = model(**short.inputs)
        with pruned(model, "uniform", positions=positions, **budget("uniform")):
            ours = model(**batch.inputs)
            torch.testing.assert_close(ours.logits[:, short.rows[0]], stock.logits, **CLOSE)
            for ids in steps:
                mask, known = (torch.nn.functional.pad(x, (0, ids.shape[1]), value=1) for x in (mask, known))
                places = torch.arange(ids.shape[1])[None]
                ours = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=places + length,
                    **{CACHE: cache_of(ours)},
                )
                length += ids.shape[1]
                assert cache_of(ours).get_seq_length() == length
                # the stock model, which other hooks of the pruned one do not touch, goes on by itself
                stock = _stock(model, ids, known, places + place, cache_of(stock))
                place += ids.shape[1]
                torch.testing.assert_close(ours.logits, stock.logits, **CLOSE)


def _stock(model, ids, mask, places, past):
    """A step of the unpruned model in the middle of a block where it is pruned."""
    settings = model.pruning.config
    unprune(model)
    output = model(input_ids=ids, attention_mask=mask, position_ids=places, **{CACHE: past})
    prune(model, config=settings)
    return output


def test_keys_that_are_found_by_position_need_compact_ones():
    if "minimax_m3" not in INDEXED:
        pytest.skip("this version of transformers lacks the family")
    with pytest.raises(PolicyError, match=r'positions="original".*MiniMax.*positions="compact"'):
        prune(shared("minimax_m3"), "uniform", positions="original", ratio=0.3)
