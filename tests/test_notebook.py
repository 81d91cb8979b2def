"""The notebook runs offline from its first cell to its last, and is committed without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "examples" / "first_steps.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        code = compile("".join(cell["source"]), f"{PATH.name}, code cell {number}", "exec", dont_inherit=True)
        exec(code, namespace)
    printed = capsys.readouterr().out
    assert "kept 64 of 256 visual tokens per image" in printed
    assert re.search(r"^flowcut 64$", printed, re.MULTILINE)
    assert namespace["again"].pruning.name == "flowcut"


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


@pytest.mark.parametrize(
    "cell", [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"], ids=lambda c: c["id"]
)
def test_links_lead_somewhere(cell):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", "".join(cell["source"])):
        assert (PATH.parent / target).exists(), target
