"""What the tests of all policies ask of a pruned model: its answers, its receipt, its rows alone."""

from __future__ import annotations

from functools import cache

import torch

from tests.models import IMAGE, prompt, shared
from tests.policy_table import EVICTING
from vlm_prune.call.encode_call import current_encode
from vlm_prune.call.forward_call import current_forward
from vlm_prune.registry import policy_class
from vlm_prune.versions import cache_of

CLOSE = {"atol": 3e-4, "rtol": 1e-3}
RAGGED = [(2, -1, 4), (1, -1, 2, -2, 3), (-1, 9)]
"""The batch of these tests, see `tests.models.prompt`."""
STEPS = 3


def tiny(family, attention="sdpa"):
    """The model of the other tests, which this gets back as it was."""
    return shared(family) if attention == "sdpa" else shared(family, attention)


def generate(model, inputs, **more):
    """Sequences and logits of a greedy answer; a random model must not say <image>."""
    fixed = {"max_new_tokens": STEPS, "suppress_tokens": [IMAGE], "do_sample": False}
    fixed |= {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **fixed | more)


def answer(model, inputs, **more):
    """New tokens ``(sequences, STEPS)``, and logits ``(sequences, STEPS, vocabulary)``."""
    out = generate(model, inputs, **more)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


@cache
def stock(family, attention="sdpa"):
    """What the unpruned model says to the ragged batch: logits and the generated sequences."""
    model, batch = tiny(family, attention), prompt(family, RAGGED)
    with torch.no_grad():
        return model(**batch.inputs).logits, generate(model, batch.inputs).sequences


def assert_stock(model, family):
    """The model is unpruned: same bits, no sites left, nothing under way."""
    logits, sequences = stock(family)
    batch = prompt(family, RAGGED)
    assert not any(hasattr(module, "vlm_prune_site") for module in model.modules())
    assert current_forward() is None
    assert current_encode() is None
    assert torch.equal(model(**batch.inputs).logits, logits)
    assert torch.equal(generate(model, batch.inputs).sequences, sequences)


def visual_left(batch, out):
    """Visual tokens of each prompt that went through all layers: the others' logits are zero."""
    return ((batch.ids == IMAGE) & out.logits.any(-1)).sum(-1).tolist()


def entered(batch, receipt):
    """Visual tokens of each prompt that entered the decoder."""
    return [sum(len(receipt.kept[tile]) for tile in tiles) for tiles in batch.tiles]


def assert_adds_up(model, batch, out, composition):
    """The receipt against what the call left after: the cache, and the rows of the logits."""
    receipt, layers = model.pruning.receipt, cache_of(out).layers
    stored = [layer.keys.shape[2] for layer in layers]
    text = (batch.mask.bool() & (batch.ids != IMAGE)).sum(-1).tolist()
    first = [n + t for n, t in zip(entered(batch, receipt), text, strict=True)]
    left = visual_left(batch, out)
    last = [n + t for n, t in zip(left, text, strict=True)]
    assert receipt.policy == composition
    assert receipt.batch == len(batch.ids)
    assert receipt.prompt_tokens == batch.ids.shape[1] == out.logits.shape[1]
    assert len(receipt.decoder_tokens) == len(layers)
    assert receipt.decoder_tokens[0] == max(first)
    assert receipt.decoder_tokens == sorted(receipt.decoder_tokens, reverse=True)
    assert max(last) <= receipt.decoder_tokens[-1]
    stages = {stage for name in composition.split("+") for stage in policy_class(name).stages}
    if set(EVICTING) & set(
        composition.split("+")
    ):  # layers lose more than what was dropped before the last one
        assert all(max(text) <= n <= of for n, of in zip(stored, receipt.decoder_tokens, strict=True))
    elif "decode" in stages:  # layers also lose what later ones dropped
        assert set(stored) == {max(last)}
    else:
        assert stored == receipt.decoder_tokens
    assert {layer.get_seq_length() for layer in layers} == {batch.ids.shape[1]}
    assert receipt.kv_bytes == sum(t.numel() * t.element_size() for x in layers for t in (x.keys, x.values))
    assert receipt.kv_bytes <= receipt.kv_bytes_dense
    assert receipt.flops - receipt.guide_flops <= receipt.flops_dense
    assert all(row == sorted(set(row)) and row[-1] < receipt.units for row in receipt.kept)
    assert "decoder" in str(receipt)
    return left


def assert_like_singles(model, batch, composition):
    """Each row of a batch keeps, says and counts what it does alone; returns the batch's receipt and `visual_left`."""
    out = model(**batch.inputs)
    assert out.logits.isfinite().all()
    left = assert_adds_up(model, batch, out, composition)
    receipt, (tokens, logits) = model.pruning.receipt, answer(model, batch.inputs)
    torch.testing.assert_close(logits[:, 0], out.logits[:, -1], **CLOSE)
    kept_alone = []
    for b, row in enumerate(batch.rows()):
        if "+" not in composition:
            single = model(**row.inputs)
            assert assert_adds_up(model, row, single, composition) == left[b : b + 1]
            torch.testing.assert_close(out.logits[b, batch.mask[b].bool()], single.logits[0], **CLOSE)
        new, steps = answer(model, row.inputs)
        kept_alone += model.pruning.receipt.kept
        assert new[0].tolist() == tokens[b].tolist()
        torch.testing.assert_close(steps[0], logits[b], **CLOSE)
    assert kept_alone == receipt.kept
    return receipt, left
