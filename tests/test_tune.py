"""The search for VFlowOpt's settings: bounds, resuming, refusals, and a small search on a stock model."""

from __future__ import annotations

import json

import pytest
import torch

from tests.models import make, prompt
from vlm_prune import prune, unprune
from vlm_prune.config import load_config
from vlm_prune.errors import BudgetError, PolicyError, StateError
from vlm_prune.eval.learn.search import Search, Study
from vlm_prune.eval.learn.tune import NAMES, last_hidden, search_space, similarity, tune
from vlm_prune.policies.shares import solve_last
from vlm_prune.policies.vflowopt import VFlowOpt

pytest.importorskip("skopt")

BOUNDS = [(0.0, 1.0), (-2.0, 2.0)]


def bowl(point: list[float]) -> float:
    return -((point[0] - 0.3) ** 2) - (point[1] - 1) ** 2


@pytest.fixture
def data():
    return [prompt("llava", [(3, -1, 4)], seed=seed).inputs for seed in range(3)]


@pytest.fixture
def fast():
    """Fields that make a search small."""
    return {"calls": 5, "initial": 4, "samples": 2, "progress": False, "alpha": 0.0}


def test_released_bounds():
    bounds = search_space(0.25, (9, 18), 28)
    assert bounds == [(0.25, 0.375), (0.2 / 0.375, 1.0), (0.0, 50.0), (3.0, 24.0), (-1.0, 1.0)]


@pytest.mark.parametrize("target", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("depth", [2, 3, 4, 7, 8, 28, 32])
def test_every_point_within_bounds_can_hold_the_budget(target, depth):
    policy = VFlowOpt()
    cuts = policy.cuts(depth)
    (_, most), (_, r_1), *_ = search_space(target, cuts, depth)
    assert most <= 1
    assert solve_last(target, most, r_1, cuts, depth) >= -1e-9
    VFlowOpt(r_v=most, r_1=r_1).entering_share(target, 1e-9)


def test_search_finds_a_maximum():
    search = Search(BOUNDS, seed=0, initial=8)
    for _ in range(14):
        point = search.ask()
        search.tell(point, bowl(point))
    point, value = search.best
    assert value == bowl(point) > -0.2


def test_study_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "deep" / "study.jsonl"
    study = Study.open(path, {"seed": 1})
    study.add([0.1, 0.2], 0.3)
    study.add([1 / 3, 2e-17], -0.5)
    with path.open("a") as file:
        file.write('{"point": [0.5, ')  # killed while writing
    again = Study.open(path, {"seed": 1})
    assert again.trials == study.trials
    again.add([1.0, 1.0], 1.0)
    assert len(Study.open(path, {"seed": 1}).trials) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": 2}\n', "seed: 2 there, 1 here"),
        ("", "not a study"),
        ("[1]\n", "not a study"),
        ("x", "not a study"),
    ],
)
def test_study_of_another_search_is_refused(tmp_path, text, said):
    path = tmp_path / "study.jsonl"
    path.write_text(text)
    with pytest.raises(StateError, match=said):
        Study.open(path, {"seed": 1})
    assert path.read_text() == text


def test_a_start_that_fails_is_not_in_the_way(tmp_path, data, fast):
    model, study = make("llava"), tmp_path / "study.jsonl"
    broken = model.model.vision_tower.register_forward_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune(model, data, 0.5, study=study, **fast)
    broken.remove()
    layer = model.model.language_model.layers[-1]
    late = layer.register_forward_hook(lambda *given: 1 / 0 if getattr(model, "pruning", None) else None)
    with pytest.raises(ZeroDivisionError):
        tune(model, data, 0.5, study=study, **fast)
    late.remove()
    assert not study.exists()
    other = tune(model, data, 0.25, study=study, **fast)
    assert other == tune(model, data, 0.25, **fast)
    assert len(study.read_text().splitlines()) == 1 + fast["calls"]


