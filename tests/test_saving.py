"""Settings as JSON, and what is saved of a pruned model: stock weights, and one file that says how it was pruned."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import torch

import vlm_prune
from tests.models import FAMILIES, LAYOUTS, make, prompt
from tests.policy_table import TABLE, options
from tests.refusal import refuses
from vlm_prune import PolicyError, prune, pruned, register_policy, unprune
from vlm_prune.contract.policy import Keep, Policy
from vlm_prune.policies.flowcut import FlowCut
from vlm_prune.policies.vhr import VHR
from vlm_prune.registry import POLICIES

STOCK_FILES = {"config.json", "generation_config.json", "model.safetensors"}
COMPOSITIONS = [*TABLE, "flowcut+vhr", "uniform+fastv+paint"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def answers(model, family="llava"):
    batch = prompt(family, LAYOUTS["ragged"])
    return model(**batch.inputs).logits, model.generate(**batch.inputs, max_new_tokens=3)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy", COMPOSITIONS)
def test_config_goes_through_json(policy):
    model = make("llava")
    with pruned(model, **options(policy)):
        config, policies, budget = model.pruning.config, model.pruning.policies, model.pruning.budget
        want = answers(model)
    text = json.dumps(config)
    with pruned(model, config=json.loads(text)):
        assert model.pruning.policies == policies
        assert model.pruning.budget == budget
        assert json.dumps(model.pruning.config) == text
        assert_same(answers(model), want)


@pytest.mark.parametrize("budget", [{"tokens": 9}, {"ratio": 0.4}, {}])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("compat", [None, "official"])
def test_config_names_every_setting(compat, positions, budget):
    model = make("llava")
    with pruned(model, "flowcut", **budget, positions=positions, compat=compat):
        config = model.pruning.config
    kept = budget or {"ratio": FlowCut.default_ratio}
    assert config == {
        "version": 1,
        "policy": "flowcut",
        **kept,
        "settings": {"positions": positions, "compat": compat},
    }


def test_config_of_policy_objects():
    model = make("llava")
    with pruned(model, [FlowCut(compat="official"), VHR(layers=(1,))], tokens=7):
        config = json.loads(json.dumps(model.pruning.config))
    assert config["policy"] == "flowcut+vhr"
    assert config["settings"]["vhr"]["layers"] == [1]
    with pruned(model, config=config):
        assert model.pruning.config == config
        assert [(type(p), p.compat) for p in model.pruning.policies[:1]] == [(FlowCut, "official")]
        assert model.pruning.policies[1].layers == (1,)


@dataclass(frozen=True)
class Loudest(Policy):
    name: ClassVar[str] = "loudest"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 0.25

    powers: tuple[float, ...] = (2.0,)

    def encode_final(self, view) -> Keep:
        return Keep.top(view.features.norm(self.powers[0], dim=-1), view.target)


def test_config_of_a_policy_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setattr("vlm_prune.registry.POLICIES", dict(POLICIES))
    model = make("llava")
    prune(model, Loudest(powers=(1.0,)), tokens=5)
    # one that can be imported is named by its module and class
    assert model.pruning.config["policy"] == f"{__name__}:Loudest"
    unprune(model)

    @dataclass(frozen=True)
    class Hidden(Loudest):
        pass

    prune(model, Hidden(powers=(1.0,)), tokens=5)
    with pytest.raises(PolicyError, match=r'Hidden is not registered.*register_policy\("loudest", Hidden\)'):
        _ = model.pruning.config
    with pytest.raises(PolicyError, match="not registered"):
        model.save_pretrained(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    unprune(model)
    prune(model, Loudest(powers=(1.0,)), tokens=5)
    register_policy("loudest", Loudest)
    want = answers(model)
    model.save_pretrained(tmp_path)
    loaded = vlm_prune.from_pretrained(tmp_path)
    assert [(type(p), p.powers) for p in loaded.pruning.policies] == [(Loudest, (1.0,))]
    assert_same(answers(adjusted(loaded)), want)


BAD_CONFIGS = {
    "other version": ({"version": 2, "policy": "uniform"}, ["version 2", "reads version 1"]),
    "no version": ({"version": None, "policy": "uniform"}, ["version None"]),
    "unknown key": ({"policy": "uniform", "token": 3}, ["'token'", 'Did you mean "tokens"']),
    "no policy": ({"ratio": 0.5}, ["not a pruning config", "policy"]),
    "unknown policy": ({"policy": "uniformm"}, ['Did you mean "uniform"']),
    "unknown setting": ({"policy": "uniform", "settings": {"sed": 1}}, ["sed", "positions"]),
    "budget among settings": (
        {"policy": "uniform", "settings": {"tokens": 3}},
        ["tokens", "next to settings"],
    ),
    "settings of another": ({"policy": "flowcut+vhr", "settings": {"alpha": 2}}, ["alpha", "by policy"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
@pytest.mark.parametrize("form", ["dict", "file", "folder"])
def test_bad_configs(form, case, tmp_path):
    config, words = BAD_CONFIGS[case]
    if form != "dict":
        path = tmp_path / "vlm_prune.json"
        path.write_text(json.dumps(config))
        config = path if form == "file" else tmp_path
    with refuses(model := make("llava"), PolicyError, *words):
        prune(model, config=config)
    with pytest.raises(PolicyError) as caught:
        vlm_prune.from_pretrained("no/such-model", config=config)  # found before anything is loaded
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("beside", [{"tokens": 3}, {"policy": "uniform"}, {"seed": 1}])
def test_nothing_stands_beside_a_config(beside):
    with refuses(model := make("llava"), PolicyError, "nothing beside it"):
        prune(model, config={"policy": "random"}, **beside)


@pytest.mark.parametrize("path", sorted(Path("examples/tuned").glob("*.json")), ids=lambda path: path.stem)
def test_tuned_settings_of_the_repository(path):
    with pruned(make("llava"), config=path) as model:
        assert model.pruning.config["policy"] == "vflowopt"
        assert model.pruning.config["settings"]["r_1"] == json.loads(path.read_text())["settings"]["r_1"]


def adjusted(model):
    """A loaded model with the settings of the tests' models that are not saved."""
    model.set_attn_implementation("sdpa")
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "stock")
    stock = answers(model, family)
    prune(model, "flowcut+vhr", ratio=0.3)
    want, config = answers(model, family), model.pruning.config
    model.save_pretrained(str(tmp_path / "ours"))
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {*STOCK_FILES, "vlm_prune.json"}
    for name in STOCK_FILES:
        ours, theirs = ((tmp_path / kind / name).read_bytes() for kind in ("ours", "stock"))
        assert ours == theirs, name
    assert json.loads((tmp_path / "ours" / "vlm_prune.json").read_text()) == config

    loaded = adjusted(vlm_prune.from_pretrained(tmp_path / "ours"))
    assert type(loaded) is type(model)
    assert loaded.pruning.config == config
    assert_same(answers(loaded, family), want)
    assert_same(answers(unprune(loaded), family), stock)
    for where in (tmp_path / "ours", str(tmp_path / "ours" / "vlm_prune.json")):
        with pruned(loaded, config=where):
            assert_same(answers(loaded, family), want)

    unprune(model)
    model.save_pretrained(tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} == STOCK_FILES


