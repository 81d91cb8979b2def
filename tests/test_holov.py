"""HoloV's quotas on numbers one can check by hand."""

import pytest
import torch

from vlm_prune.policies.holov import HoloV, choose, choose_as_released, quotas, run_table, within_size


def test_first_runs_are_longer():
    assert run_table(10, 4).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, -1], [8, 9, -1]]
    assert run_table(3, 16).tolist() == [[0], [1], [2]]


def test_quotas_go_by_score_and_the_rest_to_the_largest():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert quotas(scores, 10).tolist() == [[1, 4, 3, 2]]
    assert quotas(scores, 6).tolist() == [[0, 3, 2, 1]]  # 0.6, 2.4, 1.8, 1.2: two left over


def test_surplus_fills_the_highest_scores_first():
    due, scores = torch.tensor([[0, 5, 3, 1]]), torch.tensor([[1.0, 9.0, 3.0, 2.0]])
    assert within_size(due, scores, torch.tensor([3, 3, 3, 3]), 9).tolist() == [[0, 3, 3, 3]]


@pytest.mark.parametrize("attention", [0.0, float("nan")])
def test_runs_share_evenly_where_nothing_is_attended(attention):
    kept = choose(torch.full((2, 12), attention), 4, 8)
    assert kept.tolist() == [[0, 1, 3, 4, 6, 7, 9, 10]] * 2


def test_no_row_is_empty_in_the_default_mode():
    attention = torch.full((1, 12), 1e-3)
    attention[0, :3] = 0.3
    features = torch.randn(1, 12, 4)
    kept, rows, _ = choose_as_released(features, attention, 4, 8)
    assert (kept < 0).sum() == (rows == 0).all(-1).sum() == 5
    assert choose(attention, 4, 8).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_similar_tokens_change_no_choice():
    attention = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    some = [choose_as_released(torch.randn(3, 40, 8), attention, 5, 17)[0].tolist() for _ in range(3)]
    some.append(choose_as_released(torch.ones(3, 40, 8), attention, 5, 17)[0].tolist())
    assert some[0] == some[1] == some[2] == some[3]


@pytest.mark.parametrize("runs", [0, 2.0])
def test_runs_are_a_positive_number(runs):
    with pytest.raises(ValueError, match="runs="):
        HoloV(runs=runs)
