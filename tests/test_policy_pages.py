"""docs/policies.md has a section for every policy, and its generated parts say what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vlm_prune.eval import policy_pages as pages
from vlm_prune.eval.policy_standing import standing
from vlm_prune.registry import POLICIES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / pages.PAGE
RESULTS = ROOT / pages.RESULTS
REFRESH = "run `python -m vlm_prune.eval.policy_pages`"


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def blocks() -> dict[tuple[str, str], str]:
    return {found.groups(): found[0] for found in pages.MARKED.finditer(page())}


def row(policy: str, ratio: float | None, f1: float, chair: float = 0.2) -> dict[str, Any]:
    return {
        "model": "tiny-llava", "policy": policy, "stages": "encode", "ratio": ratio, "tokens": 64.0, "seed": 2026,
        "pope_random_f1": f1, "pope_adversarial_f1": f1, "pope_adversarial_accuracy": f1, "pope_f1": f1,
        "pope_f1_interval": [f1 - 0.02, f1 + 0.02], "chair_s": chair, "chair_s_interval": [0.1, 0.3],
        "chair_i": 0.05, "chair_recall": 0.8, "chair_recall_interval": [0.7, 0.9], "caption_length": 12.0,
        "caption_repetition": 0.1, "prefill_ratio": 0.5, "kv_ratio": 0.25, "n_questions": 720, "n_captions": 40,
    }  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_section_with_all_its_parts(name):
    heading, marked = f"\n## {name}\n", blocks()
    assert heading in page(), f"{name} has no section in {pages.PAGE}"
    section = page().split(heading)[1].split("\n## ")[0]
    for kind in ("facts", "fields", "notes", "measured"):
        assert marked.get((kind, name), "missing") in section
    for part in ("When to use it.", "Cost.", "Source."):
        assert f"**{part}**" in section
    picture = PAGE.with_suffix("") / f"{name}.png"
    assert f"](policies/{picture.name})" in section
    assert 0 < picture.stat().st_size < 60_000


@pytest.mark.parametrize("kind", ["contents", "facts", "fields", "notes"])
def test_what_is_read_off_the_code_is_up_to_date(kind):
    mine = {name: text for (found, name), text in blocks().items() if found == kind}
    assert mine
    for name, text in mine.items():
        assert text == pages.filled(text, []), f"{kind} of {name} is out of date: {REFRESH}"


@pytest.mark.skipif(not RESULTS.exists(), reason="no measured rows in this checkout")
def test_measured_rows_are_those_of_the_results():
    assert page() == pages.filled(page(), pages.load_rows(RESULTS)), REFRESH


def test_links_and_pictures_of_the_page_exist():
    targets = re.findall(r"\]\(([^)#:]+)\)", page())
    assert len(targets) > len(POLICIES)
    for target in targets:
        assert (PAGE.parent / target).exists(), target


def test_rows_of_compositions_and_labels_go_to_their_policies():
    rows = [row("flowcut", 0.25, 0.9), row("flowcut+vhr", 0.25, 0.8), row("paint published", None, 0.7)]
    assert "flowcut+vhr" in pages.measured("vhr", rows)
    assert pages.measured("flowcut", rows).count("\n| flowcut") == 2
    assert "| paint published |" in pages.measured("paint", rows)
    assert pages.measured("fastv", rows).startswith("Not measured yet")


def test_every_defeat_is_named():
    rows = [
        row("uniform", 0.25, 0.9),
        row("uniform", 0.5, 0.8),
        row("flowcut", 0.25, 0.7),
        row("flowcut", 0.5, 0.81),
    ]
    f1, chair, recall = standing("flowcut", rows[2:], rows)
    assert f1 == (
        "Against `uniform`, POPE F1: better in 1 of 2 rows; **worse** on tiny-llava at 0.25 (70.0 to 90.0)."
    )
    assert chair == "Against `uniform`, CHAIRs: better in 0 of 2 rows, equal in 2, worse in none."
    assert recall.startswith("Against `uniform`, recall: ")


def test_policies_without_a_budget_stand_beside_the_unpruned_model():
    rows = [row("none", 1.0, 0.9), row("paint", None, 0.88, chair=0.1)]
    (said,) = standing("paint", rows[1:], rows)
    assert said.startswith(
        "`paint` on tiny-llava, against the unpruned model in points: POPE F1 -2.0, CHAIRs -10.0"
    )


def test_an_unknown_mark_is_refused():
    with pytest.raises(ValueError, match="the kinds are contents"):
        pages.filled("<!-- fields:flowcat -->\n<!-- end -->", [])


def test_a_field_without_a_word_is_refused(monkeypatch):
    monkeypatch.setattr(pages, "described", lambda cls: {})
    with pytest.raises(ValueError, match="has no entry under Attributes"):
        pages.fields("flowcut", [])
