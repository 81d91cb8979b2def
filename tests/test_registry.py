"""Names, suggestions, policies of one's own, and what importing the package does not do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.models import LAYOUTS, prompt, shared
from tests.policy_table import TABLE
from vlm_prune import ADAPTERS, POLICIES, Keep, Policy, PolicyError, pruned, register_policy
from vlm_prune.contract.policy import STAGES
from vlm_prune.registry import did_you_mean, find_anatomy, make_policies, policy_class


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("flow_cut", ["flowcut", "random"], 'Did you mean "flowcut"? Available: flowcut, random.'),
        ("FlowCut", ["flowcut", "random"], 'Did you mean "flowcut"? Available: flowcut, random.'),
        ("qqq", ["flowcut", "random"], "Available: flowcut, random."),
        ("", ["b", "a"], "Available: a, b."),
    ],
)
def test_did_you_mean(name, known, hint):
    assert did_you_mean(name, known) == hint


@pytest.mark.parametrize("name", POLICIES)
def test_every_registered_policy_loads(name):
    cls = policy_class(name)
    assert issubclass(cls, Policy)
    assert cls.name == name
    assert 0 < cls.default_ratio <= 1
    assert cls.__doc__
    settings = TABLE[name].settings
    assert make_policies(name, settings) == (cls(**settings),)
    assert set(cls.stages) <= set(STAGES)


@pytest.mark.parametrize("family", ["llava", "llava-gqa", "llava-full", "internvl"])
def test_an_anatomy_names_parts_of_the_model(family):
    model = shared(family)
    anatomy = find_anatomy(model)
    assert anatomy.family in ADAPTERS
    modules = set(model.modules())
    parts = [anatomy.base, anatomy.projector, anatomy.decoder, anatomy.tower.module]
    assert modules.issuperset(
        parts + anatomy.decoder_layers + anatomy.tower.layers + anatomy.tower.attentions
    )
    assert (
        len(anatomy.tower.layers)
        == len(anatomy.tower.attentions)
        == model.config.vision_config.num_hidden_layers
    )
    assert anatomy.tower.units + int(anatomy.tower.keeps_cls) == model.config.image_seq_length


@pytest.fixture
def _forget():
    known = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(known)


@dataclass(frozen=True)
class First(Policy):
    """Keeps the first tokens: what a policy of one's own takes."""

    name: ClassVar[str] = "first"
    stages: ClassVar[tuple[str, ...]] = ("encode",)
    default_ratio: ClassVar[float] = 0.25

    skip: int = 0

    def encode_final(self, view):
        index = torch.arange(self.skip, self.skip + view.target, device=view.features.device)
        return Keep(index.expand(len(view.features), -1))


@pytest.mark.usefixtures("_forget")
@torch.no_grad()
def test_a_policy_of_ones_own():
    register_policy("first", First)
    model, batch = shared("llava"), prompt("llava", LAYOUTS["single"])
    with pruned(model, "first"):
        model(**batch.inputs)
        assert model.pruning.receipt.kept == [list(range(9))]
    with pruned(model, "first", tokens=4, skip=2):
        model(**batch.inputs)
        assert model.pruning.receipt.kept == [[2, 3, 4, 5]]
    with pruned(model, First(skip=1), tokens=2):
        model(**batch.inputs)
        assert model.pruning.receipt.kept == [[1, 2]]
    with pytest.raises(PolicyError, match=r'"first" exists already'):
        register_policy("first", First)
    with pytest.raises(PolicyError, match=r'Did you mean "skip"'), pruned(model, "first", skp=1):
        pass


def test_a_name_that_is_taken():
    with pytest.raises(PolicyError, match=r'"flowcut" exists already.*another name'):
        register_policy("flowcut", First)
    assert POLICIES["flowcut"] != First


IMPORT = """
import sys
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from torch.nn.modules import module
before = sorted(functions.keys())
import vlm_prune
ours = sorted(name for name in sys.modules if name.startswith("vlm_prune."))
assert sorted(functions.keys()) == before
assert not module._global_forward_hooks and not module._global_forward_pre_hooks
loaded = [name.split(".")[2] for name in ours if name.startswith(("vlm_prune.policies.", "vlm_prune.adapters."))]
print(*sorted(loaded))
assert not any(name.startswith("vlm_prune.eval") for name in ours)
"""


def test_importing_the_package_loads_no_policy_and_registers_nothing():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) <= {"base", "views"}


HEAVY = {
    *(
        "triton",
        "matplotlib",
        "typer",
        "rich",
        "sklearn",
        "skopt",
        "scipy",
        "pandas",
        "pydantic",
        "torchvision",
    ),
    *(
        "lmms_eval",
        "vllm",
        "datasets",
        "accelerate",
        "peft",
        "sympy",
        "torch._dynamo",
        "transformers.modeling_utils",
    ),
}
"""What takes long to import. The last ones are there as soon as a model is, so pruning it adds nothing."""


def test_importing_the_package_costs_little_more_than_transformers():
    code = "import sys, torch, transformers; stock = {*sys.modules}; import vlm_prune; print(*{*sys.modules} - stock)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vlm_prune.api" in run.stdout.split()
    assert not HEAVY & set(run.stdout.split())
