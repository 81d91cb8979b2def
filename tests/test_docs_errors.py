"""docs/errors.md has a section for every error class, with the meaning that its docstring gives."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import vlm_prune
from vlm_prune import errors

PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
CLASSES = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__
]
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_every_error_class_has_a_section_and_every_section_a_class():
    assert set(SECTIONS) == {kind.__name__ for kind in CLASSES}
    assert len(CLASSES) >= 6


def test_sections_say_what_the_class_says():
    for kind in CLASSES:
        text = SECTIONS[kind.__name__]
        bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        assert f"Derives from {bases}." in text
        meaning = " ".join(inspect.getdoc(kind).split())
        assert f"> {meaning}\n" in text, f"quote the docstring of {kind.__name__}: {meaning}"
        assert kind is errors.PruningError or "| message | what to do |" in text


def test_every_error_can_be_caught_by_its_public_name():
    assert {kind.__name__ for kind in CLASSES} <= set(vlm_prune.__all__)
