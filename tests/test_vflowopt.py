"""VFlowOpt against loops that anyone can check, and inside stock models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import FAMILIES, LAYOUTS, prompt, shared
from vlm_prune import pruned
from vlm_prune.contract.views import AttentionView, FeaturesView, PrefillView, TowerView
from vlm_prune.policies.importance import (
    calibrated_attention,
    entropy_share,
    patch_entropy,
    true_grey,
    wrapped_grey,
)
from vlm_prune.policies.recycle import (
    Cells,
    cell_grid,
    count_to_merge,
    fitting_side,
    recycle,
    recycle_official,
    recycle_to,
)
from vlm_prune.policies.shares import PUBLISHED, average_share, solve_first, solve_last, solved_counts
from vlm_prune.policies.vflowopt import AVERAGE, MAP, VFlowOpt

CUTS = (9 / 28, 18 / 28)
HALF = (0.5, 0.5, 0.5)


def attended(
    tokens: int, batch: int = 2, cls: bool = True, seed: int = 0, peak: float = 2.0
) -> AttentionView:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = peak * torch.randn(3, batch, 2, tokens + cls, 4, generator=generator)
    return AttentionView(query, key, value, 0.5, has_cls=cls)


def naive_map(view: AttentionView, t: float) -> torch.Tensor:
    """One tile at a time, from the whole attention map."""
    maps = []
    for b in range(len(view.query)):
        attention = (view.query[b] @ view.key[b].mT * view.scaling).softmax(-1).mean(0)
        attention = attention[int(view.has_cls) :, int(view.has_cls) :]
        drawn = attention.mean(0)
        chosen = [i for i in range(len(drawn)) if drawn[i] > t * drawn.mean()] or [int(drawn.argmax())]
        maps.append(attention[chosen].mean(0))
    return torch.stack(maps)


# --- importance ---


@pytest.mark.parametrize("t", [0.0, 1.0, 1.5, 50.0])
@pytest.mark.parametrize("cls", [True, False])
def test_map_is_that_of_the_whole_attention_map(t, cls):
    view = attended(37, cls=cls)
    torch.testing.assert_close(calibrated_attention(view, t), naive_map(view, t))


def test_threshold_that_no_token_passes():
    view = attended(12)
    assert calibrated_attention(view, 1e9, fallback=False).isnan().all()
    torch.testing.assert_close(calibrated_attention(view, 1e9), naive_map(view, 1e9))


@pytest.mark.parametrize("t", [1.2, 50.0])
def test_ragged_tiles_are_scored_as_if_alone(t):
    view, alive = attended(20, batch=3), [20, 13, 7]
    view.valid = torch.tensor([[True] + [i < n for i in range(20)] for n in alive])
    together = calibrated_attention(view, t)
    for b, n in enumerate(alive):
        parts = (x[b : b + 1, :, : n + 1] for x in (view.query, view.key, view.value))
        alone = calibrated_attention(AttentionView(*parts, 0.5, True), t)
        torch.testing.assert_close(together[b, :n], alone[0])
        assert not together[b, n:].any()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.entries = max(self.entries, out.numel())
        return out


def test_attention_map_is_never_whole():
    view = attended(400, batch=1)
    with Largest() as largest:
        calibrated_attention(view, 2.0)
    assert largest.entries < 400 * 400


# --- entropy ---


def naive_entropy(levels: list[int]) -> float:
    shares = [levels.count(v) / len(levels) for v in set(levels)]
    return -sum(p * math.log2(p) for p in shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_entropy_of_wrapped_levels(dtype):
    pixels = (torch.randint(0, 256, (2, 3, 9, 13)).float() / 127.5 - 1).to(dtype)
    entropy = patch_entropy(wrapped_grey(pixels), (2, 3))
    for b in range(2):
        for n in range(6):
            top, left = n // 3 * 4, n % 3 * 4
            levels = []
            for y in range(top, top + 4):
                for x in range(left, left + 4):
                    wrapped = [int(float(pixels[b, c, y, x] * 255)) % 256 for c in range(3)]
                    levels.append(round(0.3333 * sum(wrapped)))
            assert entropy[b, n].item() == pytest.approx(naive_entropy(levels), abs=1e-4)


def test_true_grey_gives_the_bytes_back():
    image = torch.randint(0, 256, (2, 3, 8, 8))
    mean, std = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
    shift, scale = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    grey = true_grey((image / 255 - shift) / scale, mean, std)
    assert torch.equal(grey, image.float().mean(1).round().long())


def test_entropy_share_of_merged_patches_is_their_mean():
    share = entropy_share(torch.rand(2, 24) * 7, (2, 3), merge=2)
    assert share.shape == (2, 6)
    torch.testing.assert_close(share.sum(-1), torch.full((2,), 0.25))
    patches = torch.arange(16.0)[None]
    corners = patches.softmax(-1).view(4, 4)[:2, 2:].mean()
    torch.testing.assert_close(entropy_share(patches, (2, 2), merge=2)[0, 1], corners)


# --- recycling ---


def naive_recycle(features, scores, low, numbers):
    """One tile; returns kept positions and their features."""
    rows, kept = features.clone(), [i for i in range(len(scores)) if not low[i]]
    for cell in set(numbers.tolist()):
        group = [i for i in range(len(scores)) if low[i] and numbers[i] == cell]
        if not group:
            continue
        weights = [max(float(scores[i]), 0.0) for i in group]
        total = sum(weights)
        weights = [w / total for w in weights] if total > 0 else [1 / len(group)] * len(group)
        head = max(group, key=lambda i: float(scores[i]))
        rows[head] = sum(w * features[i] for w, i in zip(weights, group, strict=True))
        kept.append(head)
    return sorted(kept), rows[sorted(kept)]


grids = st.tuples(st.integers(1, 7), st.integers(1, 7))


@settings(max_examples=60, deadline=None)
@given(grids, st.floats(1, 9), st.data(), st.integers(0, 99))
def test_exactly_the_budget_is_left_and_each_tile_stands_for_itself(grid, side, data, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    keep = data.draw(st.integers(1, tokens))
    features = torch.randn(3, tokens, 5, generator=generator)
    scores = torch.rand(3, tokens, generator=generator)
    together = recycle_to(features, scores, grid, keep, side)
    assert together.index.shape == (3, keep)
    assert together.valid is None
    cells = Cells.of([grid], fitting_side(grid, side, keep))
    order = scores.argsort(-1)
    low = order.argsort(-1) < count_to_merge(order, cells, keep)
    for b in range(3):
        kept, rows = naive_recycle(features[b], scores[b], low[b], cells.number)
        assert together.index[b].tolist() == kept
        torch.testing.assert_close(together.rows[b], rows)
        alone = recycle_to(features[b : b + 1], scores[b : b + 1], grid, keep, side)
        assert torch.equal(alone.index[0], together.index[b])
        torch.testing.assert_close(alone.rows[0], together.rows[b])


@settings(max_examples=40, deadline=None)
@given(grids, st.floats(1, 9), st.floats(0.05, 1), st.integers(0, 99))
def test_same_tokens_as_the_released_count_where_counts_agree(grid, side, share, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    features = torch.randn(1, tokens, 3, generator=generator)
    scores = torch.rand(1, tokens, generator=generator) + 0.01
    official = recycle_official(features, scores, [grid], share, side)
    ours = recycle_to(features, scores, grid, official.index.shape[1], side)
    assert torch.equal(ours.index, official.index)
    torch.testing.assert_close(ours.rows, official.rows)


def test_cells_of_several_grids_are_apart():
    cells = Cells.of([(3, 3), (2, 5)], 2.5)
    assert cells.number.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 1, 1, 1, 2, 2]
    assert cells.count == 3


@given(grids, st.floats(1, 9), st.integers(1, 49))
def test_cells_grow_until_they_fit(grid, side, most):
    fitting = fitting_side(grid, side, most)
    assert fitting >= side
    assert math.prod(cell_grid(grid, fitting)) <= most
    assert fitting == side or math.prod(cell_grid(grid, side)) > most
    assert Cells.of([grid], fitting).number.max() == math.prod(cell_grid(grid, fitting)) - 1


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0])
def test_weights_stay_weights(bad):
    features = torch.randn(1, 8, 3)
    scores = torch.full((1, 8), bad)
    cells = Cells.of([(2, 4)], 2)
    rows = recycle(features, scores, torch.arange(8)[None], 8, cells, 2).rows
    want = torch.stack([features[0, [0, 1, 4, 5]].mean(0), features[0, [2, 3, 6, 7]].mean(0)])
    torch.testing.assert_close(rows[0], want)
    assert rows.abs().max() <= features.abs().max()


def test_released_weights_may_explode():
    scores = torch.tensor([[0.5, -0.499]])
    features = torch.tensor([[[1.0], [-1.0]]])
    rows = recycle(features, scores, torch.tensor([[1, 0]]), 2, Cells.of([(1, 2)], 2), guarded=False).rows
    assert rows.abs().max() > 500


# --- shares ---


@pytest.mark.parametrize("share", PUBLISHED)
def test_published_settings_hold_their_share(share):
    s = PUBLISHED[share]
    assert average_share(s["r_v"], s["r_1"], s["r_2"], CUTS) == pytest.approx(share, abs=1e-3)
    assert VFlowOpt(**s).default_ratio == pytest.approx(share, abs=1e-3)


@given(st.floats(0.05, 0.9), st.floats(0.3, 1), st.floats(0.3, 1))
def test_solves_undo_the_average(average, r_1, r_2):
    r_v = solve_first(average, r_1, r_2, CUTS)
    if r_v < 1:
        assert average_share(r_v, r_1, r_2, CUTS) == pytest.approx(average)
        assert solve_last(average, r_v, r_1, CUTS) == pytest.approx(r_2)


@settings(deadline=None)
@given(st.integers(3, 60), st.integers(1, 600), st.floats(0.5, 1), st.floats(0.6, 1))
def test_layers_hold_the_budget_on_average(depth, entered, r_1, fraction):
    first, second = cuts = VFlowOpt().cuts(depth)
    assert 0 < first <= second < depth
    # feasible: what the layers before the last cut hold is within the budget
    average = max(round(fraction * entered), math.ceil(entered * second / depth))
    n_1, n_2 = solved_counts(torch.tensor([entered]), torch.tensor([float(average)]), r_1, cuts, depth)
    held = entered * first + n_1 * (second - first) + n_2 * (depth - second)
    assert 1 <= n_2 <= n_1 <= entered
    assert abs(held / depth - average) <= 0.5 + 1 / depth


# --- settings ---


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"t": -1}, r"t=-1: choose a number from 0"),
        ({"m": 0.5}, r"m=0.5: choose a number from 1 .*None"),
        ({"r_1": 0}, r"r_1=0: .* from 0.001 to 1"),
        ({"r_v": 1.5}, r"r_v=1.5"),
        ({"layers": (0.6, 0.3)}, r"layers=\(0.6, 0.3\): choose two rising"),
        ({"counts": "all"}, r"counts='all': choose 'average' or 'entering'"),
        ({"counts": "entering", "r_v": 0.3}, r"leave it out"),
        ({"entropy": "grey"}, r"entropy='grey'.*'true_grey'"),
        ({"alpha": 0.1}, r"image_mean and image_std.*alpha=0"),
        ({"alpha": 0.1, "image_mean": (0.5,), "image_std": HALF}, r"image_mean=\(0.5,\)"),
        ({"compat": "paper"}, r"compat='paper'"),
        ({"positions": "new"}, r"positions='new'"),
    ],
)
def test_bad_settings_are_explained(given, said):
    with pytest.raises(ValueError, match=said):
        VFlowOpt(**given)


def test_settings_survive_json():
    policy = VFlowOpt(layers=[0.3, 0.6], image_mean=[0.5] * 3, image_std=[0.5] * 3, alpha=0.1)
    assert policy == VFlowOpt(layers=(0.3, 0.6), image_mean=HALF, image_std=HALF, alpha=0.1)
    assert VFlowOpt(alpha=0.1, compat="official").entropy_of == "official_wrap"


@pytest.mark.parametrize(
    ("given", "said"),
    [({"r_v": 0.9}, "choose r_v from 0.250 to"), ({"r_v": 0.9, "r_2": 0.5}, "leave out the budget, or")],
)
def test_shares_that_contradict_the_budget(given, said):
    with pytest.raises(ValueError, match=said):
        VFlowOpt(**given).entering_share(0.25)


# --- the stages, asked as the engine asks ---


def ask(
    policy: VFlowOpt, merge: int = 1, target: int = 9, batch: int = 2
) -> tuple[object, dict, torch.Tensor]:
    grid = (6, 6)
    view = attended(36 * merge**2, batch)
    slots = None
    if merge > 1:
        number = torch.arange(36 * merge**2).view(6, merge, 6, merge).permute(0, 2, 1, 3)
        slots = number.reshape(1, 36, -1).expand(batch, -1, -1)
    features = torch.randn(batch, 36, 5)
    pixels = torch.rand(batch, 3, 6 * merge * 4, 6 * merge * 4) * 2 - 1
    carry: dict[str, torch.Tensor] = {}
    units = torch.arange(36).expand(batch, -1)
    policy.encode(TowerView(3, 3, target, grid, units, features, view, slots, None, carry, pixels))
    keep = policy.encode_final(FeaturesView(features, grid, target, torch.zeros(batch), pixels, carry))
    return keep, carry, pixels


@pytest.mark.parametrize("merge", [1, 2])
def test_stage_1_and_what_it_leaves(merge):
    policy = VFlowOpt(alpha=0.5, image_mean=HALF, image_std=HALF, m=2.5)
    keep, carry, pixels = ask(policy, merge)
    attention = naive_map(attended(36 * merge**2), policy.t)
    entropy = patch_entropy(true_grey(pixels, HALF, HALF), (6 * merge, 6 * merge)).softmax(-1)
    per_patch = (attention + 0.5 * entropy).view(2, 6, merge, 6, merge)
    torch.testing.assert_close(carry[MAP], per_patch.mean((2, 4)).flatten(1))
    entering = keep.index.shape[1]
    assert entering == round(36 * solve_first(0.25, policy.r_1, PUBLISHED[0.25]["r_2"], CUTS))
    torch.testing.assert_close(carry[AVERAGE], torch.full((2, 36), 9 / entering))


def test_without_recycling_the_top_of_the_map_stays():
    keep, carry, _ = ask(VFlowOpt(m=None, counts="entering"))
    assert torch.equal(keep.index, carry[MAP].topk(9).indices.sort().values)
    assert keep.rows is None


def test_released_map_of_nan_is_refused():
    with pytest.raises(ValueError, match="choose a smaller t, or leave compat out"):
        ask(VFlowOpt(compat="official", t=1000.0))


def test_released_counts_differ_by_tile():
    keep, _, _ = ask(VFlowOpt(compat="official", t=0.5, m=3.0), batch=8)
    counts = keep.valid.sum(-1)
    assert counts.min() >= 10 - 4
    assert counts.max() == keep.index.shape[1]


@pytest.mark.parametrize("alpha", [0.0, -0.5])
def test_encode_never_waits_for_the_device(alpha):
    with FakeTensorMode():
        ask(VFlowOpt(alpha=alpha, image_mean=HALF, image_std=HALF, m=2.5), batch=1)


def prefill(policy: VFlowOpt, layer: int, visual: torch.Tensor, scores: torch.Tensor, initial: list[int]):
    carry = {MAP: scores * visual, AVERAGE: 0.8 * visual}
    initial = torch.tensor(initial)
    return policy.prefill(PrefillView(layer, 12, scores, visual, None, initial, initial, None, carry))


def test_decoder_cuts_by_the_same_map_row_by_row():
    policy = VFlowOpt()
    assert policy.cuts(12) == (4, 8)
    assert policy.prefill_layers(12) == (3, 7)
    visual = torch.zeros(2, 30, dtype=torch.bool)
    visual[0, 2:22], visual[1, 5:15] = True, True
    scores = torch.rand(2, 30)
    mask = prefill(policy, 7, visual, scores, [20, 10])
    assert (mask | visual).all()
    for b, entered in enumerate((20, 10)):
        _, count = solved_counts(
            torch.tensor([entered]), torch.tensor([0.8 * entered]).double(), policy.r_1, (4, 8), 12
        )
        best = (scores[b] * visual[b]).topk(int(count)).indices
        assert sorted(best.tolist()) == (mask[b] & visual[b]).nonzero()[:, 0].tolist()
        assert count < entered


def test_prompt_without_a_map_keeps_all():
    visual = torch.ones(1, 4, dtype=torch.bool)
    view = PrefillView(3, 12, visual, visual, None, visual.sum(-1), visual.sum(-1), None, {})
    assert VFlowOpt().prefill(view) is None


# --- in stock models ---

families = pytest.mark.parametrize("family", FAMILIES)


def visual_tokens(model, batch) -> list[float]:
    text = batch.ids.shape[1] - int((batch.ids == 60).sum())
    return [n - text for n in model.pruning.receipt.decoder_tokens]


@families
@torch.no_grad()
def test_decoder_holds_the_budget_on_average(family):
    model, batch = shared(family), prompt(family, [(3, -1, 5)])
    cls = int(family == "llava-full")
    with pruned(model, VFlowOpt(m=2.0), ratio=0.5):
        model.generate(**batch.inputs, max_new_tokens=2)
        held = visual_tokens(model, batch)
        assert held == sorted(held, reverse=True)
        planned = model.pruning.receipt.planned + cls
        assert sum(held) / len(held) == pytest.approx(planned, abs=0.5 + 1 / len(held))
    with pruned(model, VFlowOpt(m=2.0, counts="entering"), ratio=0.5):
        model.generate(**batch.inputs, max_new_tokens=2)
        assert len(model.pruning.receipt.kept[0]) == model.pruning.receipt.planned


@families
@pytest.mark.parametrize("official", [False, True])
@torch.no_grad()
def test_a_batch_gives_what_its_rows_give_alone(family, official):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    policy = VFlowOpt(compat="official", t=0.1, m=2.0) if official else VFlowOpt(m=2.0)
    with pruned(model, policy, ratio=0.5):
        together = model(**batch.inputs).logits
        for b, row in enumerate(batch.rows()):
            alone = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], alone, atol=2e-4, rtol=1e-4)


@families
@torch.no_grad()
def test_keeping_everything_is_bit_identical(family):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    stock = model(**batch.inputs).logits
    for policy in (VFlowOpt(), VFlowOpt(compat="official")):
        with pruned(model, policy, ratio=1.0):
            assert torch.equal(model(**batch.inputs).logits, stock)


@pytest.mark.parametrize("family", ["llava", "internvl"])
@torch.no_grad()
def test_entropy_changes_what_is_kept(family):
    model, batch = shared(family), prompt(family, LAYOUTS["several-images"])
    kept = []
    for alpha in (0.0, 1000.0):
        with pruned(model, VFlowOpt(m=2.0, alpha=alpha, image_mean=HALF, image_std=HALF), ratio=0.3):
            model(**batch.inputs)
            kept.append(model.pruning.receipt.kept)
    assert kept[0] != kept[1]
