"""Which policy works on which model family: the matrix in the README, derived from what each declares."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from .contract.anatomy import Family
from .contract.policy import Policy
from .registry import ADAPTERS, BUILT_IN, BUILT_IN_FAMILIES, policy_class


@cache
def families() -> dict[str, Family]:
    """``config.model_type`` -> what its adapter says about it, in the order of the registry: the matrix's columns."""
    found = {}
    for name in BUILT_IN_FAMILIES:
        module = importlib.import_module(str(ADAPTERS[name]).split(":")[0])
        if name in (known := getattr(module, "FAMILIES", {})):
            found[name] = known[name]
    return found


FULL, PART, NOT = "●", "◐", "○"
NOTES = {
    "cls": "There is no CLS token: the mean query over all patches is used instead, and the receipt says so.",
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
    kind, facts = policy_class(policy), families()[family]
    cls = ("cls",) if kind.reads_cls and not facts.cls else ()
    if facts.resizes and kind.encodes and not kind.late:
        return Cell(PART, (*cls, "resized"))
    return Cell(FULL, (*cls, "frames") if facts.frames and kind.over_frames else cls)


def elsewhere(policy: str) -> Cell:
    """The cell for models of which the engine only knows the features."""
    kind = policy_class(policy)
    try:
        needs = kind().needs_tower
    except ValueError:  # it cannot be made without settings; all such policies can look into towers
        needs = kind.tower_layers is not Policy.tower_layers
    return Cell(NOT if needs else FULL)


def matrix() -> Iterator[list[str]]:
    """The rows of the matrix in Markdown, cell by cell; the first is its head, the second the rule below it."""
    marks = dict(zip(NOTES, MARKS, strict=True))
    yield ["", *(family.title for family in families().values()), f"others{marks['others']}"]
    yield ["---", *(":---:" for _ in families()), ":---:"]
    for policy in sorted(BUILT_IN):
        cells = [*(support(policy, family) for family in families()), elsewhere(policy)]
        yield [f"`{policy}`", *(cell.level + "".join(marks[note] for note in cell.notes) for cell in cells)]


def markdown() -> str:
    """The matrix as Markdown, with its footnotes."""
    rows = "\n".join("| " + " | ".join(row) + " |" for row in matrix())
    notes = "\n".join(f"{mark} {note}  " for mark, note in zip(MARKS, NOTES.values(), strict=True))
    return f"{rows}\n\n{FULL} works, {PART} works in part, {NOT} is refused.  \n{notes.rstrip()}"
