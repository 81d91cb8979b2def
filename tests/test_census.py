"""The census of a prefill: counted as a loop would, and the same whether the host or the device does it."""

from __future__ import annotations

import pytest
import torch

from tests.models import prompt, shared
from tests.policy_table import options
from vlm_prune import calls, pruned
from vlm_prune.budget import Budget
from vlm_prune.census import Census


@pytest.mark.parametrize("kinds", [0, 1, 2])
@pytest.mark.parametrize("holes", [False, True])
def test_counts_what_a_loop_counts(kinds, holes):
    generator = torch.Generator().manual_seed(kinds)
    kind = torch.randint(0, 3, (4, 50), generator=generator)
    alive = torch.rand(4, 50, generator=generator) > 0.3 if holes else torch.ones(4, 50, dtype=torch.bool)
    live = alive & (torch.rand(4, 50, generator=generator) > 0.2)
    found = Census.take([kind == n for n in range(kinds)], live, alive if holes else None)
    for row in range(4):
        cells = list(zip(kind[row].tolist(), live[row].tolist(), alive[row].tolist(), strict=True))
        assert found.live[row] == sum(lives for _, lives, _ in cells)
        assert found.visual[row] == sum(lives and which < kinds for which, lives, _ in cells)
        assert found.text[row] == sum(lives and which >= kinds for which, lives, _ in cells)
        for n in range(kinds):
            assert found.placeholders[n][row] == sum(which == n for which, _, _ in cells)
    assert found.holes == (~alive).sum()
    assert found.width == max(found.live)
    assert not found.even


def test_a_turn_of_nothing_has_one_row():
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    found = Census.take([~nothing], nothing, nothing)
    assert (found.width, found.even) == (1, False)


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("policy", ["fastv", "vflowopt", "dyvte", "mustdrop"])
def test_the_host_plans_what_the_device_would_count(policy, family, monkeypatch):
    model, inputs = shared(family), prompt(family, [(3, -2, 5)]).inputs
    seen = []

    def count(self, *masks):
        planned = original(self, *masks)
        live = masks[0] if masks and masks[0] is not None else torch.ones_like(self.image_masks[0])
        seen.append((planned, Census.take(self.image_masks, live, masks[1] if len(masks) > 1 else None)))
        return planned

    original = calls.ForwardCall.count
    monkeypatch.setattr(calls.ForwardCall, "count", count)
    with pruned(model, **options(policy)), torch.no_grad():
        model(**inputs)
    assert seen
    assert seen[0][0] == seen[0][1]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1 / 9, 0.15, 0.45, 0.7])
def test_host_and_device_round_a_share_alike(ratio):
    budget = Budget(ratio=ratio)
    counts = torch.arange(3000)
    assert budget.of_visual(counts, None).tolist() == [budget.of_prompt(n, []) for n in counts.tolist()]
