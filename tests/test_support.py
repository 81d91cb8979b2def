"""The README's matrix: every cell is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.models import IMAGE, PAD, prompt, shared
from tests.policy_table import EVICTING, options
from vlm_prune import UnsupportedCallError, pruned
from vlm_prune.errors import UnsupportedModelError
from vlm_prune.eval.census.prompts import prompt as census_prompt
from vlm_prune.eval.census.shrink import tiny_model
from vlm_prune.registry import ADAPTERS, BUILT_IN, POLICIES, find_anatomy, policy_class
from vlm_prune.support import FULL, elsewhere, families, markdown, support

FAMILIES = families()
SMALL = {"llava_onevision": [(2, -1, 1, -2, 4), (6, -3, 2)]}
"""Images that are not resized: several of a prompt come as one tile each, and the third sketch is a small one."""
BATCH = [(2, -1, 4), (1, -2, 3), (7,)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generate(model, inputs):
    fixed = {
        "max_new_tokens": 3,
        "suppress_tokens": [IMAGE, 61, 62, 63],
        "do_sample": False,
        "pad_token_id": PAD,
    }
    return model.generate(**inputs, **fixed)


def works(model, family, policy, rows):
    """Each row of a batch gives what it gives alone, something is dropped, and generate goes on."""
    batch = prompt(family, rows)
    with pruned(model, **options(policy)):
        together = model(**batch.inputs)
        receipt = model.pruning.receipt
        assert together.logits.isfinite().all()
        dropped = (batch.ids == IMAGE) & ~together.logits.any(-1)
        drops = policy_class(policy).prunes
        assert bool(dropped.any()) == (drops and policy not in EVICTING)
        assert (receipt.kv_bytes < receipt.kv_bytes_dense) == drops
        assert (receipt.stand_in is not None) == ("cls" in support(policy, family).notes), (
            "the receipt names what stands in for CLS"
        )
        tokens = generate(model, batch.inputs)[:, batch.ids.shape[1] :]
        for b, row in enumerate(batch.rows()):
            single = model(**row.inputs).logits[0]
            real = batch.mask[b].bool()
            torch.testing.assert_close(together.logits[b, real], single, atol=5e-4, rtol=1e-3)
            assert generate(model, row.inputs)[0, row.ids.shape[1] :].tolist() == tokens[b].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_cell(policy, family):
    model, cell = shared(family), support(policy, family)
    works(model, family, policy, BATCH if cell.level == FULL else SMALL[family])
    if cell.level != FULL:
        with pruned(model, **options(policy)), pytest.raises(UnsupportedCallError, match=policy):
            model(**prompt(family, [(3, -1, 4)]).inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_those_of_the_models(family):
    assert find_anatomy(shared(family)).tower.has_cls == FAMILIES[family].cls


@pytest.mark.parametrize("policy", sorted(BUILT_IN))
def test_other_models_refuse_what_looks_into_their_tower(policy):
    model = tiny_model("mistral3")
    inputs, settings = census_prompt(model, 1), options(policy)
    if elsewhere(policy).level == FULL:
        with pruned(model, **settings):
            assert model(**inputs).logits[:, -1].isfinite().all()
    else:
        with pytest.raises(UnsupportedModelError, match=policy), pruned(model, **settings):
            pass


def test_the_readme_has_the_matrix():
    assert set(FAMILIES) <= set(ADAPTERS)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- vlm-prune families --markdown -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    assert table is not None
    assert table[1].strip() == markdown(), "put the output of `vlm-prune families --markdown` into the README"
