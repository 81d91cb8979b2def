"""MustDrop: merging, key set, filter and budget, each against a slow form of itself, then in models."""

import pytest
import torch

from tests.models import FAMILIES, LAYOUTS, make, prompt
from tests.test_fastv import random_view, whole_map
from vlm_prune import pruned
from vlm_prune.contract.views import FeaturesView, PrefillView, TowerView
from vlm_prune.policies.dual_attention import dual_attention_filter, key_set, scaled_layers, step_count
from vlm_prune.policies.mustdrop import KEY, SIZE, MustDrop
from vlm_prune.policies.window_merge import (
    choose_windows,
    merge_alike,
    merge_flags,
    window_cells,
    window_similarity,
)


def blocky(batch: int, grid: tuple[int, int], window: tuple[int, int], noise: list[float]) -> torch.Tensor:
    """Features that are alike within windows; ``noise[b]`` says how little in image ``b``."""
    rows, columns = grid
    coarse = torch.randn(batch, -(-rows // window[0]), -(-columns // window[1]), 12)
    fine = coarse.repeat_interleave(window[0], 1).repeat_interleave(window[1], 2)[:, :rows, :columns]
    spread = torch.tensor(noise)[:, None, None, None] * torch.rand(batch, rows, columns, 1) ** 2
    return (fine + spread * torch.randn(batch, rows, columns, 12)).flatten(1, 2)


def merged_by_hand(hidden, grid, window, threshold):
    """One image: the cells that are left, ascending, and their vectors."""
    rows, columns = grid
    left = {i: hidden[i] for i in range(rows * columns)}
    for top in range(0, rows - window[0] + 1, window[0]):
        for edge in range(0, columns - window[1] + 1, window[1]):
            cells = [(top + i) * columns + edge + j for i in range(window[0]) for j in range(window[1])]
            pairs = [
                torch.nn.functional.cosine_similarity(hidden[a], hidden[b], dim=0)
                for a in cells
                for b in cells
                if a != b
            ]
            if torch.stack(pairs).mean() >= threshold:
                for cell in cells[:-1]:
                    del left[cell]
                left[cells[-1]] = hidden[cells].mean(0)
    return list(left), torch.stack(list(left.values()))


@pytest.mark.parametrize(
    ("grid", "window"), [((6, 6), (3, 3)), ((7, 5), (3, 3)), ((4, 6), (2, 2)), ((2, 2), (3, 3))]
)
def test_merging_by_hand_image_by_image(grid, window):
    hidden = blocky(4, grid, window, [0.1, 1.0, 2.0, 30.0])
    merged, keep = merge_alike(hidden, window_cells(grid, window, hidden.device), 0.8)
    if min(grid) < min(window):
        assert keep is None
        return
    counts = merged.sum(-1).tolist()
    assert len(set(counts)) > 1, "the images must differ for this to be a test"
    for b in range(4):
        cells, rows = merged_by_hand(hidden[b], grid, window, 0.8)
        valid = keep.valid[b]
        assert keep.index[b, valid].tolist() == cells
        torch.testing.assert_close(keep.rows[b, valid], rows)


def test_only_the_most_alike_windows_merge_where_the_number_is_limited():
    similarity = torch.tensor([[0.9, 0.7, 0.95, torch.nan, 0.8], [0.1, 0.2, 0.3, 0.4, 0.5]])
    assert choose_windows(similarity, 0.8).tolist() == [[1, 0, 1, 0, 1], [0] * 5]
    assert choose_windows(similarity, 0.8, 1).tolist() == [[0, 0, 1, 0, 0], [0] * 5]
    assert choose_windows(similarity, 0.1, torch.tensor([0, 2])).tolist() == [[0] * 5, [0, 0, 0, 1, 1]]


def test_zeros_and_nan_never_merge():
    cells = window_cells((2, 4), (2, 2), torch.device("cpu"))
    hidden = torch.zeros(1, 8, 3)
    hidden[0, 3] = torch.nan
    assert not (window_similarity(hidden, cells) >= 0.8).any()


def test_a_flag_in_a_merged_window_moves_to_its_last_cell():
    cells = window_cells((2, 4), (2, 2), torch.device("cpu"))
    flags = torch.tensor([[1.0, 0, 1, 0, 0, 0, 0, 0]])
    assert merge_flags(flags, cells, torch.tensor([[True, False]])).tolist() == [[1, 0, 1, 0, 0, 1, 0, 0]]


def test_key_set_counts_real_tokens():
    attention = torch.tensor([[0.1, 0.5, 0.3, 0.4, 0.9], [0.1, 0.5, 0.3, 0.4, 0.2]])
    alive = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert key_set(attention, 0.25, alive).tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 1, 0]]
    assert not key_set(attention, 0.0).any()


