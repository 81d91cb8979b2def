"""Imports point one way: contract and kernels at the ground, then the engine, then learning and evaluation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "vlm_prune": "vlm_prune",
    "policies": "vlm_prune.policies",
    "adapters": "vlm_prune.adapters",
    "eval": "vlm_prune.eval",
}


def _files() -> Iterator[tuple[str, bool, Path]]:
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            if any(parent.is_symlink() for parent in (path, *path.parents)):
                continue
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            yield ".".join(p for p in parts if p != "__init__"), path.stem == "__init__", path


@cache
def arrows() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, lazily or for types alone included."""
    modules = {name: (package, path) for name, package, path in _files()}
    found: dict[str, set[str]] = {}
    for name, (package, path) in modules.items():
        home = name.split(".") if package else name.split(".")[:-1]
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = home[: len(home) - node.level + 1] if node.level else []
                start = ".".join([*base, *([node.module] if node.module else [])])
                inner = {f"{start}.{alias.name}" for alias in node.names}
                targets |= {x if x in modules else start for x in inner}
        found[name] = {x for x in targets if x in modules and x != name}
    return found


def room(module: str) -> str:
    """The folder, or the file directly in ``vlm_prune/``, that a module lies in."""
    return ".".join(module.split(".")[:2])


def pairs() -> list[tuple[str, str]]:
    """All arrows, as pairs."""
    return [(a, b) for a, targets in arrows().items() for b in targets]


def test_the_graph_is_read():
    assert len(arrows()) > 120
    assert "vlm_prune.contract.policy" in arrows()["vlm_prune.session"] | arrows()["vlm_prune.composition"]


def test_no_import_circle():
    seen: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in seen:
            for target in sorted(arrows()[module]):
                visit(target, (*way, module))
            seen[module] = len(seen)

    for module in arrows():
        visit(module, ())


@pytest.mark.parametrize(
    ("home", "allowed"),
    [
        ("vlm_prune.kernels", set()),
        ("vlm_prune.contract", {"vlm_prune.errors"}),
        ("vlm_prune.policies", {"vlm_prune.contract", "vlm_prune.kernels", "vlm_prune.errors"}),
        ("vlm_prune.adapters", {"vlm_prune.contract", "vlm_prune.errors"}),
        ("vlm_prune.call", {"vlm_prune.contract", "vlm_prune.kernels", "vlm_prune.errors"}),
    ],
)
def test_the_ground_floor_knows_nothing_above_it(home, allowed):
    below = {home, *allowed}
    assert not [(a, b) for a, b in pairs() if room(a) == home and room(b) not in below]


def test_the_engine_knows_no_policy_and_no_evaluation():
    above = ("vlm_prune.eval", "vlm_prune.cli", "vlm_prune.__main__")
    plugged = {"vlm_prune.policies", "vlm_prune.adapters"}
    engine = [(a, b) for a, b in pairs() if not a.startswith(above)]
    assert not [(a, b) for a, b in engine if b.startswith(above)]
    assert not [(a, b) for a, b in engine if room(b) in plugged and room(a) != room(b)]


def test_nobody_compares_the_names_of_stages():
    asked = "vlm_prune.contract.stages", "vlm_prune.contract.checks"
    compared = [
        (name, node.lineno)
        for name, _, path in _files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and name not in asked
        if any(isinstance(part, ast.Attribute) and part.attr == "stages" for part in ast.walk(node))
    ]
    assert not compared


def test_few_files_stand_directly_in_the_package():
    assert len(list((ROOT / "vlm_prune").glob("*.py"))) <= 14
