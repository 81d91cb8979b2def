"""AgilePruner, DivPrune, VisionZip and pooling against loops that anyone can check, one tile at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from tests.reference_encode import agilepruner_units, divprune_units, visionzip_rows
from vlm_prune.contract.policy import Keep, Policy
from vlm_prune.contract.views import AttentionView, FeaturesView, TowerView
from vlm_prune.encode.shrink import grid_places, shrink
from vlm_prune.policies.agilepruner import AgilePruner, calibrate_erank, effective_rank
from vlm_prune.policies.divprune import DivPrune, max_min_diverse
from vlm_prune.policies.pooling import (
    Downsample,
    Pool,
    pool,
    pooling_cells,
    smaller_grid,
)
from vlm_prune.policies.scope import SCOPE
from vlm_prune.policies.scores import cosine_distance
from vlm_prune.policies.visionzip import VisionZip, assign

GRID, CHANNELS = (4, 6), 10
UNITS = GRID[0] * GRID[1]


def ask(policy: Policy, features: torch.Tensor, attended: AttentionView, keep: int) -> Keep:
    """What the engine asks a policy, in its order."""
    carry: dict[str, torch.Tensor] = {}
    if policy.tower_layers(3):
        policy.encode(
            TowerView(
                layer=3,
                feature_layer=3,
                target=keep,
                grid=GRID,
                units=torch.arange(UNITS).expand(len(features), -1),
                hidden=features,
                attention=attended,
                carry=carry,
            )
        )
    assert all(x.shape == features.shape[:2] for x in carry.values()), "one number per unit"
    pixels = torch.zeros(len(features), 3, 8, 8)
    return policy.encode_final(FeaturesView(features, GRID, keep, pixels.long()[:, 0, 0, 0], pixels, carry))


def tiles(seed: int, batch: int = 3, kind: str = "random") -> tuple[torch.Tensor, AttentionView]:
    """Features ``(batch, UNITS, CHANNELS)`` and the attention of a layer with CLS, in fp64 so that nothing is close."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features, query, key = (
        noise(batch, UNITS, CHANNELS),
        noise(batch, 2, UNITS + 1, 4),
        noise(batch, 2, UNITS + 1, 4),
    )
    if kind == "duplicates":
        features = features[:, torch.arange(UNITS) % 5]
    elif kind == "tied":
        query[:, :, 0] = 0
    elif kind == "constant":
        features = features[:, :1].expand(-1, UNITS, -1).contiguous()
    return features, AttentionView(query, key, key, 0.5, has_cls=True)


KINDS = ("random", "duplicates", "tied", "constant")


def cls_attention(attended: AttentionView, tile: int) -> list[float]:
    """Attention of CLS to each patch, from the whole map."""
    logits = attended.query[tile] @ attended.key[tile].mT * attended.scaling
    return logits.softmax(-1).mean(0)[0, 1:].tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keep=st.integers(1, UNITS),
    kind=st.sampled_from(KINDS),
    average=st.sampled_from([None, 1.0, 7.0]),
)
def test_agilepruner_is_the_loop_of_the_paper(seed, keep, kind, average):
    features, attended = tiles(seed, kind=kind)
    answer = ask(AgilePruner(erank_avg=average), features, attended, keep)
    assert answer.rows is None
    for b, x in enumerate(features):
        units = agilepruner_units(cls_attention(attended, b), x, keep, average)
        assert answer.index[b].tolist() == units


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, UNITS))
def test_divprune_takes_the_farthest_token(seed, keep):
    features, attended = tiles(seed)
    answer = ask(DivPrune(), features, attended, keep)
    assert answer.index.tolist() == [divprune_units(x, keep) for x in features]


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
def test_divprune_never_takes_a_token_twice(kind):
    features, _ = tiles(0, kind=kind)
    for keep in range(1, UNITS + 1):
        taken = max_min_diverse(cosine_distance(features), keep)
        assert all(len(set(row)) == keep for row in taken.tolist())
    if kind == "duplicates":
        first = max_min_diverse(cosine_distance(features), 5)
        assert all({i % 5 for i in row} == set(range(5)) for row in first.tolist()), (
            "one of each before any twice"
        )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keep=st.integers(1, UNITS),
    share=st.sampled_from([0, 10 / 64, 0.5, 1]),
    combine=st.sampled_from(["add", "mean"]),
)
def test_visionzip_merges_what_it_does_not_keep(seed, keep, share, combine):
    features, attended = tiles(seed)
    answer = ask(VisionZip(contextual_share=share, combine=combine), features, attended, keep)
    for b in range(len(features)):
        keys = attended.key[b].mean(0)[1:]
        index, rows = visionzip_rows(cls_attention(attended, b), keys, features[b], keep, share, combine)
        assert answer.index[b].tolist() == index
        ours = features[b, index] if answer.rows is None else answer.rows[b]
        torch.testing.assert_close(ours, rows)


