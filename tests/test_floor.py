"""The smallest budget that keeps a floor: its bound, its order of trying, and a search on a shipped model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from typer.testing import CliRunner

from vlm_prune import prune, unprune
from vlm_prune.errors import BudgetError, PolicyError, StateError
from vlm_prune.eval.learn import floor as module
from vlm_prune.eval.learn.cli import app
from vlm_prune.eval.learn.data import Example, questions
from vlm_prune.eval.learn.floor import find_budget, images_needed, kept_bound
from vlm_prune.eval.measure import prompt_text
from vlm_prune.eval.models import load_model, model_path
from vlm_prune.eval.vqa import normalised

weights = pytest.mark.skipif(
    not (model_path("tiny-llava") / "model.safetensors").exists(),
    reason="the package was installed without the weights of the test models",
)


@pytest.mark.parametrize(("kept", "of"), [(10, 10), (7, 10), (1, 30), (290, 300)])
def test_the_bound_is_where_the_binomial_tail_has_the_level(kept, of):
    bound = kept_bound(kept, of, 0.05)
    assert binom.sf(kept - 1, of, bound) == pytest.approx(0.05)


def test_how_many_images_a_floor_needs():
    for floor, level in ((0.99, 0.05), (0.9, 0.025), (0.5, 0.2)):
        need = images_needed(floor, level)
        assert kept_bound(need, need, level) >= floor > kept_bound(need - 1, need - 1, level)


def test_a_bad_budget_seldom_passes():
    """Of searches on samples of which 10 % are really lost, at most 5 % claim a floor of 90.5 %."""
    kept = np.random.default_rng(0).binomial(200, 0.9, size=2000)
    assert np.mean([kept_bound(int(k), 200, 0.05) >= 0.905 for k in kept]) <= 0.05


class Oracle:
    """Stands in for asking: a policy loses the first ``lost[policy](ratio)`` images."""

    def __init__(self, monkeypatch, lost):
        self.asked: list[tuple[str, float]] = []

        def scores(model, processor, batch, metric, max_new_tokens):
            policy, ratio = model.pruning.name, model.pruning.budget.ratio
            if (policy, ratio) not in self.asked:
                self.asked.append((policy, ratio))
            gone = 0 if policy == "none" else lost[policy](ratio)
            for sample in batch:
                yield float(int(sample.answer) >= gone), int(100 * (ratio or 1)), 100

        monkeypatch.setattr(module, "_scores", scores)


@pytest.fixture
def model():
    from tests.models import make

    return make("llava")


def numbered(count: int) -> list[Example]:
    return [Example(Image.new("RGB", (2, 2)), "", str(number)) for number in range(count)]


def test_budgets_are_tried_downwards_until_one_fails(model, monkeypatch):
    oracle = Oracle(
        monkeypatch, {"uniform": lambda r: 0 if r >= 0.25 else 40, "random": lambda r: 0 if r >= 0.5 else 3}
    )
    found = find_budget(
        model, None, numbered(100), ["uniform", "random"], 0.95, ratios=(0.1, 0.5, 0.25, 0.05)
    )
    assert oracle.asked[1:] == [("uniform", r) for r in (0.5, 0.25, 0.1)] + [
        ("random", r) for r in (0.5, 0.25)
    ]
    assert (found.best.policy, found.best.ratio, found.best.kept) == ("uniform", 0.25, 100)
    assert found.best.bound == pytest.approx(0.025 ** (1 / 100))
    assert [one.passed for one in found.tried] == [True, True, False, True, False]
    assert found.config["policy"] == "uniform"
    assert found.config["about"]["floor"] == 0.95
    prune(model, config=found.config)
    assert model.pruning.budget.ratio == 0.25


def test_nothing_passes(model, monkeypatch, tmp_path):
    Oracle(monkeypatch, {"uniform": lambda r: 50})
    found = find_budget(model, None, numbered(100), ["uniform"], 0.9)
    assert found.best is None
    assert len(found.tried) == 1
    with pytest.raises(BudgetError, match="no budget kept the floor"):
        found.save(tmp_path / "config.json")


def test_questions_about_one_image_fall_together(model, monkeypatch):
    Oracle(monkeypatch, {"uniform": lambda r: 1})
    image = Image.new("RGB", (2, 2))
    shared = [Example(image, "", str(number)) for number in range(3)] + numbered(60)[3:]
    (tried,) = find_budget(model, None, shared, ["uniform"], 0.9, ratios=(0.5,)).tried
    assert (tried.images, tried.kept) == (58, 57)


def test_refusals(model):
    some = numbered(30)
    with pytest.raises(BudgetError, match="needs 299"):
        find_budget(model, None, some, ["uniform"], 0.99)
    with pytest.raises(BudgetError, match="floor=1"):
        find_budget(model, None, some, ["uniform"], 1.0)
    with pytest.raises(PolicyError, match="drops no tokens"):
        find_budget(model, None, some, ["vhr"], 0.9)
    with pytest.raises(PolicyError, match="metric"):
        find_budget(model, None, some, ["uniform"], 0.9, metric="bleu")
    with pytest.raises(PolicyError, match="each once"):
        find_budget(model, None, some, [], 0.9)
    prune(model, "uniform")
    with pytest.raises(StateError, match="unprune"):
        find_budget(model, None, some, ["uniform"], 0.9)


@weights
def test_a_search_on_a_shipped_model(tmp_path):
    """Counts of the search are those of asking the pruned model anew."""
    model, processor = load_model("tiny-llava")
    some = questions("tiny-llava", 12, 3)
    found = find_budget(model, processor, some, ["flowcut"], 0.5, ratios=(0.5, 0.1), max_new_tokens=4)
    assert getattr(model, "pruning", None) is None
    assert found.best is not None
    found.save(tmp_path / "config.json")
    right = {n for n, s in enumerate(some) if said(model, processor, s) == s.answer}
    prune(model, config=tmp_path / "config.json")
    kept = {n for n in right if said(model, processor, some[n]) == some[n].answer}
    unprune(model)
    assert (found.best.images, found.best.kept) == (len(right), len(kept))
    assert 0 < found.best.compute < 1


def said(model, processor, sample):
    text = prompt_text(processor, sample.question)
    inputs = processor(images=[sample.image], text=[text], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return normalised(new[0])


@weights
def test_the_command(tmp_path):
    out = tmp_path / "config.json"
    few = ["tune", "--out", str(out), "--samples", "8", "--floor"]
    done = CliRunner().invoke(
        app, [*few, "0.6", "--policy", "uniform", "--confidence", "0.8", "--max-new-tokens", "4"]
    )
    assert done.exit_code == 0, done.output
    assert "uniform ratio=0.75: 8 of 8 images kept" in done.output
    assert json.loads(out.read_text())["about"]["confidence"] == 0.8
    assert CliRunner().invoke(app, [*few, "0.99"]).exit_code != 0
    assert CliRunner().invoke(app, ["tune", "--out", str(out), "--policy", "uniform"]).exit_code != 0