def test_loading_otherwise_than_it_was_saved(tmp_path):
    model = make("llava")
    with pruned(model, "uniform", tokens=8):
        model.save_pretrained(tmp_path)
    loaded = vlm_prune.from_pretrained(tmp_path, "random", tokens=5, dtype=torch.bfloat16)
    assert (loaded.pruning.name, loaded.pruning.budget.tokens, loaded.dtype) == ("random", 5, torch.bfloat16)
    loaded = vlm_prune.from_pretrained(tmp_path, policy=FlowCut())
    assert loaded.pruning.name == "flowcut"
    loaded = vlm_prune.from_pretrained(tmp_path, config={"policy": "pool", "ratio": 0.5})
    assert loaded.pruning.budget.ratio == 0.5
    with pytest.raises(PolicyError, match="give policy="):
        vlm_prune.from_pretrained(tmp_path, tokens=5)
    with pytest.raises(PolicyError, match="nothing beside it"):
        vlm_prune.from_pretrained(tmp_path, "uniform", config={"policy": "pool"})


def test_a_stock_folder_does_not_say_how_to_prune(tmp_path):
    make("llava").save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"has no vlm_prune.json.*policy="):
        vlm_prune.from_pretrained(tmp_path)
    assert vlm_prune.from_pretrained(tmp_path, "uniform").pruning.name == "uniform"


def test_only_the_main_process_writes(tmp_path):
    model = make("llava")
    with pruned(model, "uniform"):
        model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "vlm_prune.json").exists()


class Hub:
    """Stands in for the two calls of the hub's API by which transformers pushes; keeps what was uploaded."""

    def __init__(self, monkeypatch):
        self.files: dict[str, bytes] = {}
        api = huggingface_hub.HfApi
        repo = huggingface_hub.RepoUrl("https://hub.example/me/pruned", endpoint="https://hub.example")
        for place in (api, huggingface_hub):
            monkeypatch.setattr(place, "create_repo", lambda *_, **__: repo)
            monkeypatch.setattr(place, "create_commit", self.commit)
        for module in ("transformers.utils.hub", "transformers.modeling_utils"):
            for name in ("create_repo", "create_commit"):
                if hasattr(sys.modules[module], name):  # until they asked the API object
                    monkeypatch.setattr(f"{module}.{name}", getattr(huggingface_hub, name))
        monkeypatch.setattr(
            huggingface_hub.ModelCard, "load", lambda *_, **__: huggingface_hub.ModelCard("---\n---\n")
        )

    def commit(self, *_, operations, **__):
        self.files = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_pushing(way, tmp_path, monkeypatch):
    hub, model = Hub(monkeypatch), make("llava")
    prune(model, "uniform", tokens=6)
    if way == "push_to_hub":
        model.push_to_hub("me/pruned")
    else:
        model.save_pretrained(tmp_path)  # a file that is there already has to go too
        model.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="me/pruned")
    assert hub.files.keys() - {"README.md"} == {*STOCK_FILES, "vlm_prune.json"}
    assert json.loads(hub.files["vlm_prune.json"]) == model.pruning.config
    unprune(model)
    model.push_to_hub("me/pruned")
    assert hub.files.keys() - {"README.md"} == STOCK_FILES
