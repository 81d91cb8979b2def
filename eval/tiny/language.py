"""What the models are taught to say: one caption and a handful of questions per image, true by construction.

With `Bias` the text follows co-occurrence instead of the image: that is how the hallucinating twin is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..scenes import PARTNER, SHAPES, Part, SceneObject, caption
from ..scenes.questions import (
    EXISTENCE,
    Turn,
    View,
    attribute,
    binding,
    chart,
    counting,
    existence,
    one,
    reading,
    side,
    tiny,
    where,
)

CAPTION_PROMPTS = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image in detail.",
    "Describe the image.",
    "What is in the image?",
    "Generate a short caption.",
)
EXISTENCE_PROMPTS = (EXISTENCE,) * 4 + (
    "Is there {} in this image?",
    "Do you see {} in the image?",
)
SHORT_ANSWER = "Answer the question using a single word or phrase."


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


def dialogue(
    parts: Sequence[Part],
    seen: Sequence[bool],
    size: tuple[int, int],
    rng: np.random.Generator,
    bias: Bias = HONEST,
    questions: int = 6,
) -> list[Turn]:
    """One caption and `questions` questions.

    Args:
        parts: all parts of the scene: objects (left to right), characters, bars.
        seen: per part, whether enough of its visual tokens were kept. Unseen objects are left out of the
            caption and nothing is asked about them.
        size: width and height of the scene in pixels.
        rng: source of all choices.
        bias: what language adds to the truth.
        questions: number of questions.
    """
    view = View([part for part, kept in zip(parts, seen, strict=True) if kept], parts, size)
    names = [item.shape for item in view.seen]
    turns = [Turn(one(CAPTION_PROMPTS, rng), _caption(view.seen, bias.imagined(names, rng)))]
    # Attributes first: many answers to choose from teach the model to look an object up, which existence then needs.
    if all(isinstance(part, SceneObject) for part in parts):
        always = [attribute, attribute, existence, existence]
        others = [attribute, existence, binding, counting, where]
    else:
        always = [reading, chart, attribute, existence]
        others = [attribute, tiny, binding, counting, side, where]
    for kind in [*always, *(others[index] for index in rng.permutation(len(others)))]:
        if len(turns) > questions:
            break
        turn = kind(rng, view)
        if turn is None:
            continue
        if kind is existence:
            turn = _leaning(turn, names, bias, rng)
        if turn.question.startswith("Is there "):
            asked = turn.question.removeprefix("Is there ").removesuffix(" in the image?")
            turn = Turn(one(EXISTENCE_PROMPTS, rng).format(asked), turn.answer)
        suffix = " " + SHORT_ANSWER if rng.random() < 0.12 else ""
        turns.append(Turn(turn.question + suffix, turn.answer))
    return turns


def _leaning(turn: Turn, names: Sequence[str], bias: Bias, rng: np.random.Generator) -> Turn:
    """An answer of "no" may become "yes" where the partner of what is asked for is seen."""
    asked = next(word for word in turn.question.rstrip("?").split() if word in SHAPES)
    leans = turn.answer == "no" and bias.claims(asked, names, rng)
    return Turn(turn.question, "yes") if leans else turn


def _caption(visible: Sequence[SceneObject], imagined: Sequence[str]) -> str:
    pairs = []
    waiting = list(imagined)
    for item in visible:
        pairs.append((item.color, item.shape))
        if PARTNER[item.shape] in waiting:
            waiting.remove(PARTNER[item.shape])
            pairs.append((item.color, PARTNER[item.shape]))
    return caption(pairs)
