"""POPE against RUCAIBox/POPE's evaluate.py, LLaVA's eval_pope.py and lmms-eval: one folder a case."""

import json
from pathlib import Path

import pytest

from vlm_prune.eval.pope import score_pope
from vlm_prune.eval.records import read_records

LMMS_NAMES = {"f1_score": "f1", "yes_ratio": "label_yes_ratio"}  # lmms-eval's yes ratio is that of the labels


def cases(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/expected.json"))


def _lines(path: Path) -> list[dict]:
    return read_records(path) if path.stat().st_size else []


def check(case: Path) -> None:
    questions, answers = _lines(case / "questions.jsonl"), _lines(case / "answers.jsonl")
    expected = json.loads((case / "expected.json").read_text())
    result = score_pope(questions, answers)
    official = expected["official"]
    if "error" in official:
        assert "ZeroDivisionError" in official["error"]
        assert result.undefined, "the official script divides by zero here; that must be reported"
        assert any("nothing to divide by" in warning for warning in result.warnings)
    else:
        for name, value in official.items():
            ours = result.counts[name.lower()] if name in {"TP", "FP", "TN", "FN"} else result.rates[name]
            assert ours == pytest.approx(value, rel=1e-12), name
        assert not result.undefined
    if expected.get("official_predictions(1=yes)"):
        assert [int(bool(v)) for v in result.predictions] == expected["official_predictions(1=yes)"]
    printed = [
        line for line in expected.get("llava_eval_pope_stdout", ()) if line[:1].isdigit() and ", " in line
    ]
    for line in printed:
        names = ("f1", "accuracy", "precision", "recall", "yes_ratio")
        assert line == ", ".join(f"{result.rates[name]:.3f}" for name in names)
    lmms = score_pope(questions, answers, parser="lmms")
    for name, value in expected.get("lmms_eval_0.7.3", {}).items():
        name = name.removeprefix("pope_")
        assert lmms.rates[LMMS_NAMES.get(name, name)] == pytest.approx(value, rel=1e-12), name
