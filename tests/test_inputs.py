"""What a call may bring, for every policy: features made beforehand, embeddings, no image in a row or in none."""

from __future__ import annotations

import pytest
import torch

from tests.models import IMAGE, LAYOUTS, prompt
from tests.policy_checks import CLOSE, answer, generate, tiny
from tests.policy_table import IN_DECODER, TABLE, options
from vlm_prune import UnsupportedCallError, pruned
from vlm_prune.registry import policy_class

alone = pytest.mark.parametrize("policy", sorted(TABLE))
families = pytest.mark.parametrize("family", ["llava", "internvl"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@alone
@families
def test_features_made_beforehand(policy, family):
    """Made once, used by a forward and twice by generate, with another call in between."""
    model, batch = tiny(family), prompt(family, LAYOUTS["ragged"])
    rest = {"input_ids": batch.ids, "attention_mask": batch.mask}
    with pruned(model, **options(policy)):
        want, (tokens, logits) = model(**batch.inputs).logits, answer(model, batch.inputs)
        encoded = model.get_image_features(batch.pixels)
        model(**prompt(family, LAYOUTS["single"], seed=9).inputs)
        torch.testing.assert_close(model(**rest, mm_encoder_outputs={"image": encoded}).logits, want)
        for _ in range(2):
            again, steps = answer(model, {**rest, "mm_encoder_outputs": {"image": encoded}})
            assert torch.equal(again, tokens)
            torch.testing.assert_close(steps, logits)


def embedded(model, batch):
    """The prompt's embeddings with the image features in them, as a user's own code would put them together."""
    features = torch.cat(list(model.get_image_features(batch.pixels).pooler_output))
    table = model.get_input_embeddings()(batch.ids)
    flat = features.reshape(-1, table.shape[-1])
    return table.masked_scatter((batch.ids == IMAGE)[..., None], flat)


@alone
@families
def test_embeddings_instead_of_ids(policy, family):
    model, batch = tiny(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, **options(policy)):
        want = generate(model, batch.inputs)
        inputs = {"inputs_embeds": embedded(model, batch), "attention_mask": batch.mask}
        if policy in IN_DECODER or policy_class(policy).acts.guides:
            with pytest.raises(
                UnsupportedCallError, match=r"cannot tell which.*Pass input_ids and pixel_values"
            ):
                generate(model, inputs)
            # with placeholders still in them, and the images beside, they are as good as ids
            inputs["inputs_embeds"] = model.get_input_embeddings()(batch.ids)
            out = model(**inputs, pixel_values=batch.pixels)
            torch.testing.assert_close(out.logits, model(**batch.inputs).logits, **CLOSE)
        else:
            ours = generate(model, inputs)
            assert torch.equal(ours.sequences, want.sequences[:, batch.ids.shape[1] :])


@alone
@families
def test_no_image_at_all(policy, family):
    model, batch = tiny(family), prompt(family, [(5,), (8,)])
    logits, sequences = model(**batch.inputs).logits, generate(model, batch.inputs).sequences
    with pruned(model, **options(policy)):
        assert torch.equal(model(**batch.inputs).logits, logits)
        assert torch.equal(generate(model, batch.inputs).sequences, sequences)
        assert torch.equal(generate(model, batch.inputs, cache_implementation="static").sequences, sequences)
        assert model.pruning.receipt is None


@alone
@families
def test_rows_without_image(policy, family):
    model, batch = tiny(family), prompt(family, LAYOUTS["row-without-image"])
    with pruned(model, **options(policy)):
        together, (tokens, steps) = model(**batch.inputs).logits, answer(model, batch.inputs)
        for b, row in enumerate(batch.rows()):
            torch.testing.assert_close(
                together[b, batch.mask[b].bool()], model(**row.inputs).logits[0], **CLOSE
            )
            new, logits = answer(model, row.inputs)
            assert new[0].tolist() == tokens[b].tolist()
            torch.testing.assert_close(logits[0], steps[b], **CLOSE)
