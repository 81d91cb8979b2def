"""Policies composed: each of the encode stage with each of the later ones, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.models import fingerprint, prompt
from tests.policy_checks import (
    RAGGED,
    assert_like_singles,
    assert_stock,
    entered,
    stock,
    tiny,
)
from tests.policy_table import ENCODE, EVICTING, MODULATE, PREFILL, TABLE, options
from vlm_prune import BudgetError, PolicyError, prune, pruned, unprune
from vlm_prune.policies.mustdrop import MustDrop
from vlm_prune.policies.paint import Paint
from vlm_prune.registry import policy_class

PAIRS = [f"{e}+{p}" for e in ENCODE for p in PREFILL]
PAIRS += [f"{e}+{m}" for e in ENCODE for m in MODULATE]
PAIRS += [f"{p}+{m}" for p in PREFILL for m in MODULATE]
PAIRS += [f"flowcut+{c}" for c in EVICTING] + [
    f"{e}+snapkv" for e in (*ENCODE, *PREFILL) if e != "flowcut" and "decode" not in policy_class(e).stages
]
PAIRS += ["fastv+dyvte", "vhr+fastv", "paint+flowcut", "vhr+var", "var+paint"]
TRIPLES = [
    f"{e}+{PREFILL[i % len(PREFILL)]}+{MODULATE[i % len(MODULATE)]}" for i, e in enumerate(sorted(ENCODE))
]
TRIPLES += ["vhr+flowcut+fastv", "flowcut+fastv+dyvte+paint+var+vhr", "mustdrop+fastv+vhr+var"]

families = pytest.mark.parametrize("family", ["llava", "internvl"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("composition", PAIRS + TRIPLES)
@families
def test_compositions(composition, family):
    model, batch = tiny(family), prompt(family, RAGGED[:2])
    stock(family)
    before = fingerprint(model)
    prune(model, **options(composition))
    assert [p.name for p in model.pruning.policies] == composition.split("+")
    receipt, left = assert_like_singles(model, batch, composition)
    names = composition.split("+")
    counts, came = {len(kept) for kept in receipt.kept}, entered(batch, receipt)
    owner = next((name for name in names if name in ENCODE or name in PREFILL), None)
    if "dyvte" in names:
        assert left == [0] * len(left)
    elif owner in ENCODE and TABLE[owner].holds == "tile" and not set(PREFILL) & set(names):
        assert left == came
    if owner is not None and TABLE[owner].holds == "tile":
        assert counts == {receipt.planned}
        if "fastv" in names and "dyvte" not in names:  # takes its own share of what it is given
            assert left == [round(0.5 * n) for n in came]
    unprune(model)
    assert fingerprint(model) == before
    assert_stock(model, family)


@families
def test_keeping_everything_while_another_policy_watches_the_tower(family):
    """Thresholds know no budget but "all", which holds though the tower is looked at for PAINT's sake."""
    model, batch = tiny(family), prompt(family, RAGGED)
    idle = Paint(alpha=0, beta=0)
    for policy in [MustDrop(thresholds=(0.05, 0.2), merge_threshold=0.1, layers=(0, 1)), *all_alone()]:
        with pruned(model, [policy, idle], **({"ratio": 1.0} if policy.prunes else {})):
            assert torch.equal(model(**batch.inputs).logits, stock(family)[0])


def all_alone():
    """Every policy that drops, as an object."""
    return [policy_class(name)(**TABLE[name].settings) for name in [*ENCODE, *PREFILL]]


# --- errors ---


@pytest.mark.parametrize(("first", "second"), [("flowcut", "pool"), ("mustdrop", "vflowopt")])
def test_two_policies_of_the_encode_stage_are_refused(first, second):
    model = tiny("llava")
    before = fingerprint(model)
    with pytest.raises(PolicyError, match=f"{first} and {second} both drop tokens in the encode stage"):
        prune(model, f"{first}+{second}")
    with pytest.raises(PolicyError, match="can appear in a composition only once"):
        prune(model, "vhr+vhr")
    assert fingerprint(model) == before


@pytest.mark.parametrize("budget", [{"ratio": 0.5}, {"tokens": 4}])
@pytest.mark.parametrize("composition", [*MODULATE, "paint+vhr+var"])
def test_a_budget_without_a_policy_that_drops_is_refused(composition, budget):
    with pytest.raises(BudgetError, match=r"drops no tokens, so (ratio|tokens)=[0-9.]+ has no meaning"):
        prune(tiny("llava"), composition, **budget)


def test_settings_of_a_composition_are_given_by_name():
    model = tiny("llava")
    with pruned(model, "flowcut+fastv+vhr", tokens=9, fastv={"k": 2}, vhr={"alpha": 1.5}):
        _, fastv, vhr = model.pruning.policies
        assert (fastv.k, vhr.alpha, model.pruning.budget.tokens) == (2, 1.5, 9)
    for wrong in ({"alpha": 1.5}, {"vhr": 1.5}, {"var": {}}):
        with pytest.raises(
            PolicyError, match=r'settings of the composition "flowcut.vhr" are given by policy'
        ):
            prune(model, "flowcut+vhr", **wrong)
    with pytest.raises(PolicyError, match="policy=\"vhr\" has no setting 'alfa'"):
        prune(model, "flowcut+vhr", vhr={"alfa": 1.5})
    with pytest.raises(PolicyError, match="is not known"):
        prune(model, "flowcut+vrh")
