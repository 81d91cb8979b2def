"""Fill the generated parts of docs/policies.md: ``python -m vlm_prune.eval.policy_pages``.

The prose of the page is written by hand, in the page. Between ``<!-- kind:policy -->`` and ``<!-- end -->`` stands what
is read off the code and off the measured rows, so that it cannot drift; a test compares.
``--pictures`` draws the pictures again.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_prune.cli import policies_table, policy_facts
from vlm_prune.contract.policy import Policy
from vlm_prune.eval.policy_standing import standing
from vlm_prune.eval.records import read_json
from vlm_prune.eval.runs.table import markdown
from vlm_prune.registry import ALIASES, POLICIES, policy_class
from vlm_prune.support import markdown as families_table

README = Path("README.md")
PAGE = Path("docs/policies.md")
RESULTS = Path("docs/results.json")
"""The measured lines."""

MARKED = re.compile(r"<!-- (\w+):(\w+) -->\n.*?<!-- end -->", re.DOTALL)

Rows = Sequence[dict[str, Any]]


def contents(name: str, rows: Rows) -> str:
    """The table that opens the page."""
    lines = ["| policy | acts in | what it does |", "| --- | --- | --- |"]
    for fact in policy_facts():
        lines.append(f"| [`{fact.name}`](#{fact.name}) | {fact.stages} | {plain(fact.summary)} |")
    return "\n".join(lines)


def facts(name: str, rows: Rows) -> str:
    """Stages, default budget, paper and file of a policy, in one line."""
    fact = next(fact for fact in policy_facts() if fact.name == name)
    cls = policy_class(name)
    file = cls.__module__.rsplit(".", 1)[1] + ".py"
    paper = re.sub(r"arXiv (\S+)", r"[arXiv \1](https://arxiv.org/abs/\1)", fact.paper)
    keeps = f"keeps {fact.default_ratio} by default" if cls.default_ratio < 1 else "drops nothing by default"
    parts = [f"Stages: {fact.stages}", keeps, paper, f"[`policies/{file}`](../policies/{file})"]
    also = [f"`{alias}`" for alias, target in ALIASES.items() if target == name]
    return " · ".join([*parts, *([f"also called {', '.join(also)}"] if also else [])])


def fields(name: str, rows: Rows) -> str:
    """A policy's fields with defaults, and what the docstrings say of them."""
    cls = policy_class(name)
    known = described(Policy) | described(cls)
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    own = [field for field in dataclasses.fields(cls) if field.name != "positions"]
    for field in [*own, *(f for f in dataclasses.fields(cls) if f.name == "positions")]:
        if field.name not in known:
            raise ValueError(
                f"{cls.__name__}.{field.name}: its class docstring has no entry under Attributes"
            )
        meaning = known[field.name].replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{shown(field.default)}` | {meaning} |")
    return "\n".join(lines)


def described(cls: type) -> dict[str, str]:
    """The entries below "Attributes:" in a class docstring, each on one line."""
    _, _, text = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\w+: )", "\n" + text)[1:]:
        name, _, meaning = entry.strip().partition(": ")
        found[name] = plain(" ".join(meaning.split()))
    return found


def shown(value: Any) -> str:
    """A default as it is typed, floats cut to four digits."""
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def notes(name: str, rows: Rows) -> str:
    """What the class docstring says between its first line and its fields."""
    text = (inspect.getdoc(policy_class(name)) or "").partition("Attributes:\n")[0]
    body = re.sub(r":\n(?=- )", ":\n\n", text.partition("\n")[2].strip())
    return plain(body) or "A baseline of this package: nothing was released that it could differ from."


def plain(text: str) -> str:
    """Docstring quotes as Markdown's."""
    return text.replace("``", "`")


def measured(name: str, rows: Rows) -> str:
    """The rows of the results in which a policy takes part, and how it stands beside the baselines."""
    mine = [row for row in rows if name in members(row)]
    if not mine:
        return "Not measured yet: the results hold no row of it."
    models = list(dict.fromkeys(row["model"] for row in mine))
    mine.sort(key=lambda row: models.index(row["model"]))
    tables = re.sub(r"^## (.*)$", r"On \1:", markdown(mine), flags=re.MULTILINE).strip()
    said = standing(name, [row for row in mine if members(row) == [name]], rows)
    return "\n\n".join([tables, *said])


def members(row: dict[str, Any]) -> list[str]:
    """The policies behind a row's label, such as ``"flowcut+vhr"`` or ``"dyvte exit_layer=4"``."""
    label: str = row["policy"]
    return [ALIASES.get(name, name) for name in label.split()[0].split("+")]


KINDS: dict[str, Callable[[str, Rows], str]] = {
    "contents": contents,
    "facts": facts,
    "fields": fields,
    "notes": notes,
    "measured": measured,
}


def filled(page: str, rows: Rows) -> str:
    """``page`` with every marked part written anew. Raises ValueError for a mark that is not known."""

    def block(found: re.Match[str]) -> str:
        kind, name = found.groups()
        if kind not in KINDS or name not in (*POLICIES, "all"):
            raise ValueError(f"<!-- {kind}:{name} -->: the kinds are {', '.join(KINDS)}, the names policies")
        return f"<!-- {kind}:{name} -->\n{KINDS[kind](name, rows)}\n<!-- end -->"

    return MARKED.sub(block, page)


def tables(page: str) -> str:
    """``page`` with the tables of policies and families written anew, as the command line prints them."""
    shown = {"policies": policies_table, "families": families_table}

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{shown[found[2]]()}\n<!-- end -->"

    marks = r"(<!-- vlm-prune (policies|families) --markdown -->)\n.*?<!-- end -->"
    return re.sub(marks, block, page, flags=re.DOTALL)


def load_rows(path: Path | None = None) -> list[dict[str, Any]]:
    """Lines of ``path``, by default of `RESULTS`; none if there is none."""
    path = path or (RESULTS if RESULTS.exists() else None)
    rows: list[dict[str, Any]] = [] if path is None else read_json(path)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to fill in place")
    parser.add_argument("--results", type=Path, help=f"measured lines; default {RESULTS}")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures too, beside the page")
    parser.add_argument("--policy", action="append", choices=list(POLICIES), help="draw this one only")
    arguments = parser.parse_args()
    page: Path = arguments.page
    rows = load_rows(arguments.results)
    page.write_text(filled(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    sys.stdout.write(f"{page}: filled, {len(rows)} measured rows\n")
    if README.exists():
        README.write_text(tables(README.read_text(encoding="utf-8")), encoding="utf-8")
        sys.stdout.write(f"{README}: tables of policies and families\n")
    if arguments.pictures:
        from vlm_prune.eval.policy_pictures import draw_all

        for path in draw_all(page.with_suffix(""), arguments.policy or list(POLICIES)):
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