@pytest.mark.parametrize(("tokens", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_visionzip_splits_as_published(tokens, contextual):
    # with a CLS token among the kept ones, as in the released code, and without
    assert [VisionZip()._contextual(n) for n in (tokens, tokens - 1)] == [contextual, contextual]


@settings(max_examples=80, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), data=st.data())
def test_pooling_cells_divide_the_grid(height, width, data):
    keep = data.draw(st.integers(1, height * width))
    cell, middle = pooling_cells((height, width), keep)
    assert sorted(set(cell)) == list(range(keep)), "no cell is empty"
    assert [cell[i] for i in middle] == list(range(keep)), "each stands for itself"
    assert middle == sorted(middle)
    heights, widths, bands = set(), {}, []
    for number in range(keep):
        rows, columns = zip(*(divmod(i, width) for i, c in enumerate(cell) if c == number), strict=True)
        box = [(r, c) for r in range(min(rows), max(rows) + 1) for c in range(min(columns), max(columns) + 1)]
        assert len(box) == len(rows), "cells are rectangles"
        band = (min(rows), max(rows))
        heights.add(band[1] - band[0])
        widths.setdefault(band, []).append(max(columns) - min(columns))
    bands = [len(w) for w in widths.values()]
    assert max(heights) - min(heights) <= 1
    assert max(bands) - min(bands) <= 1
    assert all(max(w) - min(w) <= 1 for w in widths.values())


def test_pooling_an_even_grid_is_average_pooling():
    features, attended = tiles(0)
    answer = ask(Pool(), features, attended, 6)
    image = features.mT.unflatten(2, GRID)
    torch.testing.assert_close(answer.rows, torch.nn.functional.avg_pool2d(image, 2).flatten(2).mT)
    assert answer.index.tolist() == [[7, 9, 11, 19, 21, 23]] * 3
    half = pool(features.half(), torch.tensor(pooling_cells(GRID, 6)[0]), 6)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), answer.rows, atol=2e-3, rtol=2e-3)


@settings(max_examples=80, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), data=st.data())
def test_a_smaller_grid_never_exceeds_the_budget(height, width, data):
    keep = data.draw(st.integers(1, height * width))
    rows, columns = smaller_grid((height, width), keep)
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert rows * columns <= keep
    places = grid_places((height, width), (rows, columns))
    assert places == sorted(set(places))
    assert len(places) == rows * columns
    assert max(places) < height * width


def test_smaller_grids_of_llava():
    grids = {keep: smaller_grid((24, 24), keep) for keep in (576, 192, 144, 128, 64, 2, 1)}
    assert grids == {
        576: (24, 24),
        192: (13, 14),
        144: (12, 12),
        128: (11, 11),
        64: (8, 8),
        2: (1, 2),
        1: (1, 1),
    }
    assert Downsample().tower_grid((24, 24), 64) == (8, 8)


def test_shrinking_filters_before_it_samples():
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    assert shrink(stripes, 8, 8)[..., 2:-2].abs().max() < 0.05, "stripes finer than the new pixels turn grey"
    flat = shrink(torch.full((2, 3, 32, 32), 0.7, dtype=torch.bfloat16), 8, 12)
    assert flat.shape == (2, 3, 8, 12)
    assert flat.dtype == torch.bfloat16
    torch.testing.assert_close(flat, torch.full_like(flat, 0.7))


# --- what all of them promise ---

ALL = {
    "agilepruner": AgilePruner(erank_avg=8.0),
    "agilepruner-own-rank": AgilePruner(),
    "agilepruner-static": AgilePruner(tau=0.4),
    "agilepruner-official": AgilePruner(compat="official"),
    "divprune": DivPrune(),
    "scope": SCOPE(),
    "scope-add": SCOPE(alpha=0.5, combine="add"),
    "visionzip": VisionZip(),
    "visionzip-mean": VisionZip(contextual_share=0.5, combine="mean"),
    "pool": Pool(),
}
everyone = pytest.mark.parametrize("policy", ALL.values(), ids=ALL)


@everyone
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_budget_in_raster_order(policy, kind):
    features, attended = tiles(1, kind=kind)
    before = features.clone()
    for keep in range(1, UNITS + 1):
        answer = ask(policy, features, attended, keep)
        assert answer.valid is None
        assert answer.index.shape == (3, keep)
        assert all(
            row == sorted(set(row)) and 0 <= row[0] <= row[-1] < UNITS for row in answer.index.tolist()
        )
        assert answer.rows is None or answer.rows.shape == (3, keep, CHANNELS)
    assert torch.equal(features, before)


