"""The pure functions: holes, orders, budgets, scores, and the tokens that baselines choose."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_prune import Keep
from vlm_prune.call import stream
from vlm_prune.call.budget import Budget
from vlm_prune.call.rows import Rows
from vlm_prune.encode.fixed import content_key
from vlm_prune.policies.baselines import random_ranking, uniform_index
from vlm_prune.policies.flowcut import drop_counts, information_score, relative_entropy

few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def masks(draw, min_true=1):
    """A bool ``(batch, length)`` with at least ``min_true`` True entries in some row."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    rows = draw(
        st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    rows[0][-1] = rows[0][-1] or min_true > 0
    return torch.tensor(rows)


@few
@given(masks())
def test_compact_and_restore_are_inverse(live):
    length = live.shape[1]
    x = torch.arange(live.numel() * 3, dtype=torch.float32).view(*live.shape, 3) + 1
    count = int(live.sum(-1).max())
    order = stream.live_order(live, count)
    valid = live.gather(1, order)
    short = stream.compact(x, order)
    for b in range(len(live)):
        alive = int(live[b].sum())
        assert order[b].unique().numel() == count
        assert torch.equal(short[b, count - alive :], x[b, live[b]])
        assert not valid[b, : count - alive].any()
    restored = stream.restore(short, order, length, valid)
    assert torch.equal(restored, x * live[..., None])


@few
@given(masks(), st.data())
def test_retarget_gives_each_row_the_label_of_the_next_one_left(live, data):
    labels = torch.arange(1, live.shape[1] + 1).expand(live.shape).clone()
    labels[:, data.draw(st.integers(0, live.shape[1] - 1))] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    order = stream.live_order(live, int(live.sum(-1).max()))
    moved = stream.retarget(targets, order, live.gather(1, order))
    for b in range(len(live)):
        places = live[b].nonzero()[:, 0].tolist()
        want = torch.full((live.shape[1],), -100)
        for here, following in pairwise(places):
            want[here] = labels[b, following]
        assert torch.equal(moved[b], want)


@few
@given(masks())
def test_holes_are_where_nothing_was_put(live):
    count = int(live.sum(-1).max())
    index = (~live).to(torch.int8).argsort(dim=-1, stable=True)[:, :count]
    valid = live.gather(1, index)
    rows = torch.randn(len(live), count, 2)
    full = stream.open_holes(rows, index, live.shape[1], valid)
    assert torch.equal(stream.find_holes(full), ~live)
    for b in range(len(live)):
        assert torch.equal(full[b, live[b]], rows[b, valid[b]])


@few
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_patches_of_units(rows, columns, merge):
    table = stream.unit_patches((rows * merge, columns * merge), merge, torch.device("cpu"))
    assert table.flatten().sort().values.tolist() == list(range(rows * columns * merge**2))
    for unit, patches in enumerate(table.tolist()):
        r, c = divmod(unit, columns)
        want = [(r * merge + i) * columns * merge + c * merge + j for i in range(merge) for j in range(merge)]
        assert patches == want


@few
@given(masks(min_true=0), st.integers(0, 3))
def test_tail_of_a_turn(live, cut):
    batch, length = live.shape
    count = max(1, int(live.sum(-1).max()))
    order = stream.live_order(live, count)
    rows = Rows(length, order, torch.arange(count)[None], live.gather(1, order))
    tail = min(int(live[b].flip(0).long().cumprod(0).sum()) for b in range(batch))
    assert rows.tail() == tail
    if cut <= tail:
        assert rows.without_tail(cut).tail() == tail - cut


@few
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_uniform_grid(height, width, data):
    keep = data.draw(st.integers(1, height * width))
    index = uniform_index((height, width), keep)
    assert len(index) == keep
    assert index == sorted(set(index))
    assert 0 <= index[0] <= index[-1] < height * width
    # mirrored about the middle of the grid, the centre of mass stays within a cell and a half of it
    rows, columns = zip(*(divmod(i, width) for i in index), strict=True)
    assert abs(sum(rows) / keep - (height - 1) / 2) <= max(1.5, height / 8)
    assert abs(sum(columns) / keep - (width - 1) / 2) <= max(1.5, width / 8)


@pytest.mark.parametrize(
    ("grid", "keep", "want"), [((4, 4), 4, [5, 7, 13, 15]), ((3, 3), 1, [4]), ((9, 1), 1, [4])]
)
def test_uniform_grid_by_hand(grid, keep, want):
    assert uniform_index(grid, keep) == want


