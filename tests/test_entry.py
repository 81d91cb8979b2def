"""The decoder's entry: a policy that knows the question chooses there; all else is as with a choice in the tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.models import EVERY, IMAGE, LAYOUTS, PACKED, PAD, prompt, repeatable, shared
from tests.packed import VIDEO
from vlm_prune import PolicyError, UnsupportedCallError, pruned
from vlm_prune.contract.keep import Keep
from vlm_prune.contract.policy import ScorerPolicy, SelectPolicy
from vlm_prune.kernels import to_device
from vlm_prune.policies.baselines import uniform_index
from vlm_prune.versions import cache_of

RATIO = 1 / 3
SEEN: list = []


@dataclass(frozen=True)
class Late(SelectPolicy):
    """What `uniform` keeps, chosen at the decoder's entry."""

    name: ClassVar[str] = "late-uniform"
    place: ClassVar[str] = "entry"

    def select(self, view):
        SEEN.append(view)
        index = to_device(uniform_index(view.grid, view.target), view.features.device)
        return Keep(index.expand(len(view.features), -1))


@dataclass(frozen=True)
class Asked(ScorerPolicy):
    """Tokens most like the question."""

    name: ClassVar[str] = "asked"
    place: ClassVar[str] = "entry"

    def score(self, view):
        wanted = view.question[..., None] * view.text
        question = wanted.sum(1) / view.question.sum(1, keepdim=True)
        return (view.features @ question[..., None])[..., 0]


@dataclass(frozen=True)
class Greedy(SelectPolicy):
    """Keeps more than it may."""

    name: ClassVar[str] = "too-many"
    place: ClassVar[str] = "entry"

    def select(self, view):
        return Keep.all(len(view.features), view.features.shape[1], view.features.device)


@pytest.fixture(autouse=True)
def _no_grad():
    SEEN.clear()
    with torch.no_grad():
        yield


def generate(model, inputs, **options):
    torch.manual_seed(7)
    fixed = {"max_new_tokens": 4, "pad_token_id": PAD, "suppress_tokens": [IMAGE, VIDEO], "do_sample": False}
    return model.generate(**inputs, **fixed | options)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_choice_at_the_entry_is_the_same_choice_in_the_tower(family, layout):
    model, batch = shared(family), prompt(family, LAYOUTS[layout])
    with pruned(model, "uniform", ratio=RATIO):
        want, said = model(**batch.inputs), generate(model, batch.inputs)
        kept, tokens = model.pruning.receipt.kept, model.pruning.receipt.decoder_tokens
    with pruned(model, Late(), ratio=RATIO):
        ours, say = model(**batch.inputs), generate(model, batch.inputs)
        receipt = model.pruning.receipt
    torch.testing.assert_close(ours.logits, want.logits, atol=2e-4, rtol=1e-3)
    assert torch.equal(say, said)
    assert receipt.kept == kept
    assert receipt.decoder_tokens == tokens
    assert [x.keys.shape for x in cache_of(ours).layers] == [x.keys.shape for x in cache_of(want).layers]


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next", "qwen3_vl"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["beams", "samples", "static", "drafts"],
)
def test_all_of_generate(family, options):
    model = shared(family)
    batch = prompt(
        family, [(2, -1, 4)] if "prompt_lookup_num_tokens" in options else repeatable(model, family)
    )
    with pruned(model, "uniform", ratio=RATIO):
        want = generate(model, batch.inputs, **options)
    with pruned(model, Late(), ratio=RATIO):
        assert torch.equal(generate(model, batch.inputs, **options), want)


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next", "qwen2_5_vl"])
def test_the_text_is_that_of_the_own_prompt(family):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    table = model.get_input_embeddings()
    with pruned(model, Late(), ratio=RATIO):
        model(**batch.inputs)
    visual = (batch.ids == IMAGE) | (batch.ids == VIDEO if family in PACKED else False)
    text = [ids[mask.bool() & ~seen] for ids, mask, seen in zip(batch.ids, batch.mask, visual, strict=True)]
    after = [
        int(mask[int(seen.nonzero().max()) + 1 :].sum())
        for mask, seen in zip(batch.mask, visual, strict=True)
    ]
    counted = []
    for view in SEEN:
        for rows, valid, question in zip(view.text, view.text_valid, view.question, strict=True):
            found = [b for b, ids in enumerate(text) if torch.equal(table(ids), rows[valid])]
            assert len(found) == 1
            assert int(question.sum()) == after[found[0]]
            assert bool(question[-1])
            counted += found
    assert set(counted) == {0, 1, 2}


@pytest.mark.parametrize("family", EVERY)
def test_batch_gives_what_its_rows_give_alone(family):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, Asked(), ratio=RATIO):
        out = model(**batch.inputs)
        kept, alone = model.pruning.receipt.kept, []
        for b, row in enumerate(batch.rows()):
            single = model(**row.inputs)
            alone += model.pruning.receipt.kept
            torch.testing.assert_close(
                out.logits[b, batch.mask[b].bool()], single.logits[0], atol=3e-4, rtol=1e-3
            )
    assert kept == alone


def test_the_question_decides():
    model, batch = shared("llava"), prompt("llava", [(3, -1, 5)])
    other = batch.ids.clone()
    other[0, -5:] = torch.tensor([7, 11, 13, 17, 19])
    with pruned(model, Asked(), ratio=RATIO):
        model(**batch.inputs)
        first = model.pruning.receipt.kept
        model(**{**batch.inputs, "input_ids": other})
        assert model.pruning.receipt.kept != first


def test_composes_with_heads_that_are_modulated():
    model, batch = shared("llava"), prompt("llava", LAYOUTS["ragged"])
    from vlm_prune.registry import policy_class

    heads = policy_class("vhr")(layers=(1, 2))
    with pruned(model, [policy_class("uniform")(), heads], ratio=RATIO):
        want = model(**batch.inputs).logits
    with pruned(model, [Late(), heads], ratio=RATIO):
        torch.testing.assert_close(model(**batch.inputs).logits, want, atol=2e-4, rtol=1e-3)


def test_keeping_all_is_the_stock_model():
    model, batch = shared("llava"), prompt("llava", LAYOUTS["ragged"])
    want = model(**batch.inputs).logits
    with pruned(model, Late(), ratio=1.0):
        assert torch.equal(model(**batch.inputs).logits, want)


def test_too_many_and_unknown_features_are_refused():
    model, batch = shared("llava"), prompt("llava", [(3, -1, 5)])
    with pruned(model, Greedy(), ratio=RATIO), pytest.raises(PolicyError, match="too-many keeps 36 of 36"):
        model(**batch.inputs)
    embeds = model.get_input_embeddings()(batch.ids)
    with pruned(model, Late(), ratio=RATIO), pytest.raises(UnsupportedCallError, match="late-uniform"):
        model(inputs_embeds=embeds, attention_mask=batch.mask)
    assert torch.equal(model(**batch.inputs).logits, shared("llava")(**batch.inputs).logits)
