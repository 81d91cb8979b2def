"""Every policy in conversations, with drafts of an assistant, and in a prefill by chunks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers

from tests.models import make, prompt
from tests.policy_checks import (
    CLOSE,
    answer,
    generate,
    tiny,
)
from tests.policy_table import IN_DECODER, TABLE, options
from vlm_prune import UnsupportedCallError, pruned
from vlm_prune.call.forward_call import current_forward
from vlm_prune.versions import CACHE, CHUNKS_BRING_IMAGES, cache_of

alone = pytest.mark.parametrize("policy", sorted(TABLE))
families = pytest.mark.parametrize("family", ["llava", "internvl"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def second_turn(family, first, later):
    """Two turns of a conversation, and a function that puts the second after what was said in the first."""
    batch, more = prompt(family, first), prompt(family, later, seed=5)

    def joined(sequences):
        said = torch.ones(len(batch.mask), sequences.shape[1] - batch.mask.shape[1], dtype=torch.long)
        return {
            "input_ids": torch.cat([sequences, more.ids], 1),
            "attention_mask": torch.cat([batch.mask, said, more.mask], 1),
        }

    return batch, more, joined


@alone
@families
def test_a_second_turn_equals_single_steps_and_a_fresh_prompt(policy, family):
    model = tiny(family)
    batch, _, joined = second_turn(family, [(3, -1, 5), (2, -1, 1, -1, 4)], [(4,), (7,)])
    with pruned(model, **options(policy)):
        first = generate(model, batch.inputs)
        whole = joined(first.sequences)
        tokens, logits = answer(model, {**whole, CACHE: cache_of(first)})

        # the same, a token at a time: stock code's own loop, from a cache that holds the first turn
        again, length = generate(model, batch.inputs), batch.ids.shape[1]
        held = cache_of(again)
        for end in range(held.get_seq_length() + 1, whole["input_ids"].shape[1] + 1):
            mask = whole["attention_mask"][:, :end]
            position = (mask.cumsum(-1) - 1)[:, -1:].clamp(min=0)
            out = model(
                input_ids=whole["input_ids"][:, end - 1 : end],
                attention_mask=mask,
                position_ids=position,
                **{CACHE: held},
            )
        assert length < held.get_seq_length()
        torch.testing.assert_close(out.logits[:, -1], logits[:, 0], **CLOSE)

        if TABLE[policy].text_blind:
            fresh, steps = answer(model, {**whole, "pixel_values": batch.pixels})
            assert fresh.tolist() == tokens.tolist()
            torch.testing.assert_close(steps, logits, **CLOSE)


@alone
@families
def test_chunked_prefill_gives_the_same_or_is_refused(policy, family):
    model, batch = tiny(family), prompt(family, [(3, -1, 5)])
    with pruned(model, **options(policy)):
        if policy not in IN_DECODER and CHUNKS_BRING_IMAGES:
            whole, parts = generate(model, batch.inputs), generate(model, batch.inputs, prefill_chunk_size=7)
            assert torch.equal(whole.sequences, parts.sequences)
        else:
            with pytest.raises(UnsupportedCallError, match="Leave prefill_chunk_size out"):
                generate(model, batch.inputs, prefill_chunk_size=7)
            assert current_forward() is None


@pytest.fixture
def _quiet():
    """Assisted decoding of transformers warns of a deprecated call that it makes itself."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@cache
def helper(family):
    """A stock twin, of which assisted decoding changes the generation config."""
    return make(family)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("drafts", ["an-assistant", "prompt-lookup"])
@alone
@families
def test_drafts_say_the_same(policy, family, drafts):
    """The first call brings drafts along with the image; a policy must not take them for the prompt."""
    model, batch = tiny(family), prompt(family, [(3, -1, 9)])
    batch.ids[0, -9:] = torch.tensor([11, 12, 13, 14, 11, 12, 13, 11, 12])  # what repeats can be looked up
    chosen = (
        {"assistant_model": helper(family)} if drafts == "an-assistant" else {"prompt_lookup_num_tokens": 3}
    )
    more = {"max_new_tokens": 8, "output_logits": False, "output_hidden_states": True}
    with pruned(model, **options(policy)):
        greedy = generate(model, batch.inputs, **more)
        receipt = model.pruning.receipt
        drafted = generate(model, batch.inputs, **more, **chosen)
        assert model.pruning.receipt.kept == receipt.kept
    assert torch.equal(drafted.sequences, greedy.sequences)
    for ours, theirs in zip(drafted.hidden_states[0], greedy.hidden_states[0], strict=True):
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs, **CLOSE)


LATER = {
    "a-second-image": ([(3, -1, 5), (2, -1, 4)], [(2, -1, 3), (7,)]),
    "the-first-image": ([(3, -1, 5), (9,)], [(4,), (2, -1, 3)]),
}
"""Turns in which one row of a batch gets an image and the other one does not."""


@alone
@families
@pytest.mark.parametrize("turns", LATER)
def test_an_image_in_one_row_of_a_second_turn(turns, policy, family):
    model = tiny(family)
    batch, more, joined = second_turn(family, *LATER[turns])
    with pruned(model, **options(policy)):
        first = generate(model, batch.inputs)
        inputs = {**joined(first.sequences), "pixel_values": more.pixels}
        together, logits = answer(model, {**inputs, CACHE: cache_of(first)})
        for b, (row, new) in enumerate(zip(batch.rows(), more.rows(), strict=True)):
            single = generate(model, row.inputs)
            ids = torch.cat([single.sequences, new.ids], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if new.pixels is not None:
                inputs["pixel_values"] = new.pixels
            tokens, steps = answer(model, {**inputs, CACHE: cache_of(single)})
            torch.testing.assert_close(steps[0], logits[b], **CLOSE)
            assert tokens[0].tolist() == together[b].tolist()
