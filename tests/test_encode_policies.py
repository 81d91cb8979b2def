"""Policies that choose around the projector, at work in whole models."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.models import LAYOUTS, make, prompt
from tests.reference_encode import ENCODE as OF_TILES
from tests.reference_encode import agilepruner_units, seen
from tests.reference_video import OF_IMAGES
from vlm_prune import pruned
from vlm_prune.encode.shrink import grid_places, shrink
from vlm_prune.policies.agilepruner import AgilePruner, calibrate_erank
from vlm_prune.policies.pooling import Downsample, smaller_grid
from vlm_prune.registry import policy_class

ENCODE = OF_TILES | OF_IMAGES
MADE = {name: policy_class(name) for name in ENCODE}
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
policies = pytest.mark.parametrize("policy", ENCODE)
families = pytest.mark.parametrize("family", ["llava", "llava-full", "internvl"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def expect(model, batch, policy, positions="compact"):
    """As `tests.reference.expect`, for the policies of this file."""
    target = round(reference.RATIO * reference._units(model))
    chosen = [ENCODE[policy](model, tile, target) for tile in batch.pixels]
    kept = reference.Kept([units for units, _ in chosen], [rows for _, rows in chosen])
    return kept, reference.shorten(model, batch, kept, positions)


@families
@policies
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_live_rows_are_those_of_the_shortened_prompt(policy, family, positions):
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    kept, short = expect(model, batch, policy, positions)
    want = model(**short.inputs).logits
    with pruned(model, MADE[policy](positions=positions), ratio=reference.RATIO):
        logits = model(**batch.inputs).logits
        assert model.pruning.receipt.kept == kept.units
    for b, rows in enumerate(short.rows):
        torch.testing.assert_close(logits[b, rows], want[b, -len(rows) :], **CLOSE)


@families
@policies
def test_a_batch_gives_what_its_rows_give_alone(policy, family):
    model, batch = make(family), prompt(family, LAYOUTS["several-images"])
    with pruned(model, MADE[policy](), ratio=reference.RATIO):
        together, kept = model(**batch.inputs).logits, model.pruning.receipt.kept
        alone = []
        for b, row in enumerate(batch.rows()):
            torch.testing.assert_close(
                together[b, batch.mask[b].bool()], model(**row.inputs).logits[0], **CLOSE
            )
            alone += model.pruning.receipt.kept
    assert alone == kept


@families
@policies
def test_keeping_everything_changes_nothing(policy, family):
    model, batch = make(family), prompt(family, LAYOUTS["single"])
    logits = model(**batch.inputs).logits
    with pruned(model, MADE[policy](), ratio=1.0):
        assert torch.equal(model(**batch.inputs).logits, logits)


@families
@policies
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_budget(policy, family, dtype):
    model, batch = make(family).to(dtype), prompt(family, LAYOUTS["several-images"])
    inputs = {**batch.inputs, "pixel_values": batch.pixels.to(dtype)}
    extra = int(family == "llava-full")
    with pruned(model, MADE[policy](), tokens=7 + extra):
        assert not model(**inputs).logits.isnan().any()
        assert [len(units) for units in model.pruning.receipt.kept] == [7] * len(batch.pixels)


@families
@pytest.mark.parametrize("average", [4.0, 12.0])
def test_agilepruner_adapts_to_the_image(family, average):
    model, batch = make(family), prompt(family, LAYOUTS["several-images"])
    cls, target = reference._cls(model), round(reference.RATIO * reference._units(model))
    units = []
    for tile in batch.pixels:
        scores, _, features = seen(model, tile)
        projected = model.model.multi_modal_projector(features)[0, cls:]
        units.append(agilepruner_units(scores, projected, target, average))
    with pruned(model, AgilePruner(erank_avg=average), ratio=reference.RATIO):
        model(**batch.inputs)
        assert model.pruning.receipt.kept == units


@families
def test_official_agilepruner_hands_on_centred_tokens(family):
    model, batch = make(family), prompt(family, LAYOUTS["single"])
    cls = reference._cls(model)
    stock = reference._project(model, reference._tower(model, batch.pixels))
    with pruned(model, AgilePruner(compat="official"), ratio=reference.RATIO):
        features = model.get_image_features(batch.pixels).pooler_output[0]
        kept = model.pruning.receipt.kept[0]
    centred = stock[0, cls:] - stock[0, cls:].mean(0)
    torch.testing.assert_close(features[cls:][kept], centred[kept], **CLOSE)


def test_calibration_takes_what_a_model_gives():
    for family in ("llava", "internvl"):
        batch = prompt(family, LAYOUTS["several-images"])
        model = make(family)
        ranks = [calibrate_erank(model.get_image_features(p[None]).pooler_output) for p in batch.pixels]
        together = calibrate_erank(model.get_image_features(batch.pixels).pooler_output)
        assert together == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
        assert 1 < together < 32


@pytest.mark.parametrize("keep", [4, 6, 9])
@families
def test_downsampling_is_the_stock_tower_on_a_smaller_image(family, keep):
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    cls, side = reference._cls(model), round(reference._units(model) ** 0.5)
    rows, columns = smaller_grid((side, side), keep)
    unit = batch.pixels.shape[-1] // side
    small = shrink(batch.pixels, rows * unit, columns * unit)
    _, (consumed,), merge = reference._parts(model)
    options = {} if family == "internvl" else {"interpolate_pos_encoding": True}
    hidden = model.model.vision_tower(small, output_hidden_states=True, **options).hidden_states[consumed + 1]
    features = hidden[:, 1 - cls :]
    if merge > 1:
        features = features.unflatten(1, (rows * merge, columns * merge))
        features = model.model.pixel_shuffle(features).flatten(1, 2)
    projected = model.model.multi_modal_projector(features)
    kept = reference.Kept([grid_places((side, side), (rows, columns))] * len(projected), list(projected))
    short = reference.shorten(model, batch, kept, "compact")
    want = model(**short.inputs).logits
    with pruned(model, Downsample(), tokens=keep + cls):
        logits = model(**batch.inputs).logits
        receipt = model.pruning.receipt
        assert receipt.kept == kept.units
        assert set(receipt.tower_tokens) == {1 + rows * columns * merge**2}
    for b, live in enumerate(short.rows):
        torch.testing.assert_close(logits[b, live], want[b, -len(live) :], **CLOSE)
