"""Labels, loss and gradients: training a pruned model equals training on the shortened prompt."""

from __future__ import annotations

import pytest
import torch

from tests.models import FAMILIES, IMAGE, LAYOUTS, make, prompt, shared, tower
from tests.reference import CASES, POLICIES, budget, expect
from vlm_prune import UnsupportedCallError, pruned

cases = pytest.mark.parametrize(("policy", "family", "positions"), CASES)
IGNORE = -100


def answer_only(batch):
    """The last three tokens of each row."""
    return batch.ids.masked_fill(batch.mask.flip(1).cumsum(1).flip(1) > 3, IGNORE)


def behind_image(batch):
    """The first text token after each image: predicted by the last visual token that is kept."""
    image = batch.ids == IMAGE
    first = torch.nn.functional.pad(image[:, :-1], (1, 0)) & ~image
    return batch.ids.masked_fill(~first | ~batch.mask.bool(), IGNORE)


def text(batch):
    return batch.ids.masked_fill((batch.ids == IMAGE) | ~batch.mask.bool(), IGNORE)


def all_tokens(batch):
    return batch.ids.masked_fill(~batch.mask.bool(), IGNORE)


LABELS = {"answer": answer_only, "after-image": behind_image, "text": text, "input-ids": all_tokens}


def short_labels(labels, short):
    """The labels of live rows, laid out as the oracle's prompt."""
    laid_out = torch.full(short.mask.shape, IGNORE)
    for b, rows in enumerate(short.rows):
        laid_out[b, -len(rows) + 1 :] = labels[b, rows[1:]]  # nothing predicts a sequence's first token
    return laid_out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
@pytest.mark.parametrize("labelled", LABELS)
@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_loss(pad, labelled, policy, family):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"], pad)
    _, short = expect(model, batch, policy)
    labels = LABELS[labelled](batch)
    want = model(**short.inputs, labels=short_labels(labels, short)).loss
    given = labels.clone()
    with pruned(model, policy, **budget(policy)):
        output = model(**batch.inputs, labels=given, use_cache=False)
        summed = model(**batch.inputs, labels=given, num_items_in_batch=10).loss
    torch.testing.assert_close(output.loss, want, atol=1e-5, rtol=1e-5)
    # a trainer counts the labels of the whole prompt, those of tokens that will be dropped too
    count = (labels[:, 1:] != IGNORE).sum()
    torch.testing.assert_close(summed * 10 / count, want, atol=1e-5, rtol=1e-5)
    assert output.logits.shape[:2] == batch.ids.shape
    assert torch.equal(given, labels)


@torch.no_grad()
def test_labels_of_one_prompt_and_of_none_without_image():
    model, batch = shared("llava"), prompt("llava", LAYOUTS["single"])
    _, short = expect(model, batch, "uniform")
    plain = prompt("llava", [(6,)])
    stock = model(**plain.inputs, labels=plain.ids).loss
    want = model(**short.inputs, labels=short_labels(batch.ids, short)).loss
    with pruned(model, "uniform", **budget("uniform")):
        torch.testing.assert_close(model(**batch.inputs, labels=batch.ids).loss, want)
        assert torch.equal(model(**plain.inputs, labels=plain.ids).loss, stock)


@torch.no_grad()
def test_shift_labels_given_by_the_caller():
    """What sequence-parallel trainers pass; the caller's tensor stays as it is."""
    model, batch = shared("llava"), prompt("llava", LAYOUTS["ragged"])
    labels = text(batch)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    given = shifted.clone()
    with pruned(model, "uniform", **budget("uniform")):
        want = model(**batch.inputs, labels=labels).loss
        torch.testing.assert_close(model(**batch.inputs, labels=labels, shift_labels=given).loss, want)
        model(**batch.inputs, shift_labels=given)
    assert torch.equal(given, shifted)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@cases
def test_gradients(policy, family, positions):
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    labels = text(batch)
    _, short = expect(model, batch, policy, positions)
    with short.given(model):
        want = gradients(model, model(**short.inputs, labels=short_labels(labels, short)).loss)
    with pruned(model, policy, positions=positions, **budget(policy)):
        ours = gradients(model, model(**batch.inputs, labels=labels).loss)
    assert want.keys() == ours.keys()
    for name, gradient in ours.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(
            gradient, want[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@cases
def test_gradient_checkpointing(policy, family, positions):
    model, batch = make(family).train(), prompt(family, LAYOUTS["ragged"])
    inputs = {**batch.inputs, "labels": text(batch), "use_cache": False}
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = gradients(model, model(**inputs).loss)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if policy == "flowcut":  # cuts inside the tower, whose layers cannot be run again
            with pytest.raises(
                UnsupportedCallError, match=r"gradient checkpointing.*Turn it off for the tower"
            ):
                model(**inputs)
            tower(model).eval()
        ours = gradients(model, model(**inputs).loss)
    assert want.keys() == ours.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, want[name], atol=1e-5, rtol=1e-4)