@everyone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_is_its_tiles(policy, dtype):
    features, attended = tiles(2, batch=5)
    features = features.to(dtype)
    attended.query, attended.key = attended.query.to(dtype), attended.key.to(dtype)
    together = ask(policy, features, attended, 9)
    for b in range(5):
        one = AttentionView(
            attended.query[b : b + 1], attended.key[b : b + 1], attended.key[b : b + 1], 0.5, True
        )
        alone = ask(policy, features[b : b + 1], one, 9)
        assert torch.equal(alone.index[0], together.index[b])
        if together.rows is not None:
            assert together.rows.dtype == dtype
            torch.testing.assert_close(alone.rows[0], together.rows[b])


@everyone
def test_nothing_waits_for_the_device(policy):
    with FakeTensorMode(allow_non_fake_inputs=True):
        features, key = torch.empty(2, UNITS, CHANNELS), torch.empty(2, 2, UNITS + 1, 4)
        answer = ask(policy, features, AttentionView(key, key, key, 0.5, has_cls=True), 9)
        assert answer.index.shape == (2, 9)


@pytest.mark.parametrize("policy", [AgilePruner(), VisionZip()], ids=["agilepruner", "visionzip"])
def test_units_of_several_patches(policy):
    features, _ = tiles(3)
    query, key = torch.randn(2, 3, 2, 4 * UNITS + 1, 4).unbind()
    slots = torch.stack([torch.randperm(4 * UNITS).view(UNITS, 4) for _ in range(3)])
    view = TowerView(
        layer=3,
        feature_layer=3,
        target=9,
        grid=GRID,
        units=torch.arange(UNITS).expand(3, -1),
        hidden=features,
        attention=AttentionView(query, key, key, 0.5, has_cls=True),
        slots=slots,
    )
    policy.encode(view)
    scores = torch.tensor([cls_attention(view.attention, b) for b in range(3)])
    scores = torch.stack([scores[b, slots[b]].sum(-1) for b in range(3)])
    torch.testing.assert_close(view.carry["cls_attention"], scores)
    if isinstance(policy, VisionZip):
        keys = torch.stack([key[b].mean(0)[1:][slots[b]].mean(1) for b in range(3)])
        assert torch.equal(view.carry["visionzip_into"], assign(scores, keys, 8, 1))


def test_effective_rank_counts_directions():
    axes = torch.cat([torch.eye(6), -torch.eye(6)])[None]
    torch.testing.assert_close(effective_rank(axes), torch.tensor([6.0], dtype=torch.float64))
    shifted = axes + 100.0
    torch.testing.assert_close(effective_rank(shifted), effective_rank(axes), rtol=1e-3, atol=0)
    torch.testing.assert_close(effective_rank(torch.ones(2, 9, 4)), torch.ones(2, dtype=torch.float64))
    wide, tall = torch.randn(2, 5, 40), torch.randn(2, 40, 5)
    for x in (wide, tall):
        torch.testing.assert_close(
            effective_rank(x), effective_rank(x, exact=False).double(), rtol=0.02, atol=0
        )


def test_calibration_is_the_mean_rank():
    images = [torch.randn(30, 8), torch.randn(2, 30, 8), torch.randn(1, 12, 8)]
    ranks = torch.cat([effective_rank(x.view(-1, *x.shape[-2:])) for x in images])
    assert calibrate_erank(iter(images)) == pytest.approx(ranks.mean().item())
    with pytest.raises(ValueError, match="no features"):
        calibrate_erank([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AgilePruner(erank_avg=0), r"erank_avg=0: choose a number from 1"),
        (lambda: AgilePruner(tau=-0.1), r"tau=-0\.1: choose a number from 0 to 2, or None"),
        (lambda: AgilePruner(tau_max=None), r"tau_max=None: choose a number from 0 to 2"),
        (lambda: AgilePruner(tau_step="0.01"), r"tau_step='0\.01'"),
        (lambda: AgilePruner(compat="paper"), r"compat='paper': choose None or 'official'"),
        (lambda: AgilePruner(positions="kept"), r"positions='kept'"),
        (lambda: VisionZip(contextual_share=1.5), r"contextual_share=1\.5: choose a number from 0 to 1"),
        (lambda: VisionZip(combine="sum"), r"combine='sum': choose 'add' or 'mean'"),
    ],
)  # fmt: skip
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