def test_interrupted_search_ends_as_if_never_interrupted(tmp_path, data, fast):
    model, study = make("llava"), tmp_path / "study.jsonl"
    whole = tune(model, data, 0.5, study=tmp_path / "whole.jsonl", **fast)
    tune(model, data, 0.5, study=study, **{**fast, "calls": 2})
    found = tune(model, data, 0.5, study=study, output=tmp_path / "config.json", **fast)
    assert found == whole
    assert study.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert 0 < found.similarity <= 1

    config = load_config(tmp_path / "config.json")
    assert set(config) == {"policy", "ratio", *NAMES}
    with torch.no_grad():
        truth = last_hidden(model.model, data[0])
        prune(model, **config)
        assert similarity(last_hidden(model.model, data[0]), truth) < 1
    with pytest.raises(StateError, match=r"target: 0\.5 there, 0\.25 here"):
        tune(unprune(model), data, 0.25, study=study, **fast)


def test_model_is_left_as_it_was(data, fast):
    model = make("llava").train()
    model.model.vision_tower.eval()
    modes = [m.training for m in model.modules()]
    tune(model, data, **{**fast, "calls": 1})
    assert [m.training for m in model.modules()] == modes
    assert not hasattr(model, "pruning")


def test_image_and_text_pairs_need_a_processor(data, fast):
    class Images:
        image_mean, image_std = [0.5] * 3, [0.4] * 3

    class Processor:
        image_processor = Images

        def __call__(self, images, text, return_tensors):
            assert text == "what is it"
            return data[images]

    pairs = [(0, "what is it"), (1, "what is it")]
    found = tune(make("llava"), pairs, processor=Processor(), **{**fast, "calls": 1})
    assert found.settings["image_std"] == (0.4, 0.4, 0.4)
    with pytest.raises(PolicyError, match="data holds a tuple"):
        tune(make("llava"), pairs, **fast)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"target": 1.5}, BudgetError, "target=1.5"),
        ({"data": []}, PolicyError, "0 prompts"),
        ({"r_2": 0.5}, PolicyError, "r_2 cannot be fixed"),
        ({"alfa": 0.5}, PolicyError, "alfa"),
        ({"alpha": 0.5}, PolicyError, "image_mean"),
        ({"calls": 0}, PolicyError, "calls=0"),
    ],
)
def test_bad_input_is_explained(data, fast, given, error, said):
    model = make("llava")
    with pytest.raises(error, match=said):
        tune(model, **{"data": data, **fast, **given})
    assert not hasattr(model, "pruning")


def test_pruned_model_is_refused(data, fast):
    with pytest.raises(StateError, match="unprune"):
        tune(prune(make("llava"), "uniform"), data, **fast)


def test_last_hidden_state_is_that_of_the_last_token():
    batch = prompt("llava", [(2, -1, 4), (1, -1, 2)], pad="right")
    model = make("llava")
    with torch.no_grad():
        together = last_hidden(model.model, {**batch.inputs, "labels": batch.ids})
        for b, row in enumerate(batch.rows()):
            torch.testing.assert_close(
                together[b], last_hidden(model.model, row.inputs)[0], atol=1e-4, rtol=1e-4
            )
            without = {k: v for k, v in row.inputs.items() if k != "attention_mask"}
            torch.testing.assert_close(
                together[b], last_hidden(model.model, without)[0], atol=1e-4, rtol=1e-4
            )


def test_nan_counts_nothing():
    truth = torch.ones(2, 3)
    assert similarity(torch.tensor([[2.0, 2, 2], [torch.nan, 0, 0]]), truth) == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["", "[]", '{"ratio": 0.5}', '{"policy": "x", "ratio": 1, "settings": 3}'])
def test_bad_config_is_explained(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match="not a pruning config"):
        load_config(path)


def test_config_is_plain_json(tmp_path, data, fast):
    tune(make("llava"), data, output=tmp_path / "c.json", **{**fast, "calls": 1})
    config = json.loads((tmp_path / "c.json").read_text())
    assert config["policy"] == "vflowopt"
    assert config["about"]["calls"] == 1
