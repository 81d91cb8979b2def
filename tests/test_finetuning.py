"""Training with pruning on: gradients of every policy, gradient checkpointing, and a loss that falls."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.models import IMAGE, LAYOUTS, make, prompt
from tests.policy_table import ENCODE, TABLE, options
from tests.refusal import refuses
from tests.test_training import gradients, text
from vlm_prune import UnsupportedCallError, ignore_visual_labels, prune, pruned, unprune
from vlm_prune.versions import HOOKS_RUN_AGAIN

COMPOSITIONS = [*TABLE, "flowcut+vhr", "pool+fastv+paint"]
MORE = ["mustdrop", "vhr", "paint", "flowcut+vhr"]
STEPS = 8


def enable_checkpointing(model, reentrant=False):
    on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    on({"use_reentrant": reentrant})
    model.model.vision_tower.eval()  # what is cut inside a tower cannot run again


def acts_in_decoder(policy):
    return not set(policy.split("+")) <= {*ENCODE} - {"mustdrop", "vflowopt"}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "reentrant", [False, pytest.param(True, marks=slow)], ids=["checkpoint", "reentrant"]
)
@pytest.mark.parametrize("family", ["llava", pytest.param("internvl", marks=slow)])
@pytest.mark.parametrize("policy", COMPOSITIONS)
def test_checkpointing_the_decoder_changes_no_gradient(policy, family, reentrant):
    model, batch = make(family).train(), prompt(family, LAYOUTS["ragged"])
    inputs = {**batch.inputs, "labels": text(batch)}
    prune(model, **options(policy))
    want = gradients(model, model(**inputs, use_cache=False).loss)
    assert len(want) > 50
    assert all(gradient.isfinite().all() for gradient in want.values())
    enable_checkpointing(model, reentrant)
    if HOOKS_RUN_AGAIN and acts_in_decoder(policy):
        with refuses(model, UnsupportedCallError, "gradient checkpointing", "Upgrade transformers"):
            model(**inputs, use_cache=False)
        return
    ours = gradients(model, model(**inputs, use_cache=False).loss)
    assert want.keys() == ours.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, want[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=slow)], ids=["plain", "checkpointed"]
)
@pytest.mark.parametrize("policy", ["flowcut", "fastv", "var", *(pytest.param(p, marks=slow) for p in MORE)])
def test_loss_falls(policy, checkpointing):
    """A few steps on one batch, with the policy's choices free to change on the way."""
    if checkpointing and HOOKS_RUN_AGAIN and acts_in_decoder(policy):
        pytest.skip("refused by this version of transformers, see above")
    model, batch = make("llava").train(), prompt("llava", LAYOUTS["ragged"])
    inputs = {**batch.inputs, "labels": text(batch)}
    if checkpointing:
        enable_checkpointing(model)
    prune(model, **options(policy))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    with torch.no_grad():  # what was learnt stays, pruned or not
        trained = model.eval()(**inputs).loss
        assert trained < 0.5 * losses[0]
        with pruned(unprune(model), **options(policy)):
            assert torch.equal(model(**inputs).loss, trained)


def examples():
    """One prompt, mostly image, and one with three images and much text: pruning takes unequal shares of them."""
    batches = [prompt("llava", [(2, -1, 3)]), prompt("llava", [(1, -1, 9, -2, 30)], seed=2)]
    return [{**batch.inputs, "labels": batch.ids.clone()} for batch in batches]


def first(rows):
    """A collator for micro-batches of one prompt."""
    return dict(rows[0])


def trained(model, collator, folder):
    """The weights after one step of plain gradient descent on both examples, accumulated by a trainer."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=examples(), data_collator=collator)
    trainer.train()
    return dict(model.named_parameters())


@pytest.mark.parametrize("policy", ["uniform", "fastv"])
def test_a_step_of_several_micro_batches_is_exact(policy, tmp_path):
    """It is the mean over all labels of text, as if the micro-batches were one sum."""
    model = make("llava")
    prune(model, **options(policy))
    twin = copy.deepcopy(model)
    collator = pickle.loads(pickle.dumps(ignore_visual_labels(model, first)))  # as workers get it
    total = sum(int((x["labels"][:, 1:] != IMAGE).sum()) for x in examples())
    for example in examples():
        labels = example["labels"].masked_fill(example["input_ids"] == IMAGE, -100)
        loss = twin.train()(**{**example, "labels": labels}, use_cache=False).loss
        (loss * int((labels[:, 1:] != -100).sum()) / total).backward()
    want = {name: p.detach() - p.grad for name, p in twin.named_parameters() if p.grad is not None}
    ours = trained(model, collator, tmp_path)
    assert len(want) > 50
    for name, weight in want.items():
        torch.testing.assert_close(ours[name].detach(), weight, atol=1e-5, rtol=1e-4)


def test_labels_that_cannot_be_ignored():
    model = make("llava")
    batch = prompt("llava", LAYOUTS["ragged"])
    for made in ({"input_ids": batch.ids}, {"input_ids": batch.ids, "labels": batch.ids[:, 1:]}):
        with pytest.raises(UnsupportedCallError, match="input_ids and labels of one shape"):
            ignore_visual_labels(model, lambda rows, made=made: dict(made))(None)
    labels = ignore_visual_labels(model, lambda rows: {"input_ids": batch.ids, "labels": batch.ids})(None)[
        "labels"
    ]
    assert torch.equal(labels == -100, batch.ids == IMAGE)