def test_random_draws_depend_on_content_alone():
    tiles = torch.randn(5, 3, 8, 8)
    ranking = random_ranking(content_key(tiles), 20, seed=0)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(random_ranking(content_key(tiles[order]), 20, seed=0), ranking[order])
    assert torch.equal(random_ranking(content_key(tiles[2:3]), 20, seed=0), ranking[2:3])
    assert not torch.equal(random_ranking(content_key(tiles), 20, seed=1), ranking)
    assert len({tuple(row.tolist()) for row in ranking}) == 5
    # permuted memory layout, same pixels
    strided = tiles.to(memory_format=torch.channels_last)
    assert torch.equal(content_key(strided), content_key(tiles))


def test_random_draws_are_even():
    keys = torch.arange(4000) * 7919
    kept = random_ranking(keys, 12, seed=3).topk(3, dim=-1).indices
    share = torch.bincount(kept.flatten(), minlength=12) / 4000
    assert (share - 0.25).abs().max() < 0.03


def test_keep_top_by_hand():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[1.0, 5, 3, 4], [nan, 2, -inf, nan], [inf, -inf, 7, 8]])
    same = Keep.top(scores, 2)
    assert same.index[0].tolist() == [1, 3]
    assert 1 in same.index[1].tolist()
    assert same.index[2].tolist() == [0, 3]
    assert same.valid is None
    ragged = Keep.top(scores, [1, 3, 2])
    kept = [row[ok].tolist() for row, ok in zip(ragged.index, ragged.valid, strict=True)]
    assert kept == [[1], [0, 1, 3], [0, 3]]  # NaN ranks last, but before units that are ruled out by -inf
    assert all(row.unique().numel() == 3 for row in ragged.index)


@few
@given(masks(), st.data())
def test_keep_from_mask(mask, data):
    keep = Keep.from_mask(mask, int(mask.sum(-1).max()))
    for b in range(len(mask)):
        assert keep.index[b, keep.valid[b]].tolist() == mask[b].nonzero()[:, 0].tolist()
        assert keep.index[b].unique().numel() == keep.index.shape[1]


@few
@given(st.integers(1, 600), st.floats(0.001, 1.0))
def test_budget_by_ratio(available, ratio):
    units = Budget.checked(None, ratio, 0.5, available, "image").units(available)
    assert 1 <= units <= available
    assert abs(units - ratio * available) <= 0.5 or units == 1


def test_budget_by_tokens():
    assert Budget.checked(64, None, 0.5, 576, "image").units(576) == 64
    assert Budget.checked(64, None, 0.5, 576, "image").units(30) == 30
    assert Budget.checked(64, None, 0.5, 576, "image", extra=1).units(576) == 63
    assert Budget.checked(None, None, 0.25, 576, "image").units(576) == 144
    assert Budget.checked(None, 1, 0.25, 576, "image").units(576) == 576


def test_entropy_limits():
    concentrated = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    flat = torch.full((1, 4), 0.1)
    assert relative_entropy(concentrated, 4).item() == 0
    torch.testing.assert_close(relative_entropy(flat, 4), torch.ones(1))
    # a flat row asks for nothing, a concentrated one for all that the schedule allows: (4 - 2) / sqrt(4)
    assert drop_counts(flat, [4], 2, 4, batch_max=False) == [0]
    assert drop_counts(concentrated, [4], 2, 4, batch_max=False) == [1]


def test_a_row_does_not_depend_on_its_batch_mates_unless_asked_to():
    attention = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0, 0], [0.9, 0.05, 0.02, 0.01, 0.01, 0.01]])
    alone = [drop_counts(attention[:1, :4], [4], 1, 1, False), drop_counts(attention[1:], [6], 1, 1, False)]
    together = drop_counts(attention, [4, 6], 1, 1, batch_max=False)
    assert together == [alone[0][0], alone[1][0]]
    assert len(set(drop_counts(attention, [4, 6], 1, 1, batch_max=True))) == 1


@pytest.mark.parametrize("zero", ["attention", "semantic", "both"])
def test_scores_when_cls_attends_to_itself_alone(zero):
    attention = torch.zeros(1, 3) if zero != "semantic" else torch.tensor([[0.1, 0.2, 0.3]])
    semantic = torch.zeros(1, 3) if zero != "attention" else torch.tensor([[0.3, 0.2, 0.1]])
    score = information_score(attention, semantic, torch.ones(1, 3))
    assert score.isfinite().all()
    assert drop_counts(attention, [3], 1, 4, batch_max=False)[0] >= 0
