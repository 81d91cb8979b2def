"""Paired statistics on values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_prune.eval.paired import (
    holm,
    mcnemar,
    paired_bootstrap,
    ratio,
    ratio_draws,
    twins,
    verdict,
)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 0.0625),  # 2 / 2**5
        (6, 0, 0.03125),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),
    ],
)
def test_mcnemar(wins, losses, p):
    assert mcnemar(wins, losses) == pytest.approx(p, abs=1e-12)


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ValueError, match="wins=-1"):
        mcnemar(-1, 2)


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 * .01, then 2 * .03, then max(.06, 1 * .04)
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm(p, adjusted):
    assert holm(p) == pytest.approx(adjusted)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_p_and_bonferroni(p):
    for raw, found in zip(p, holm(p), strict=True):
        assert raw <= found <= min(1.0, len(p) * raw) + 1e-12


def test_ratio_of_sums_is_not_a_mean_of_ratios():
    counts = np.array([[1.0, 1.0], [0.0, 3.0]])
    assert ratio(counts) == pytest.approx(0.25)
    assert ratio(np.zeros((2, 2))) == 0


def test_all_draws_of_one_unit_are_that_unit():
    counts = np.array([[[1.0, 4.0]], [[3.0, 4.0]]])
    assert ratio_draws(counts, 5).tolist() == [[0.25] * 5, [0.75] * 5]


def test_paired_bootstrap_of_two_units():
    """Gaps of 3 and -1: the mean of two draws is 3, 1 or -1 with chances 1/4, 1/2, 1/4."""
    first, second = np.array([[3.0, 1.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 1.0]])
    found = paired_bootstrap(first, second, draws=40_000)
    assert found.value == 1.0
    assert (found.low, found.high) == (-1.0, 3.0)
    assert found.p == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("units", "p"), [(1, 1.0), (2, 0.5), (6, 0.03125), (40, 2 / 10_001)])
def test_few_units_are_no_proof(units, p):
    """All units go one way, so every draw does; chance does that too, in one of 2 ** (units - 1) times."""
    first, second = np.ones((units, 2)), np.ones((units, 2)) * [0.0, 1.0]
    assert paired_bootstrap(first, second).p == pytest.approx(p)


def test_pairing_sees_what_intervals_of_means_hide():
    """Units differ much, policies by the same little in each: the paired interval has no width."""
    rng = np.random.default_rng(3)
    hard = rng.uniform(0, 0.5, 40)
    first, second = np.stack([hard + 0.1, np.ones(40)], -1), np.stack([hard, np.ones(40)], -1)
    found = paired_bootstrap(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p == pytest.approx(2 / 10_001)


def test_no_difference_has_p_1():
    same = np.array([[1.0, 2.0], [0.0, 2.0]])
    found = paired_bootstrap(same, same)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3, 2\)"):
        paired_bootstrap(np.ones((2, 2)), np.ones((3, 2)))


@pytest.mark.parametrize(
    ("gap", "p", "word"),
    [
        (0.1, 0.01, "beats"),
        (-0.1, 0.01, "loses"),
        (0.1, 0.05, "ties"),
        (-0.4, 0.3, "ties"),
        (0.0, 0.0, "ties"),
    ],
)
def test_verdict(gap, p, word):
    assert verdict(gap, p) == word


def test_twins_name_the_first_that_is_equal():
    shown = {
        "none": ("a", "b"),
        "idle": ("a", "b"),
        "works": ("a", "c"),
        "copy": ("a", "c"),
        "idler": ("a", "b"),
    }
    assert twins(shown) == {"idle": "none", "copy": "works", "idler": "none"}
