"""The documentation site has every page, and its links lead somewhere; `make docs` builds it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def listed(part) -> list[str]:
    """The pages of a part of the navigation."""
    if isinstance(part, str):
        return [part]
    values = part.values() if isinstance(part, dict) else part
    return [page for value in values for page in listed(value)]


def test_every_page_of_docs_is_in_the_navigation():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(listed(SITE["nav"])), "name the page in mkdocs.yml"
    assert SITE["strict"] is True


def test_every_name_of_the_reference_is_there():
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, last = name.rpartition(".")
            found = importlib.import_module(module)
            assert hasattr(found, last) or importlib.import_module(name), f"{page.name}: {name}"
