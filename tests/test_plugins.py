"""Policies and families from outside: registered, by entry point, by module and class; mistakes are said at once."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from tests.models import prompt, shared
from vlm_prune import (
    ADAPTERS,
    POLICIES,
    PolicyError,
    UnsupportedModelError,
    prune,
    pruned,
    register_family,
    register_policy,
)
from vlm_prune.cli import app
from vlm_prune.contract.policy import Keep, Policy, ScorerPolicy, SelectPolicy
from vlm_prune.registry import load_plugins

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    policies, adapters = dict(POLICIES), dict(ADAPTERS)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with torch.no_grad():
        yield
    for table, before in ((POLICIES, policies), (ADAPTERS, adapters)):
        table.clear()
        table.update(before)
    sys.modules.pop("my_policy", None)


@dataclass(frozen=True)
class Fine(ScorerPolicy):
    """The first tokens."""

    name: ClassVar[str] = "fine"
    place: ClassVar[str] = "features"

    def score(self, view):
        return -torch.arange(view.features.shape[1]).float().expand(view.features.shape[:2])


class NotADataclass(Policy):
    name, stages = "x", ("encode",)


@dataclass
class NotFrozen:
    name: ClassVar[str] = "x"


@dataclass(frozen=True)
class NoName(Policy):
    stages: ClassVar[tuple[str, ...]] = ("encode",)


@dataclass(frozen=True)
class NoStages(Policy):
    name: ClassVar[str] = "x"


@dataclass(frozen=True)
class Vision(Policy):
    name: ClassVar[str] = "x"
    stages: ClassVar[tuple[str, ...]] = ("vision",)


@dataclass(frozen=True)
class NoMethod(Policy):
    name: ClassVar[str] = "x"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)

    def prefill_layers(self, depth):
        return (0,)


@dataclass(frozen=True)
class NoScore(ScorerPolicy):
    name: ClassVar[str] = "x"
    place: ClassVar[str] = "projected"


@dataclass(frozen=True)
class NoLayer(ScorerPolicy):
    name: ClassVar[str] = "x"
    place: ClassVar[str] = "layer"

    def score(self, view):
        return view.hidden[..., 0]


@dataclass(frozen=True)
class NoPlace(SelectPolicy):
    name: ClassVar[str] = "x"


WRONG = {
    "a function": (lambda: None, "is not a policy class"),
    "another class": (NotFrozen, "NotFrozen is not a policy class"),
    "no dataclass": (NotADataclass, "not a frozen dataclass"),
    "no name": (NoName, "has no name"),
    "no stages": (NoStages, "has no stages"),
    "unknown stage": (Vision, "stage 'vision' is none of encode, entry, prefill, decode, modulate"),
    "no method": (NoMethod, "prefill stage but has no method prefill"),
    "no score": (NoScore, "no method score"),
    "no layer": (NoLayer, "no method layer"),
    "no place": (NoPlace, "has no place"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_at_registration(case):
    policy, message = WRONG[case]
    with pytest.raises(PolicyError, match=message):
        register_policy("outside", policy)
    assert "outside" not in POLICIES


@pytest.mark.parametrize("case", [name for name in WRONG if name not in ("a function", "another class")])
def test_and_at_prune(case):
    policy, message = WRONG[case]
    with pytest.raises(PolicyError, match=message):
        prune(shared("llava"), policy())


def test_an_unknown_place_is_no_class():
    with pytest.raises(TypeError, match="place='vision' is none of tower"):
        type("Odd", (ScorerPolicy,), {"place": "vision"})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda view: view.features, r"fine.score returned \(1, 36, 32\)"),
        (lambda view: [1.0], "fine.score returned list"),
        (lambda view: view.features[:, :3, 0], r"a tensor \(1, 36\) is needed"),
    ],
)
def test_wrong_scores_are_refused_at_the_first_call(answer, message):
    policy = type("Wrong", (Fine,), {"score": lambda self, view: answer(view)})
    policy = dataclass(frozen=True)(policy)
    model, batch = shared("llava"), prompt("llava", [(3, -1, 5)])
    with pruned(model, policy(), ratio=0.25), pytest.raises(PolicyError, match=message):
        model(**batch.inputs)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda view: torch.ones(1, 9), "answers with a Tensor"),
        (lambda view: Keep(torch.arange(12)[None]), "keeps 12 of 36 visual tokens, and its budget is 9"),
        (lambda view: Keep(torch.arange(9.0)[None]), "torch.float32"),
        (lambda view: Keep(torch.arange(9).expand(2, -1)), r"\(2, 9\)"),
    ],
)
def test_wrong_choices_are_refused_at_the_first_call(answer, message):
    members = {"select": lambda self, view: answer(view), "place": "features", "name": "odd"}
    policy = dataclass(frozen=True)(type("Odd", (SelectPolicy,), members))
    model, batch = shared("llava"), prompt("llava", [(3, -1, 5)])
    with pruned(model, policy(), ratio=0.25), pytest.raises(PolicyError, match=message):
        model(**batch.inputs)


def test_a_name_is_taken_once_unless_told_otherwise():
    register_policy("fine", Fine)
    with pytest.raises(PolicyError, match="exists already"):
        register_policy("fine", Fine)
    register_policy("uniform", Fine, overwrite=True)
    model = shared("llava")
    with pruned(model, "uniform", tokens=4):
        model(**prompt("llava", [(3, -1, 5)]).inputs)
        assert model.pruning.receipt.kept == [[0, 1, 2, 3]]
    with pytest.raises(PolicyError, match="a name of letters"):
        register_policy("a+b", Fine)


def test_families():
    register_family("my_llava", "vlm_prune.adapters.llava:anatomy")
    with pytest.raises(UnsupportedModelError, match="has an adapter already"):
        register_family("llava", lambda model: None)
    with pytest.raises(UnsupportedModelError, match="module:function"):
        register_family("other", 3)  # type: ignore[arg-type]


def test_by_module_and_class_and_back_from_a_config():
    model = shared("llava")
    with pruned(model, "my_policy:Contrast", tokens=9):
        want = model(**prompt("llava", [(3, -1, 5)]).inputs).logits
        config = model.pruning.config
    with pruned(model, config=config):
        assert torch.equal(model(**prompt("llava", [(3, -1, 5)]).inputs).logits, want)
    with pytest.raises(PolicyError, match="cannot be imported"):
        prune(model, "my_policy:Nothing")
    with pytest.raises(PolicyError, match="cannot be imported"):
        prune(model, "no_such_module:Policy")


def test_entry_points_never_break_the_lists(monkeypatch):
    points = [
        importlib.metadata.EntryPoint("outside", "my_policy:Contrast", "vlm_prune.policies"),
        importlib.metadata.EntryPoint("broken", "no_such_module:Policy", "vlm_prune.policies"),
        importlib.metadata.EntryPoint("flowcut", "my_policy:Contrast", "vlm_prune.policies"),
        importlib.metadata.EntryPoint("their_vlm", "my_policy:anatomy", "vlm_prune.adapters"),
    ]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [p for p in points if p.group == group]
    )
    trouble = load_plugins()
    assert POLICIES["outside"] == "my_policy:Contrast"
    assert "broken" not in POLICIES
    assert POLICIES["flowcut"] == "vlm_prune.policies.flowcut:FlowCut"
    assert len(trouble) == 2
    assert any("no_such_module" in sentence for sentence in trouble)
    listed = CliRunner().invoke(app, ["policies"]).output
    assert "outside" in listed
    assert "broken" in listed
    assert "their_vlm" in CliRunner().invoke(app, ["families"]).output


def test_a_yaml_names_a_plugin_and_its_policy(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(
        f"""
plugins: [my_policy]
models: [tiny-llava]
policies: [contrast, "my_policy:Contrast"]
ratios: [0.25]
tasks: [{{task: pope, data: {{scenes: 2}}}}]
output: {tmp_path / "out"}
"""
    )
    done = CliRunner().invoke(app, ["run", str(run)])
    assert done.exit_code == 0, done.output
    results = (tmp_path / "out" / "results.json").read_text()
    assert '"contrast"' in results
    assert "my_policy:Contrast" in results
    asked = CliRunner().invoke(app, ["--plugin", "no_such_plugin", "policies"])
    assert asked.exit_code == 2
    assert "no_such_plugin" in asked.output
