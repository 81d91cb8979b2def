"""Questions about scenes and desks whose answers are true by construction, by category.

A kind of question is a function of the visible parts and of all parts: training asks a model only about what
its kept visual tokens can show, an evaluation asks about everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

import numpy as np

from .desk import SIGN_WORDS, TINY
from .scene import Bar, Glyph, Part, Scene, SceneObject
from .shapes import COLORS, PARTNER, PLURALS, SHAPES, with_article

Item = TypeVar("Item")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""Answers to "where", the cells of a 3 x 3 grid in row order."""

EXISTENCE = "Is there {} in the image?"

APART = 12.0
"""Objects whose centres differ by fewer pixels across are not compared as left and right."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class View:
    """What questions are about.

    Attributes:
        visible: the visible parts, in the order of `parts`.
        parts: all parts of the scene.
        size: width and height of the scene in pixels.
    """

    visible: Sequence[Part]
    parts: Sequence[Part]
    size: tuple[int, int]

    @property
    def seen(self) -> list[SceneObject]:
        """The visible objects, left to right."""
        return [part for part in self.visible if isinstance(part, SceneObject)]

    @property
    def objects(self) -> list[SceneObject]:
        """All objects, left to right."""
        return [part for part in self.parts if isinstance(part, SceneObject)]

    def unique(self, key: str) -> list[SceneObject]:
        """Visible objects of which no other object shares the attribute `key`."""
        value = attrgetter(key)
        return [item for item in self.seen if sum(value(other) == value(item) for other in self.objects) == 1]


Kind = Callable[[np.random.Generator, View], Turn | None]
"""Draws a question, or None where the view has nothing to ask about."""


def one(options: Sequence[Item], rng: np.random.Generator) -> Item:
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def place(item: SceneObject, size: tuple[int, int]) -> str:
    """The cell of a 3 x 3 grid over an image of `size` (width, height) that holds the object's centre."""
    column, row = min(2, int(3 * item.x / size[0])), min(2, int(3 * item.y / size[1]))
    return PLACES[3 * row + column]


def existence(rng: np.random.Generator, view: View) -> Turn:
    """Whether an object is there; absent ones are often partners of present ones."""
    names = [item.shape for item in view.seen]
    there = {item.shape for item in view.objects}
    absent = [name for name in SHAPES if name not in there]
    likely = [PARTNER[name] for name in dict.fromkeys(names) if PARTNER[name] in absent]
    if names and rng.random() < 0.5:
        return Turn(EXISTENCE.format(with_article(one(names, rng))), "yes")
    name = one(likely if likely and rng.random() < 0.4 else absent, rng)
    return Turn(EXISTENCE.format(with_article(name)), "no")


def binding(rng: np.random.Generator, view: View) -> Turn | None:
    """Whether an object of a colour is there; the wrong colour is that of another object where one differs."""
    if not view.seen:
        return None
    item = one(view.seen, rng)
    if rng.random() < 0.5:
        return Turn(EXISTENCE.format(with_article(f"{item.color} {item.shape}")), "yes")
    taken = {other.color for other in view.objects if other.shape == item.shape}
    near = [other.color for other in view.objects if other.color not in taken]
    color = one(near if near and rng.random() < 0.7 else [name for name in COLORS if name not in taken], rng)
    return Turn(EXISTENCE.format(with_article(f"{color} {item.shape}")), "no")


def attribute(rng: np.random.Generator, view: View) -> Turn | None:
    """The colour of an object, or the object of a colour."""
    return _attribute_of(rng, view, lambda item: True)


def tiny(rng: np.random.Generator, view: View) -> Turn | None:
    """The same about a tiny object."""
    return _attribute_of(rng, view, lambda item: item.radius < TINY)


def counting(rng: np.random.Generator, view: View) -> Turn | None:
    """The number of objects, or of objects of one shape."""
    if len(view.seen) < len(view.objects):
        return None
    if rng.random() < 0.5 or not view.objects:
        return Turn("How many objects are in the image?", NUMBERS[len(view.objects)])
    name = one([item.shape for item in view.objects], rng) if rng.random() < 0.75 else one(SHAPES, rng)
    count = sum(item.shape == name for item in view.objects)
    return Turn(f"How many {PLURALS[name]} are in the image?", NUMBERS[count])


def where(rng: np.random.Generator, view: View) -> Turn | None:
    """The cell of a 3 x 3 grid that an object is in."""
    found = view.unique("shape")
    if not found:
        return None
    item = one(found, rng)
    return Turn(f"Where is the {item.shape}?", place(item, view.size))


def side(rng: np.random.Generator, view: View) -> Turn | None:
    """Whether one object is to the left (or right) of another."""
    found = view.unique("shape")
    pairs = [(a, b) for a in found for b in found if abs(a.x - b.x) > APART]
    if not pairs:
        return None
    a, b = one(pairs, rng)
    word = one(("left", "right"), rng)
    return Turn(
        f"Is the {a.shape} {word} of the {b.shape}?", "yes" if (a.x < b.x) == (word == "left") else "no"
    )


def reading(rng: np.random.Generator, view: View) -> Turn | None:
    """The number or the word of the sign; digits are separate words of the answer."""
    sign = [part for part in view.parts if isinstance(part, Glyph)]
    if not sign or any(glyph not in view.visible for glyph in sign):
        return None
    text = "".join(glyph.character for glyph in sign)
    if text in SIGN_WORDS:
        return Turn("What word is on the sign?", text)
    return Turn("What number is on the sign?", " ".join(text))


def chart(rng: np.random.Generator, view: View) -> Turn | None:
    """The colour of the tallest or the shortest bar."""
    bars = [part for part in view.parts if isinstance(part, Bar)]
    if not bars or any(bar not in view.visible for bar in bars):
        return None
    tallest = rng.random() < 0.5
    bar = (max if tallest else min)(bars, key=attrgetter("radius"))
    return Turn(f"Which bar is the {'tallest' if tallest else 'shortest'}?", bar.color)


CATEGORIES: dict[str, Kind] = {
    "reading": reading,
    "chart": chart,
    "counting": counting,
    "side": side,
    "binding": binding,
    "tiny": tiny,
    "clutter": attribute,
    "objects": attribute,
}
"""What an evaluation asks about a desk; "clutter" and "objects" ask the same, with and without clutter."""


def desk_questions(scenes: Sequence[Scene], seed: int) -> list[tuple[int, str, Turn]]:
    """One question of every category that a desk has something for: (position in `scenes`, category, turn)."""
    found = []
    for index, scene in enumerate(scenes):
        view = View(scene.parts, scene.parts, scene.image.size)
        for number, (category, kind) in enumerate(CATEGORIES.items()):
            if category in ("clutter", "objects") and scene.cluttered != (category == "clutter"):
                continue
            turn = kind(np.random.default_rng((seed, index, number)), view)
            if turn is not None:
                found.append((index, category, turn))
    return found


def _attribute_of(rng: np.random.Generator, view: View, about: Callable[[SceneObject], bool]) -> Turn | None:
    by_shape = rng.random() < 0.6
    found = [item for item in view.unique("shape" if by_shape else "color") if about(item)]
    if not found:
        return None
    item = one(found, rng)
    if by_shape:
        return Turn(f"What color is the {item.shape}?", item.color)
    return Turn(f"What is the {item.color} object?", item.shape)
