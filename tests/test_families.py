"""The census of families: a row of docs/families.json for each model type, and what made it still holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from vlm_prune.eval.census.check import check
from vlm_prune.eval.census.page import page
from vlm_prune.eval.census.shrink import TYPES

DOCS = Path(__file__).parent.parent / "docs"
FOUND = json.loads((DOCS / "families.json").read_text())
QUICK = ("gemma3", "glm4v", "idefics3", "mistral3", "paligemma", "qwen3_5", "mllama", "chameleon")
"""One of each form, and two that are refused."""


def _marked(model_type: str) -> object:
    return model_type if model_type in QUICK else pytest.param(model_type, marks=pytest.mark.slow)


@pytest.mark.parametrize("model_type", [_marked(name) for name in sorted(TYPES)])
def test_each_model_type_is_what_the_page_says(model_type):
    row, known = check(model_type).plain(), FOUND["rows"].get(model_type)
    if "requires the timm library" in row.get("reason", ""):
        pytest.skip("its tower is timm's, which is not a dependency")
    assert row["outcome"] != "wrong", row["reason"]
    if known is not None and transformers.__version__ == FOUND["transformers"]:
        assert _without_words(row) == _without_words(known)


def _without_words(row: dict[str, Any]) -> dict[str, Any]:
    """Sentences may be put better; what is refused may not change unseen."""
    return {**row, "reason": bool(row.get("reason")), "policies": set(row.get("policies", ()))}


def test_the_page_is_made_from_the_rows():
    assert (DOCS / "families.md").read_text() == page(FOUND)


def test_no_row_is_wrong_and_most_work():
    outcomes = [row["outcome"] for row in FOUND["rows"].values()]
    assert "wrong" not in outcomes
    assert outcomes.count("works") >= 78, "fewer than there were"


def test_every_refusal_has_its_sentence():
    for name, row in FOUND["rows"].items():
        if row["outcome"] == "refused":
            assert len(row["reason"].split()) > 5, name
