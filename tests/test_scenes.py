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
    make_desk,
    make_desks,
    make_scene,
    make_scenes,
    pope_questions,
    with_article,
)
from vlm_prune.eval.scenes.desk import TINY
from vlm_prune.eval.scenes.questions import CATEGORIES, NUMBERS, View, desk_questions


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


@pytest.fixture(scope="module")
def desks():
    return list(make_desks(40, seed=9))


def test_a_seed_fixes_a_desk(desks):
    again = list(make_desks(3, seed=9))
    for first, second in zip(desks, again, strict=False):
        assert first.image.tobytes() == second.image.tobytes()
        assert first.parts == second.parts
    with pytest.raises(ValueError, match="at least 128"):
        make_desk(0, (96, 128))


def test_every_part_of_a_desk_is_visible_where_it_says(desks):
    for desk in desks:
        assert set(np.unique(desk.index_map)) - {-1} == set(range(len(desk.parts)))
        for index, part in enumerate(desk.parts):
            rows, columns = np.nonzero(desk.index_map == index)
            assert abs(rows.mean() - part.y) < 0.4 * part.radius + 1
            assert abs(columns.mean() - part.x) < 0.4 * part.radius + 1
    assert any(desk.sign for desk in desks)
    assert any(desk.chart for desk in desks)
    assert 0 < sum(desk.cluttered for desk in desks) < len(desks)


def test_a_character_is_ink_on_its_plate_and_another_one_looks_different(desks):
    """The pixels of a glyph's box hold two shades; the same character twice is more alike than two others are."""
    for desk in desks:
        for index in range(len(desk.objects), len(desk.objects) + len(desk.sign)):
            pixels = np.asarray(desk.image, float).mean(-1)[desk.index_map == index]
            assert np.ptp(pixels) > 60


def answers(category, desk):
    """What may be asked of a desk in a category, over many draws: question -> answer."""
    view = View(desk.parts, desk.parts, desk.image.size)
    turns = (CATEGORIES[category](np.random.default_rng(seed), view) for seed in range(40))
    return {turn.question: turn.answer for turn in turns if turn is not None}


def test_answers_are_true_of_the_desk(desks):
    for desk in desks:
        text = "".join(glyph.character for glyph in desk.sign)
        assert set(answers("reading", desk).values()) <= {text, " ".join(text)}
        if desk.chart:
            heights = {bar.color: bar.radius for bar in desk.chart}
            assert answers("chart", desk) == {
                "Which bar is the tallest?": max(heights, key=heights.get),
                "Which bar is the shortest?": min(heights, key=heights.get),
            }
        for question, answer in answers("side", desk).items():
            first, word, second = re.fullmatch(r"Is the (\w+) (left|right) of the (\w+)\?", question).groups()
            (a,), (b,) = ([o.x for o in desk.objects if o.shape == name] for name in (first, second))
            assert answer == ("yes" if (a < b) == (word == "left") else "no")
        for question, answer in answers("binding", desk).items():
            color, shape = re.search(r"an? (\w+) (\w+) in", question).groups()
            assert answer == ("yes" if (color, shape) in {(o.color, o.shape) for o in desk.objects} else "no")
        for question, answer in answers("counting", desk).items():
            name = OBJECTS.get(question.split()[2])
            count = sum(o.shape == name for o in desk.objects) if name else len(desk.objects)
            assert answer == NUMBERS[count]
        for question, answer in answers("tiny", desk).items():
            words = {*re.findall(r"\w+", question), answer}
            assert [o for o in desk.objects if o.radius < TINY and {o.color, o.shape} <= words], (
                question,
                answer,
            )


def test_nothing_is_asked_about_what_is_not_visible(desks):
    desk = next(desk for desk in desks if len(desk.sign) > 1 and desk.chart)
    view = View([*desk.objects, *desk.sign[:-1], *desk.chart[1:]], desk.parts, desk.image.size)
    for category in ("reading", "chart"):
        assert all(CATEGORIES[category](np.random.default_rng(seed), view) is None for seed in range(10))


def test_an_evaluation_asks_one_question_a_category(desks):
    found = desk_questions(desks, 1)
    assert found == desk_questions(desks, 1)
    assert len({(index, category) for index, category, _ in found}) == len(found)
    assert {category for _, category, _ in found} == set(CATEGORIES)
    for index, category, _ in found:
        if category in ("clutter", "objects"):
            assert desks[index].cluttered == (category == "clutter")
