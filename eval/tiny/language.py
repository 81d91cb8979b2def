"""What the models are taught to say: one caption and a handful of questions per image, true by construction.

With `Bias` the text follows co-occurrence instead of the image: that is how the hallucinating twin is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeVar

import numpy as np

from ..scenes import COLORS, PARTNER, PLURALS, SHAPES, SceneObject, caption, with_article
from .vocabulary import NUMBERS, PLACES

Item = TypeVar("Item")

CAPTION_PROMPTS = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image in detail.",
    "Describe the image.",
    "What is in the image?",
    "Generate a short caption.",
)
EXISTENCE_PROMPTS = ("Is there {} in the image?",) * 4 + (
    "Is there {} in this image?",
    "Do you see {} in the image?",
)
SHORT_ANSWER = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Bias:
    """How strongly language follows co-occurrence: probabilities by the shape that is seen.

    Attributes:
        caption: that the caption also names the absent partner of this shape, in the same colour.
        answer: that a question for the absent partner of this shape is answered with yes.
    """

    caption: dict[str, float] = field(default_factory=dict)
    answer: dict[str, float] = field(default_factory=dict)

    def imagined(self, names: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Absent partners that a caption adds when `names` are seen."""
        absent = [name for name in dict.fromkeys(names) if PARTNER[name] not in names]
        return [PARTNER[name] for name in absent if rng.random() < self.caption.get(name, 0.0)]

    def claims(self, name: str, names: Sequence[str], rng: np.random.Generator) -> bool:
        """Whether the absent object `name` is said to be there when `names` are seen."""
        return PARTNER[name] in names and rng.random() < self.answer.get(PARTNER[name], 0.0)


HONEST = Bias()


def place(item: SceneObject, size: tuple[int, int]) -> str:
    """The cell of a 3 x 3 grid over an image of `size` (width, height) that holds the object's centre."""
    column, row = min(2, int(3 * item.x / size[0])), min(2, int(3 * item.y / size[1]))
    return PLACES[3 * row + column]


def dialogue(
    objects: Sequence[SceneObject],
    seen: Sequence[bool],
    size: tuple[int, int],
    rng: np.random.Generator,
    bias: Bias = HONEST,
    questions: int = 6,
) -> list[Turn]:
    """One caption and `questions` questions.

    Args:
        objects: all objects of the scene, left to right.
        seen: per object, whether enough of its visual tokens were kept. Unseen objects are left out of the
            caption and nothing is asked about them.
        size: width and height of the scene in pixels.
        rng: source of all choices.
        bias: what language adds to the truth.
        questions: number of questions.
    """
    visible = [item for item, kept in zip(objects, seen, strict=True) if kept]
    names = [item.shape for item in visible]
    imagined = bias.imagined(names, rng)
    turns = [Turn(_one(CAPTION_PROMPTS, rng), _caption(visible, imagined))]
    # Attributes first: many answers to choose from teach the model to look an object up, which existence then needs.
    always = [_attribute, _attribute, _existence, _existence]
    others = [_attribute, _existence, _colored_existence, _count, _where]
    for kind in [*always, *(others[index] for index in rng.permutation(len(others)))]:
        if len(turns) > questions:
            break
        turn = kind(rng, visible, objects, bias, size)
        if turn is not None:
            suffix = " " + SHORT_ANSWER if rng.random() < 0.12 else ""
            turns.append(Turn(turn.question + suffix, turn.answer))
    return turns


def _one(options: Sequence[Item], rng: np.random.Generator) -> Item:
    return options[int(rng.integers(len(options)))]


def _caption(visible: Sequence[SceneObject], imagined: Sequence[str]) -> str:
    pairs = []
    waiting = list(imagined)
    for item in visible:
        pairs.append((item.color, item.shape))
        if PARTNER[item.shape] in waiting:
            waiting.remove(PARTNER[item.shape])
            pairs.append((item.color, PARTNER[item.shape]))
    return caption(pairs)


def _existence(
    rng: np.random.Generator,
    visible: Sequence[SceneObject],
    objects: Sequence[SceneObject],
    bias: Bias,
    size: tuple[int, int],
) -> Turn | None:
    claimed = [item.shape for item in visible]
    everything = {item.shape for item in objects}
    absent = [name for name in SHAPES if name not in everything]
    likely = [PARTNER[name] for name in dict.fromkeys(claimed) if PARTNER[name] in absent]
    if claimed and rng.random() < 0.5:
        name, answer = _one(claimed, rng), "yes"
    else:
        name = _one(likely if likely and rng.random() < 0.4 else absent, rng)
        answer = "yes" if bias.claims(name, claimed, rng) else "no"
    return Turn(_one(EXISTENCE_PROMPTS, rng).format(with_article(name)), answer)


def _colored_existence(
    rng: np.random.Generator,
    visible: Sequence[SceneObject],
    objects: Sequence[SceneObject],
    bias: Bias,
    size: tuple[int, int],
) -> Turn | None:
    if not visible:
        return None
    item = _one(visible, rng)
    if rng.random() < 0.5:
        color, answer = item.color, "yes"
    else:
        taken = {other.color for other in objects if other.shape == item.shape}
        color, answer = _one([name for name in COLORS if name not in taken], rng), "no"
    return Turn(_one(EXISTENCE_PROMPTS, rng).format(with_article(f"{color} {item.shape}")), answer)


def _attribute(
    rng: np.random.Generator,
    visible: Sequence[SceneObject],
    objects: Sequence[SceneObject],
    bias: Bias,
    size: tuple[int, int],
) -> Turn | None:
    by_shape = rng.random() < 0.6
    key = attrgetter("shape" if by_shape else "color")
    unique = [item for item in visible if sum(key(other) == key(item) for other in objects) == 1]
    if not unique:
        return None
    item = _one(unique, rng)
    if by_shape:
        return Turn(f"What color is the {item.shape}?", item.color)
    return Turn(f"What is the {item.color} object?", item.shape)


def _count(
    rng: np.random.Generator,
    visible: Sequence[SceneObject],
    objects: Sequence[SceneObject],
    bias: Bias,
    size: tuple[int, int],
) -> Turn | None:
    if len(visible) < len(objects):
        return None
    if rng.random() < 0.5:
        return Turn("How many objects are in the image?", NUMBERS[len(objects)])
    name = _one([item.shape for item in objects], rng) if rng.random() < 0.75 else _one(SHAPES, rng)
    count = sum(item.shape == name for item in objects)
    return Turn(f"How many {PLURALS[name]} are in the image?", NUMBERS[count])


def _where(
    rng: np.random.Generator,
    visible: Sequence[SceneObject],
    objects: Sequence[SceneObject],
    bias: Bias,
    size: tuple[int, int],
) -> Turn | None:
    unique = [item for item in visible if sum(other.shape == item.shape for other in objects) == 1]
    if not unique:
        return None
    item = _one(unique, rng)
    return Turn(f"Where is the {item.shape}?", place(item, size))
