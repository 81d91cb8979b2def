"""ZOO-Prune against loops and derivatives, and the projector as policies may call it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models import LAYOUTS, make, prompt
from tests.reference_encode import zooprune_units
from tests.test_diversity import KINDS, UNITS, tiles
from vlm_prune import pruned
from vlm_prune.contract.views import FeaturesView
from vlm_prune.encode.projection import Projection
from vlm_prune.policies.zooprune import (
    ZOOPrune,
    low_rank,
    random_directions,
    sensitive_and_diverse,
    sensitivity,
)


def projector(width: int = 10, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, 8)).to(dtype).requires_grad_(False)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, UNITS - 1))
def test_is_the_loop_of_the_paper(seed, keep):
    features, _ = tiles(seed)
    scores = torch.rand(3, UNITS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = sensitive_and_diverse(features, scores, keep)
    for b, x in enumerate(features):
        assert sorted(order[b].tolist()) == zooprune_units(scores[b].tolist(), x, keep)


def test_sensitivity_is_the_length_of_the_derivative():
    features, project = tiles(1)[0], projector().double()
    u = random_directions(7, 10, seed=3).double()
    ours = sensitivity(features, u, project, 1e-4)
    for b, i in ((0, 0), (2, 5)):
        jacobian = torch.func.jacrev(project)(features[b, i])
        torch.testing.assert_close(ours[b, i], (jacobian @ u.T).norm(dim=0).mean(), rtol=1e-5, atol=0)


def test_directions_depend_on_the_seed_alone():
    u = random_directions(5, 12, seed=4)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(5))
    assert torch.equal(u, random_directions(5, 12, seed=4))
    assert not torch.equal(u, random_directions(5, 12, seed=5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("scores", ["equal", "random"])
def test_nothing_is_taken_twice(kind, official, scores):
    features, _ = tiles(2, kind=kind)
    given = torch.ones(3, UNITS) if scores == "equal" else torch.rand(3, UNITS)
    for keep in range(1, UNITS + 1):
        taken = sensitive_and_diverse(features, given.double(), keep, official)
        assert all(len(set(row)) == keep for row in taken.tolist())


def test_full_rank_is_the_whole_layer():
    weight = torch.randn(6, 9, dtype=torch.float64)
    first, second = low_rank(weight, 6)
    torch.testing.assert_close(second @ first, weight)
    first, second = low_rank(weight, 2)
    assert first.shape == (2, 9)
    assert torch.linalg.matrix_rank(second @ first) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_fp32(dtype):
    """The same weights and features in fp32 give the same choice; in half precision the push is rounded away."""
    features = tiles(3)[0].to(dtype)
    half, single = projector(dtype=dtype), projector(dtype=dtype).float()

    def ask(project, x, **changes):
        view = FeaturesView(x, (4, 6), 8, torch.zeros(3), None, {}, Projection(project))
        return ZOOPrune(directions=16, step=1e-3, **changes).encode_final(view).index

    assert torch.equal(ask(half, features), ask(single, features.float()))
    assert not torch.equal(ask(half, features, compat="official"), ask(half, features))
    assert next(half.parameters()).dtype == dtype, "the model's own weights stay as they are"


def test_a_projection_passes_by_hooks():
    module, called = projector(dtype=torch.bfloat16), []
    module.register_forward_hook(lambda *_: called.append("outer"))
    module[0].register_forward_pre_hook(lambda *_: called.append("inner"))
    x = torch.randn(2, 5, 10)
    ours = Projection(module)(x)
    assert ours.dtype == torch.float32
    assert not called
    torch.testing.assert_close(ours, projector(dtype=torch.bfloat16).float()(x))
    assert Projection(module)(x.bfloat16()).dtype == torch.bfloat16
    assert called == ["inner"], "in its own dtype the module itself is called, past its own hooks alone"


def test_an_offloaded_projector_is_called_as_it_is():
    module = projector(dtype=torch.bfloat16)
    own = module[0].forward
    module[0].forward = lambda x: own(x)  # as accelerate does, which loads weights there
    x = torch.randn(2, 5, 10)
    expected = projector(dtype=torch.bfloat16)(x.bfloat16()).float()
    torch.testing.assert_close(Projection(module)(x), expected)


def test_merged_patches_are_pushed_together():
    module = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 12)), nn.Linear(12, 7))
    x = torch.randn(1, 5, 12)
    ours = Projection(module, pieces=4)(x)
    torch.testing.assert_close(ours, module[2](x))


@torch.no_grad()
def test_the_seed_changes_the_choice_and_nothing_else_does():
    model, batch = make("llava"), prompt("llava", LAYOUTS["single"])
    kept = []
    for seed in (0, 0, 1):
        with pruned(model, ZOOPrune(directions=2, seed=seed), tokens=9):
            model(**batch.inputs)
            kept.append(model.pruning.receipt.kept)
    assert kept[0] == kept[1] != kept[2]


def test_settings():
    for wrong in ({"directions": 0}, {"seed": -1}, {"step": 0}, {"directions": 2.0}, {"compat": "paper"}):
        with pytest.raises(ValueError, match="choose"):
            ZOOPrune(**wrong)
