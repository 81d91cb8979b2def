"""Scenes: determinism, labels against pixels, captions, and the rules of POPE."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from vlm_prune.eval.scenes import (
    COLORS,
    OBJECTS,
    PARTNER,
    PLURALS,
    SHAPES,
    cooccurrence,
    make_scene,
    make_scenes,
    pope_questions,
    with_article,
)


@pytest.fixture(scope="module")
def scenes():
    return list(make_scenes(60, seed=77, min_names=3))


@pytest.mark.parametrize("size", [(128, 128), (256, 128), (72, 200)])
def test_a_seed_fixes_a_scene(size):
    first, again, other = make_scene((5, 1), size), make_scene((5, 1), size), make_scene((5, 2), size)
    assert first.image.size == size
    assert first.image.tobytes() == again.image.tobytes()
    assert first.objects == again.objects
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("size", [(40, 128), (130, 128)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        make_scene(0, size)


@pytest.mark.parametrize("size", [(128, 128), (256, 256)])
def test_every_object_is_seen_inside_its_box_in_its_color(size):
    for scene in make_scenes(20, seed=3, sizes=[size]):
        pixels = np.asarray(scene.image, float)
        assert set(np.unique(scene.index_map)) - {-1} == set(range(len(scene.objects)))
        for index, item in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.index_map == index)
            left, top, right, bottom = item.box
            slack = 0.15 * item.radius + 2
            assert left - slack <= columns.min()
            assert columns.max() <= right + slack
            assert top - slack <= rows.min()
            assert rows.max() <= bottom + slack
            mean = pixels[rows, columns].mean(0)
            distance = {name: np.abs(mean - rgb).sum() for name, rgb in COLORS.items()}
            assert min(distance, key=distance.get) == item.color


def test_patch_mask_counts_pixels(scenes):
    scene = scenes[0]
    blocks = (scene.index_map >= 0).reshape(16, 8, 16, 8).mean((1, 3))
    np.testing.assert_allclose(scene.coverage().sum(0), blocks, atol=1e-6)
    np.testing.assert_array_equal(scene.patch_mask(share=0.5), blocks >= 0.5)


def test_captions_name_every_object_once_left_to_right(scenes):
    for scene in scenes:
        words = [OBJECTS[word] for word in re.findall("[a-z]+", scene.caption) if word in OBJECTS]
        assert words == [item.shape for item in scene.objects]
        assert [item.x for item in scene.objects] == sorted(item.x for item in scene.objects)


def test_object_table_and_partners():
    assert {OBJECTS[name] for name in SHAPES} == set(SHAPES)
    assert OBJECTS[PLURALS["cross"]] == "cross"
    assert all(PARTNER[PARTNER[name]] == name != PARTNER[name] for name in SHAPES)


def test_partners_occur_together():
    together = cooccurrence(list(make_scenes(400, seed=9)))
    assert together["heart", "cross"] > 2 * max(together["heart", "house"], together["heart", "triangle"])


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_rules(scenes, split):
    questions = pope_questions(scenes, split, seed=1)
    assert questions == pope_questions(scenes, split, seed=1)
    assert [question["question_id"] for question in questions] == list(range(1, 6 * len(scenes) + 1))
    frequency, together = Counter(name for scene in scenes for name in scene.names), cooccurrence(scenes)
    for start in range(0, len(questions), 6):
        block = questions[start : start + 6]
        names = scenes[block[0]["image"]].names
        assert [question["label"] for question in block] == ["yes", "no"] * 3
        assert [question["object"] for question in block[::2]] == list(names[:3])
        negatives = [question["object"] for question in block[1::2]]
        assert len(set(negatives)) == 3
        assert not set(negatives) & set(names)
        assert all(q["text"] == f"Is there {with_article(q['object'])} in the image?" for q in block)
        absent = [name for name in SHAPES if name not in names]
        if split == "popular":
            assert frequency[negatives[0]] == max(frequency[name] for name in absent)
        if split == "adversarial":
            assert together[names[0], negatives[0]] == max(together[names[0], name] for name in absent)


def test_pope_article_and_unknown_split(scenes):
    texts = {question["text"] for question in pope_questions(scenes, "random", 0)}
    assert "Is there an arrow in the image?" in texts
    with pytest.raises(ValueError, match="'easy'"):
        pope_questions(scenes, "easy", 0)