def test_filter_by_hand():
    total = torch.tensor([[5.0, 1.0, 1.0, 2.0, 90.0]])
    peak = torch.tensor([[0.1, 0.6, 0.1, 0.5, 0.9]])
    visual = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    # the share of a token is taken of the visual rows' 9, not of the text row's 90
    assert dual_attention_filter(total, peak, visual, 3 / 9, 0.5).tolist() == [[1, 1, 0, 1, 0]]
    assert dual_attention_filter(total, peak, visual, 1.0, 0.0).tolist() == visual.int().tolist()
    assert dual_attention_filter(0 * total, peak, visual, 0.5, 9.0).all() == visual.all()


def test_layers_scale():
    assert scaled_layers(32) == [2, 6, 10, 14]
    assert scaled_layers(28) == [2, 5, 9, 12]
    assert scaled_layers(40) == [3, 8, 13, 18]
    assert scaled_layers(1) == [0]
    for depth in range(1, 100):
        assert max(scaled_layers(depth)) < depth


def test_steps_end_at_the_target():
    initial, target = torch.tensor([576, 60, 10, 0]), torch.tensor([64, 60, 20, 1])
    counts = torch.stack([step_count(initial, target, step, 4) for step in range(5)])
    assert counts[0].tolist() == [576, 60, 10, 0]
    assert counts[-1].tolist() == [64, 60, 10, 0]
    assert (counts.diff(dim=0) <= 0).all()
    assert counts[2, 0] == round(576 * (64 / 576) ** 0.5)


def prefill_view(text: int = 4, layer: int = 1, target: int = 5, keys: tuple[int, ...] = ()) -> PrefillView:
    """Two sequences of 2 + 7 visual + ``text`` rows, the second padded on the left by one row more."""
    rows = 9 + text
    valid = torch.ones(2, rows, dtype=torch.bool)
    valid[1, 0] = False
    visual = torch.zeros_like(valid)
    visual[:, 2:9] = True
    carry = {}
    if keys:
        carry[KEY] = torch.zeros(2, rows)
        carry[KEY][:, list(keys)] = 1.0
    return PrefillView(
        layer=layer,
        depth=8,
        hidden=torch.zeros(2, rows, 4),
        visual=visual,
        valid=valid,
        initial=visual.sum(-1),
        target=torch.full((2,), target),
        attention=random_view(batch=2, rows=rows, valid=valid),
        carry=carry,
    )


def test_budget_keeps_keys_then_what_the_text_looks_at():
    view = prefill_view(layer=4, target=3, keys=(2, 8))
    keep = MustDrop().prefill(view)
    full = whole_map(view.attention)
    for b in range(2):
        total = full[b, 9:].sum(0)
        best = max((i for i in range(3, 8)), key=lambda i: total[i])
        assert keep[b].nonzero()[:, 0].tolist() == sorted([0, 1, 2, best, 8, 9, 10, 11, 12])
    more_keys = MustDrop().prefill(prefill_view(layer=4, target=1, keys=(2, 4, 8)))
    assert (more_keys & view.visual)[0].nonzero()[:, 0].tolist() == [2, 4, 8]


def test_thresholds_leave_keys_and_the_floor():
    drop_all = MustDrop(thresholds=(1.0, 9.0), floor=2)
    view = prefill_view()
    kept = drop_all.prefill(view) & view.visual
    assert kept.sum(-1).tolist() == [2, 2]
    keyed = MustDrop(thresholds=(1.0, 9.0), floor=0).prefill(prefill_view(keys=(3,))) & view.visual
    assert keyed.nonzero().tolist() == [[0, 3], [1, 3]]
    assert MustDrop(thresholds=(0.0, 0.0)).prefill(view).all()
    assert drop_all.prefill(prefill_view(target=7)).all(), "a budget of everything keeps everything"


def test_without_text_the_last_row_votes():
    view = prefill_view(text=0, layer=4, target=3)
    keep = MustDrop().prefill(view) & view.visual
    paid = whole_map(view.attention)[:, 8, 2:9]
    for b in range(2):
        assert (keep[b].nonzero()[:, 0] - 2).tolist() == paid[b].topk(3).indices.sort().values.tolist()


def test_a_batch_is_filtered_row_by_row():
    view = prefill_view(layer=2, keys=(5,))
    for policy in (MustDrop(), MustDrop(thresholds=(0.2, 0.3))):
        together = policy.prefill(view)
        for b in range(2):
            one = slice(b, b + 1)
            seen = view.attention
            attention = type(seen)(
                seen.query[one], seen.key[one], seen.value[one], seen.scaling, False, seen.valid[one]
            )
            rows = {n: getattr(view, n)[one] for n in ("hidden", "visual", "valid", "initial", "target")}
            carry = {n: x[one] for n, x in view.carry.items()}
            alone = PrefillView(layer=2, depth=8, attention=attention, carry=carry, **rows)
            assert torch.equal(policy.prefill(alone)[0], together[b])


