"""The receipt says which visual tokens each layer computed: compared with the hidden states that came out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.models import FAMILIES, IMAGE, prompt, shared
from tests.policy_checks import RAGGED
from tests.policy_table import PREFILL, TABLE, options
from vlm_prune import pruned

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def decoder_rows(batch, hidden, family):
    """Units of each tile whose row in ``hidden`` ``(batch, length, channels)`` is not zero, found by counting."""
    units, per_tile = (
        FAMILIES[family].placeholders - int(family == "llava-full"),
        FAMILIES[family].placeholders,
    )
    found = [[] for tiles in batch.tiles for _ in tiles]
    for ids, rows, tiles in zip(batch.ids, hidden, batch.tiles, strict=True):
        places = (ids == IMAGE).nonzero()[:, 0].tolist()
        for number, place in enumerate(places):
            unit = number % per_tile - (per_tile - units)
            if unit >= 0 and rows[place].any():
                found[tiles[number // per_tile]].append(unit)
    return found


@families
@pytest.mark.parametrize("policy", TABLE)
def test_every_layer_computed_what_the_receipt_says(policy, family):
    model, batch = shared(family), prompt(family, RAGGED)
    with pruned(model, **options(policy)):
        states = model(**batch.inputs, output_hidden_states=True).hidden_states
        receipt = model.pruning.receipt
    patches = 4 if family == "internvl" else 1
    assert [1 + patches * max(map(len, units)) for units in receipt.tower_units] == receipt.tower_tokens
    assert receipt.decoder_units == [decoder_rows(batch, x, family) for x in states[:-1]]
    assert receipt.decoder_units[0] == receipt.kept
    for flow in zip(*receipt.tower_units, receipt.kept, *receipt.decoder_units, strict=True):
        for before, after in pairwise(flow):
            assert set(after) <= set(before)


@families
def test_each_cut_in_the_tower_shows(family):
    model, batch = shared(family), prompt(family, RAGGED)
    with pruned(model, "flowcut", ratio=0.3):
        model(**batch.inputs)
        receipt = model.pruning.receipt
    sizes = [len(units[0]) for units in receipt.tower_units]
    assert sizes[0] == receipt.units > sizes[-1] >= len(receipt.kept[0])


@families
@pytest.mark.parametrize("policy", PREFILL)
def test_beams_tell_what_the_prompt_tells(policy, family):
    model, batch = shared(family), prompt(family, [(2, -1, 1, -2, 4), (1, -3, 3)])
    with pruned(model, **options(policy)):
        model(**batch.inputs)
        alone = model.pruning.receipt.decoder_units
        model.generate(**batch.inputs, max_new_tokens=2, num_beams=3)
        assert model.pruning.receipt.decoder_units == alone
