"""ACT and ZeroTuning against loops over whole attention maps."""

from __future__ import annotations

import pytest
import torch

from tests.modulation import HEADS, heads_of, naive_map, view
from vlm_prune.policies.act import ACT, calibrate
from vlm_prune.policies.zerotuning import ZeroTuning

FIRST = (0, 2)
"""The first real key of each sequence of `tests.modulation.view`."""


def naive_zerotuning(probabilities, policy):
    result = probabilities.clone()
    for b, first in enumerate(FIRST):
        for head in range(HEADS) if policy.heads is None else policy.heads:
            result[b, head, :, first] *= policy.gamma
            result[b, head] /= result[b, head].sum(-1, keepdim=True)
    return result


def naive_act(probabilities, seen, policy, alone, heads=range(HEADS)):
    """``seen`` ``(batch, queries)`` are real rows; ``alone`` judges each by itself."""
    result = probabilities.clone()
    batch, _, queries, keys = probabilities.shape
    for b, h, q in [(b, h, q) for b in range(batch) for h in heads for q in range(queries)]:
        row = result[b, h, q]
        sinks = torch.zeros(keys, dtype=torch.bool)
        for key in range(keys):
            rows = [r for r in range(queries) if seen[b, r] and r + keys - queries >= key]
            mean = row[key] if alone else sum(probabilities[b, h, r, key] for r in rows) / max(len(rows), 1)
            sinks[key] = key != FIRST[b] and mean > policy.threshold
        given, held = row[sinks].sum(), row[~sinks].sum()
        if held > 1e-20:
            row[~sinks] += (1 - policy.kept) * given * row[~sinks] / held
            row[sinks] *= policy.kept
    return result


def real_rows(got, want, seen):
    """Rows of padding hold nothing that anyone reads."""
    torch.testing.assert_close(got.double()[seen], want[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("heads", [None, (1, 6)])
def test_zerotuning_is_a_loop_over_the_map(kv_heads, heads):
    policy = ZeroTuning(gamma=0.3, heads=heads)
    for queries in (9, 2):
        one = view(queries=queries, kv_heads=kv_heads, prefill=queries == 9)
        want = heads_of(naive_zerotuning(naive_map(one), policy), one)
        real_rows(policy.modulate(one), want, one.valid[:, -queries:])
        left = [h for h in range(HEADS) if heads is not None and h not in heads]
        assert torch.equal(policy.modulate(one)[:, :, left], one.output[:, :, left])


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("heads", [None, ((2, 0), (2, 5), (1, 3))])
def test_act_is_a_loop_over_the_map(kv_heads, heads):
    policy = ACT(threshold=0.15, kept=0.3, heads=heads)
    mine = range(HEADS) if heads is None else (0, 5)  # the view is of layer 2
    changed = 0
    for queries in (9, 2):
        one = view(queries=queries, kv_heads=kv_heads, prefill=queries == 9)
        seen = one.valid[:, -queries:]
        want = heads_of(naive_act(naive_map(one), seen, policy, queries == 2, mine), one)
        real_rows(policy.modulate(one), want, seen)
        changed += int((want - one.output.double()).abs().amax() > 1e-3)
    assert changed == 2


def test_a_sequence_without_an_image_is_left_alone():
    one = view()
    one.visual[1] = False
    for policy in (ZeroTuning(gamma=3.0), ACT(threshold=0.1, kept=0.0)):
        new = policy.modulate(one)
        assert torch.equal(new[1], one.output[1])
        assert not torch.equal(new[0], one.output[0])


def test_what_sinks_lose_others_gain():
    row = torch.tensor([0.4, 0.4, 0.15, 0.05]).view(1, 1, 1, 4)
    sinks = torch.tensor([False, True, False, False])
    new = calibrate(row, sinks, 0.25)
    assert float(new.sum()) == pytest.approx(1)
    assert new.flatten().tolist() == pytest.approx([0.6, 0.1, 0.225, 0.075])
    assert torch.equal(calibrate(row, ~torch.zeros_like(sinks), 0.25), row)


def test_layers_and_heads_are_checked():
    assert list(ACT().modulate_layers(32)) == list(range(2, 31))
    assert ACT(heads=[[3, 1], [5, 0]]).modulate_layers(8) == {3, 5}
    with pytest.raises(ValueError, match="has 8 layers"):
        ACT(heads=((8, 0),)).modulate_layers(8)
    with pytest.raises(ValueError, match="has 8 layers"):
        ZeroTuning(layers=(8,)).modulate_layers(8)
    with pytest.raises(ValueError, match="has 8 attention heads"):
        ZeroTuning(heads=(8,)).modulate(view())
    with pytest.raises(ValueError, match="has 8 attention heads"):
        ACT(heads=((2, 8),)).modulate(view())
    with pytest.raises(ValueError, match="pairs"):
        ACT(heads=((1,),))
    with pytest.raises(ValueError, match="heads"):
        ZeroTuning(heads=())