def tower_view(hidden: torch.Tensor, grid: tuple[int, int], target: int, layer: int = 0) -> TowerView:
    batch, tokens, _ = hidden.shape
    query, key, value = torch.randn(3, batch, 2, tokens + 1, 4)
    seen = type(random_view())(query, key, value, 0.5, has_cls=True)
    units = torch.arange(tokens).expand(batch, -1)
    return TowerView(layer, 3, target, grid, units, hidden, seen)


def test_merging_stops_at_the_budget_but_thresholds_have_none():
    hidden = blocky(1, (6, 6), (3, 3), [0.0])
    kept = {}
    for target in (4, 19, 20, 28, 29):
        view = tower_view(hidden, (6, 6), target)
        keep = MustDrop().encode(view)
        kept[target] = 36 if keep is None else keep.index.shape[1]
        assert (
            view.carry[SIZE].sum() == 36
            if keep is None
            else view.carry[SIZE].gather(1, keep.index).sum() == 36
        )
    assert kept == {4: 4, 19: 20, 20: 20, 28: 28, 29: 36}
    assert MustDrop(thresholds="textvqa-64").encode(tower_view(hidden, (6, 6), 29)).index.shape[1] == 4
    assert MustDrop(merge_threshold=1.1).encode(tower_view(hidden, (6, 6), 4)) is None


def test_cut_towers_are_not_merged():
    hidden = blocky(1, (6, 6), (3, 3), [0.0])
    view = tower_view(hidden[:, :30], (6, 6), 4)
    assert MustDrop().encode(view) is None


def test_official_refuses_what_the_released_code_cannot_do():
    hidden = blocky(1, (4, 4), (2, 2), [0.0])
    with pytest.raises(ValueError, match=r"do not divide the grid of \(4, 4\)"):
        MustDrop(compat="official").encode(tower_view(hidden, (4, 4), 4))
    assert MustDrop(compat="official", window=(2, 2)).encode(
        tower_view(hidden, (4, 4), 4)
    ).index.tolist() == [[0, 1, 2, 3]]


def test_units_merge_behind_the_tower_and_take_their_keys_along():
    features = blocky(2, (4, 4), (2, 2), [0.0, 30.0])
    carry = {KEY: torch.zeros(2, 16)}
    carry[KEY][:, 0] = 1.0
    view = FeaturesView(features, (4, 4), 4, torch.zeros(2), torch.zeros(2, 3, 8, 8), carry)
    keep = MustDrop(key_ratio=0.1).encode_final(view)
    assert keep.valid.sum(-1).tolist() == [4, 16]
    assert view.carry[KEY][0, 5] == 1.0
    assert view.carry[SIZE].gather(1, keep.index).masked_fill(~keep.valid, 0).sum(-1).tolist() == [16, 16]
    assert (
        MustDrop().encode_final(FeaturesView(features, (4, 4), 4, *[torch.zeros(2)] * 2, {SIZE: features}))
        is None
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compat": "paper"}, 'choose "official" or None'),
        ({"thresholds": "gqa-64"}, "published are textvqa-192"),
        ({"thresholds": (0.1,)}, "two numbers of at least 0"),
        ({"thresholds": (0.1, -1)}, "two numbers of at least 0"),
        ({"window": (1, 1)}, "at least two tokens"),
        ({"unit_window": 2}, "at least two tokens"),
        ({"key_ratio": 1.5}, "a share from 0 to 1"),
        ({"floor": -1}, "at least 0"),
        ({"layers": (6, 2)}, "ascending order"),
        ({"layers": ()}, "ascending order"),
        ({"positions": "rope"}, 'choose "original" or "compact"'),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MustDrop(**settings)


def test_lists_from_configuration_files():
    policy = MustDrop(thresholds=[0.1, 0.2], window=[2, 2], layers=[1, 3])
    assert policy.limits == (0.1, 0.2)
    assert policy.prefill_layers(8) == [1, 3]
    assert list(policy.evicted_layers(8)) == [1, 2, 3, 4, 5, 6, 7]
    assert list(MustDrop(trim_cache=False).evicted_layers(8)) == []
    with pytest.raises(ValueError, match="has the layers 0 to 2"):
        policy.prefill_layers(3)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"thresholds": (0.05, 0.2)}], ids=["budget", "thresholds"])
def test_in_a_model_a_batch_equals_its_rows(family, settings):
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    policy = MustDrop(merge_threshold=0.1, layers=(0, 1), **settings)
    with pruned(model, policy, ratio=0.3):
        together = model(**batch.inputs).logits
        merged = model.pruning.receipt.kept
        if settings:
            assert len({len(tile) for tile in merged}) > 1, (
                "tiles must merge differently for this to be a test"
            )
        tokens = model.generate(**batch.inputs, max_new_tokens=3)[:, batch.ids.shape[1] :]
        for b, row in enumerate(batch.rows()):
            logits = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], logits, atol=2e-4, rtol=1e-4)
            new = model.generate(**row.inputs, max_new_tokens=3)[0, row.ids.shape[1] :]
            assert new.tolist() == tokens[b].tolist()
