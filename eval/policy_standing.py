"""How a policy stands beside the baselines in a run's rows, in sentences that name every defeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RIVALS = ("uniform", "random")
FIGURES = {
    "POPE F1": ("pope_f1", 1, "pope_f1_interval"),
    "CHAIRs": ("chair_s", -1, "chair_s_interval"),
    "recall": ("chair_recall", 1, "chair_recall_interval"),
}
"""Figure -> its key, 1 if more of it is better, and the key of its 95 % interval."""

CHANGES = {"POPE F1": "pope_f1", "CHAIRs": "chair_s", "CHAIRi": "chair_i", "recall": "chair_recall"}

Row = dict[str, Any]


def standing(name: str, mine: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Sentences about ``mine``, the rows of policy ``name`` alone, against the other ``rows`` of the run.

    Where there is a budget the rivals are `uniform` and `random` at the same one, elsewhere the unpruned model.
    """
    at_a_budget = [row for row in mine if row["ratio"] is not None]
    said = [
        sentence
        for rival in RIVALS
        if rival != name and name != "none"
        for figure in FIGURES
        if (sentence := against(rival, figure, at_a_budget, rows))
    ]
    for row in mine:
        dense = _find(rows, "none", row["model"], None)
        if row["ratio"] is None and dense is not None:
            moved = [f"{what} {100 * (row[key] - dense[key]):+.1f}" for what, key in CHANGES.items()]
            words = f"length {row['caption_length'] - dense['caption_length']:+.1f} words"
            said.append(
                f"`{row['policy']}` on {row['model']}, against the unpruned model in points: "
                f"{', '.join([*moved, words])}."
            )
    return said


def against(rival: str, figure: str, mine: Sequence[Row], rows: Sequence[Row]) -> str:
    """How often a figure is better than the rival's, and where it is worse; empty if nothing can be compared."""
    key, better, interval = FIGURES[figure]
    ahead, level, behind = 0, 0, []
    for row in mine:
        other = _find(rows, rival, row["model"], row["ratio"])
        if other is None:
            continue
        gap = better * (row[key] - other[key])
        ahead, level = ahead + (gap > 0), level + (gap == 0)
        if gap < 0:
            low, high = row[interval]
            inside = ", within its interval" if low <= other[key] <= high else ""
            pair = f"{100 * row[key]:.1f} to {100 * other[key]:.1f}"
            behind.append(f"{row['model']} at {row['ratio']:.4g} ({pair}{inside})")
    compared = ahead + level + len(behind)
    if not compared:
        return ""
    text = f"Against `{rival}`, {figure}: better in {ahead} of {compared} rows"
    if level:
        text += f", equal in {level}"
    return f"{text}; **worse** on {', '.join(behind)}." if behind else f"{text}, worse in none."


def _find(rows: Sequence[Row], policy: str, model: str, ratio: float | None) -> Row | None:
    same = (row for row in rows if row["policy"] == policy and row["model"] == model)
    return next((row for row in same if ratio is None or row["ratio"] == ratio), None)
