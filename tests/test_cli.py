"""The command line: every command answers, errors are one line, and the README's table is the registry's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm_prune.cli import ELSEWHERE, app
from vlm_prune.registry import ADAPTERS, POLICIES

ROOT = Path(__file__).parents[1]


def call(*arguments: str):
    return CliRunner().invoke(app, list(arguments), terminal_width=200)


def test_help_names_every_command():
    result = call("--help")
    assert result.exit_code == 0
    for command in ("demo", "policies", "families", *ELSEWHERE):
        assert command in result.output


@pytest.mark.parametrize("command", ["demo", *ELSEWHERE])
def test_every_command_has_help(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "--help" in result.output


def test_no_such_command():
    assert call("prune").exit_code == 2


def test_policies_and_families_are_those_of_the_registry():
    shown = call("policies").output
    assert all(re.search(rf"^ *{name} ", shown, re.MULTILINE) for name in POLICIES)
    assert all(name in call("families").output for name in ADAPTERS)


def test_readme_lists_the_policies_as_they_are():
    readme = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- vlm-prune policies --markdown -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    assert table, "the README has lost the marks around its table of policies"
    expected = call("policies", "--markdown").output
    assert table[1].strip() == expected.strip(), (
        "put the output of `vlm-prune policies --markdown` into the README"
    )


@pytest.mark.parametrize(
    "file", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(file):
    text = (ROOT / file).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text)
    assert links, f"{file} links to nothing, or its links are written in another way"
    for target, anchor in links:
        path = (ROOT / file).parent / target if target else ROOT / file
        assert path.exists(), f"{file} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{file} links to {target}#{anchor}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tinyllava"], "Did you mean 'tiny-llava'?"),
        (["--policy", "flowcutt"], 'Did you mean "flowcut"?'),
        (["--ratio", "0"], "above 0 and up to 1"),
        (["--scenes", "0"], "scenes=0: 4 or more is needed"),
    ],
)
def test_bad_input_is_one_line_before_any_compute(arguments, message, tmp_path):
    result = call("demo", "--out", str(tmp_path), *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["tune", "train-exit"])
def test_what_is_wrong_with_learning_is_one_line(command, tmp_path):
    result = call(
        command, "--model", "tiny-llava", "--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x")
    )
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


def test_pope_scores_files(tmp_path):
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    rows = [
        {"question_id": i, "text": "Is there a star?", "label": label}
        for i, label in enumerate(["yes", "no"])
    ]
    questions.write_text("\n".join(map(json.dumps, rows)))
    answers.write_text("\n".join(json.dumps({"question_id": i, "text": "Yes."}) for i in range(2)))
    result = call("pope", "--questions", str(questions), "--answers", str(answers), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["accuracy"] == 0.5


def test_cli_imports_no_evaluation():
    heavy = "('vlm_prune.eval', 'vlm_prune.serving', 'matplotlib', 'vllm')"
    code = f"import sys, vlm_prune.cli; print([m for m in sys.modules if m.startswith({heavy})])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_every_sub_package_is_in_the_wheel():
    packages = (ROOT / "pyproject.toml").read_text()
    for room in ("adapters", "policies", "eval"):
        for file in (ROOT / room).rglob("__init__.py"):
            name = ".".join(("vlm_prune", *file.parent.relative_to(ROOT).parts))
            assert f'"{name}"' in packages, f"pyproject.toml does not list {name}"
    for file in (ROOT / "vlm_prune").rglob("__init__.py"):
        name = ".".join(file.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in packages, f"pyproject.toml does not list {name}"
