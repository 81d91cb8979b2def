"""Each policy looks like itself alone, to every reader; labels of charts stand on nothing."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_prune.eval.report.charts import TONES
from vlm_prune.eval.report.labels import Label, Obstacles, place
from vlm_prune.eval.report.looks import HUES, INK, PLACES, SHAPES, Look, looks
from vlm_prune.registry import POLICIES

PAPERS = ("#fffffc", "#151513")

SEEN = {
    "all cones": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
"""What is left of linear RGB without one kind of cones (Machado et al. 2009, severity 1)."""


def linear(colour):
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """Ottosson's perceptual space; a step of 0.02 is just seen side by side."""
    cones = np.array([
        [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ])  # fmt: skip
    axes = np.array([
        [0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ])  # fmt: skip
    return axes @ np.cbrt(cones @ np.clip(rgb, 0, 1))


def contrast(one, other):
    light = sorted(linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05 for colour in (one, other))
    return light[1] / light[0]


@pytest.mark.parametrize("eye", SEEN)
@pytest.mark.parametrize("paper", [0, 1], ids=["light", "dark"])
def test_hues_differ_for_every_eye(paper, eye):
    colours = [oklab(np.array(SEEN[eye]) @ linear(pair[paper])) for pair in (*HUES, INK)]
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) > 0.11


@pytest.mark.parametrize("paper", [0, 1], ids=["light", "dark"])
def test_hues_stand_out_and_labels_can_be_read(paper):
    assert min(contrast(pair[paper], PAPERS[paper]) for pair in HUES) >= 3  # WCAG: graphics
    assert min(contrast(pair[paper], PAPERS[paper]) for pair in TONES) >= 4.5  # WCAG: text


def test_forty_policies_have_forty_looks():
    found = looks([*PLACES, *(f"flowcut+{name}" for name in POLICIES), "flowcut (official)"])
    assert len({(look.hue, look.shape) for look in found.values()}) == len(found) > 60
    assert found["none"] == Look(-1, 0, 0)
    assert len(set(PLACES)) == len(PLACES)


def test_a_look_is_the_names_not_the_runs():
    everywhere = looks(PLACES)
    for name in POLICIES:
        assert looks([name])[name] == looks(["zz", name, "aa"])[name]
        if name in PLACES:
            assert looks([name])[name] == everywhere[name]
    some = [f"label {i}" for i in range(20)]
    assert looks(some) == looks(reversed(some))


@given(st.sets(st.text(max_size=6), min_size=1, max_size=70))
def test_whatever_the_names_looks_are_distinct(names):
    found = looks(names)
    assert set(found) == names
    assert len({(look.hue, look.shape) for look in found.values()}) == len(names)


def test_shapes_fill_their_square():
    for shape in SHAPES:
        corners = np.array(shape)
        assert abs(corners).max() <= 1.25
        assert np.ptp(corners, 0).max() >= 1.5


def boxes_apart(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_labels_keep_off_lines_dots_and_each_other():
    rng = np.random.default_rng(0)
    obstacles = Obstacles((0, 0, 600, 400), 1.0)
    spots = [tuple(spot) for spot in rng.uniform(20, 380, (20, 2))]
    obstacles.add_line(spots)
    for spot in spots:
        obstacles.add_dot(*spot)
    drawn = obstacles.dots
    placed = [place(Label(f"{i}", 50, 9, [spot]), obstacles) for i, spot in enumerate(spots)]
    assert sum(one is not None for one in placed) > 8
    assert all(boxes_apart(a, b) for a, b in combinations(obstacles.boxes, 2))
    for left, bottom, right, top in obstacles.boxes:
        assert 0 <= left < right <= 600
        assert 0 <= bottom < top <= 400
        x, y = drawn.T
        assert not ((x > left) & (x < right) & (y > bottom) & (y < top)).any()


def test_a_label_goes_where_there_is_room_and_shows_where_from():
    obstacles = Obstacles((0, 0, 200, 200), 1.0)
    (_, y), anchor, leader = place(Label("near", 30, 8, [(100, 100)]), obstacles)
    assert leader is None
    assert anchor == (100, 100)
    assert y > 100
    obstacles = Obstacles((0, 0, 200, 200), 1.0)
    for height in range(80, 121, 4):
        obstacles.add_line([(0, height), (200, height)])
    (_, y), _, leader = place(Label("far", 30, 8, [(100, 100)]), obstacles)
    assert y >= 120 or y + 8 <= 80
    assert leader is not None
    obstacles = Obstacles((0, 0, 20, 20), 1.0)
    assert place(Label("wider than the frame", 30, 8, [(10, 10)]), obstacles) is None
