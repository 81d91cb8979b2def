"""Tasks for the tests of the lmms-eval plug-in: what their YAML files name. Rows have images, question and answer."""

from __future__ import annotations

from typing import Any

from PIL import Image


def visuals(doc: Any) -> list[Image.Image]:
    """All images of a row; it may have none."""
    return [Image.open(path) for path in doc["images"]]


def question(doc: Any) -> str:
    """Its question."""
    return doc["question"]


def rounds(
    doc: Any,
    lmms_eval_specific_kwargs: Any = None,
    previous_output: Any = None,
    round_idx: int | None = None,
    previous_round_info: Any = None,
) -> Any:
    """Its question, then as many others about the same images as the row says."""
    if round_idx is None:
        return doc["question"]
    if round_idx > doc["more_rounds"]:
        return None, None, True, previous_output, None
    assert len(previous_output) == round_idx
    assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
    return visuals(doc), f"Is there a star in the image? {round_idx}", False, previous_output, round_idx


def round_results(doc: Any, results: Any) -> dict[str, float]:
    """How many rounds were answered."""
    answers = results[0] if isinstance(results[0], list) else results
    return {
        "rounds": float(len(answers)),
        "said": float(all(a.strip().lower() in {"yes", "no"} for a in answers)),
    }


def likelihood_results(doc: Any, results: Any) -> dict[str, float]:
    """The likelihood of the answer."""
    ((total, greedy),) = results
    return {"total": total, "greedy": float(greedy)}


def mean(items: list[float]) -> float:
    """Their mean."""
    return sum(items) / len(items)
