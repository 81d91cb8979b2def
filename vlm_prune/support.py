"""Which policy works on which model family: the matrix in the README, worked out from what each declares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .contract.policy import Policy
from .registry import BUILT_IN, policy_class


@dataclass(frozen=True)
class Family:
    """What of a model family decides which policies work.

    Attributes:
        title: its name to people.
        cls: whether its vision tower has a CLS token.
        resizes: whether the grid of large images, and of videos, is resized after the projector.
        frames: whether it hands on frames of videos like tiles of images, so that nobody knows which form a video.
    """

    title: str
    cls: bool = True
    resizes: bool = False
    frames: bool = False


FAMILIES = {
    "llava": Family("LLaVA-1.5"),
    "vipllava": Family("VipLLaVA"),
    "llava_next": Family("LLaVA-NeXT"),
    "llava_next_video": Family("LLaVA-NeXT-Video"),
    "llava_onevision": Family("LLaVA-OneVision", cls=False, resizes=True),
    "internvl": Family("InternVL", frames=True),
    "qwen2_vl": Family("Qwen2-VL", cls=False),
    "qwen2_5_vl": Family("Qwen2.5-VL", cls=False),
    "qwen3_vl": Family("Qwen3-VL", cls=False),
}
"""``config.model_type`` -> facts of the family, in the order of the matrix."""

FULL, PART, NOT = "●", "◐", "○"
NOTES = {
    "cls": "There is no CLS token: the mean query over all patches stands in for it, and the receipt says so.",
    "resized": "Images that the model does not resize (up to nine tiles); large ones and videos raise, because the "
    "policy chooses among tokens that are blended afterwards.",
    "frames": "Frames of a video come like tiles of images, and each has its own budget: the policy treats each as a "
    "video of one frame.",
    "others": "Every other model that puts image features at placeholders, found by reading it; "
    "[families](docs/families.md) lists them. Those with a tower like Qwen's take all policies.",
}
"""Footnotes of the matrix, in its order."""

MARKS = ("¹", "²", "³", "⁴")


@dataclass(frozen=True)
class Cell:
    """How far a policy works on a family: `FULL` or `PART`, and which of `NOTES` belong to it."""

    level: str
    notes: tuple[str, ...] = ()


def support(policy: str, family: str) -> Cell:
    """The cell of the matrix for two registered names."""
    kind, facts = policy_class(policy), FAMILIES[family]
    cls = ("cls",) if kind.reads_cls and not facts.cls else ()
    if facts.resizes and kind.encodes and not kind.late:
        return Cell(PART, (*cls, "resized"))
    return Cell(FULL, (*cls, "frames") if facts.frames and kind.over_frames else cls)


def elsewhere(policy: str) -> Cell:
    """The cell for models of which only the features are known."""
    kind = policy_class(policy)
    try:
        needs = kind().needs_tower
    except ValueError:  # it cannot be made without settings; those that can look into towers all can
        needs = kind.tower_layers is not Policy.tower_layers
    return Cell(NOT if needs else FULL)


def matrix() -> Iterator[list[str]]:
    """The rows of the matrix in Markdown, cell by cell; the first is its head, the second the rule below it."""
    marks = dict(zip(NOTES, MARKS, strict=True))
    yield ["", *(FAMILIES[name].title for name in FAMILIES), f"others{marks['others']}"]
    yield ["---", *(":---:" for _ in FAMILIES), ":---:"]
    for policy in sorted(BUILT_IN):
        cells = [*(support(policy, family) for family in FAMILIES), elsewhere(policy)]
        yield [f"`{policy}`", *(cell.level + "".join(marks[note] for note in cell.notes) for cell in cells)]


def markdown() -> str:
    """The matrix as Markdown, with its footnotes."""
    rows = "\n".join("| " + " | ".join(row) + " |" for row in matrix())
    notes = "\n".join(f"{mark} {note}  " for mark, note in zip(MARKS, NOTES.values(), strict=True))
    return f"{rows}\n\n{FULL} works, {PART} works in part, {NOT} is refused.  \n{notes.rstrip()}"
