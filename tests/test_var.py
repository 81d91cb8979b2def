"""VAR: what is a sink, which heads are edited, and where their attention goes."""

import pytest
import torch
from transformers import LlamaConfig

from tests.modulation import ACTIVE, DIM, WIDTH, view
from vlm_prune.policies.sinks import (
    KNOWN_SINK_DIMS,
    default_tau,
    find_sink_dims,
    first_token_dims,
    sink_score,
)
from vlm_prune.policies.var import DIMS, SINKS, VAR, redistribute, select_heads


def test_nobody_to_receive():
    probabilities = torch.rand(1, 2, 3, 5).softmax(-1)
    everything = torch.ones(1, 5, dtype=torch.bool)
    selected = select_heads(probabilities, everything, everything, max_sink_share=1, min_visual_mass=0)
    assert selected.all()
    assert torch.equal(redistribute(probabilities, everything, everything, selected, 0.4), probabilities)


@pytest.mark.parametrize("move", [0.0, 0.4, 1.0])
def test_redistributed_rows_sum_to_one(move):
    torch.manual_seed(1)
    probabilities = torch.randn(2, 4, 6, 10).softmax(-1)
    sinks, visual = torch.rand(2, 10) < 0.3, torch.rand(2, 10) < 0.6
    selected = torch.rand(2, 4, 6) < 0.5
    edited = redistribute(probabilities, sinks, visual, selected, move)
    torch.testing.assert_close(edited.sum(-1), torch.ones(2, 4, 6))
    assert torch.equal(edited[~selected], probabilities[~selected])
    if move == 1:
        moved = edited[selected & (visual & ~sinks).any(-1)[:, None, None]]
        assert moved.numel()
        assert edited.masked_select(sinks[:, None, None] & selected[..., None]).eq(0).all()


def test_var_never_tests_generated_tokens():
    v, policy = view(), ACTIVE["var"]
    policy.modulate(v)
    assert v.carry[SINKS].nonzero().tolist() == [[0, 0], [0, 2], [0, 3], [1, 2], [1, 3]]
    later = view(queries=1, keys=9, prefill=False, state=v.state, carry=v.carry)
    later.hidden[:, :, DIM] += 1000
    policy.modulate(later)
    assert later.carry[SINKS].sum() == 5


def test_var_finds_sinks_of_a_second_image():
    v, policy = view(), ACTIVE["var"]
    policy.modulate(v)
    carry = {name: torch.nn.functional.pad(x, (0, 9)) for name, x in v.carry.items()}
    second = view(keys=18, state=v.state, carry=carry)
    policy.modulate(second)
    assert second.carry[SINKS][0].nonzero()[:, 0].tolist() == [0, 2, 3, 9, 11, 12]


def test_text_sinks_alone_suffice_in_the_paper_only():
    attention = torch.tensor([0.6, 0.3, 0.1]).expand(1, 1, 1, 3)
    sinks, visual = torch.tensor([[True, False, False]]), torch.tensor([[False, True, True]])
    assert select_heads(attention, sinks, visual, 0.5, 0.2).all()
    assert not select_heads(attention, sinks, visual, 0.5, 0.2, official=True).any()


def test_tau_is_strict_in_the_released_code_only():
    v = view(batch=1)
    v.hidden[:] = 1
    v.hidden[0, 3, DIM] = 40
    score = sink_score(v.hidden, torch.tensor([[DIM]]))[0, 3].item()
    for compat, found in (("paper", 1), ("official", 0)):
        v.carry.pop(SINKS, None)
        VAR(tau=score, sink_dims=(DIM,), compat=compat).modulate(v)
        assert v.carry[SINKS].sum() == found


def test_last_layer_takes_part_in_the_released_code_only():
    assert list(VAR().modulate_layers(5)) == [2, 3]
    assert list(VAR(compat="official").modulate_layers(5)) == [2, 3, 4]


def test_unreachable_tau_warns_and_does_nothing():
    with pytest.warns(UserWarning, match=r"hidden size 64 no token can reach tau=20.*None for 2\.5"):
        assert VAR(tau=20).modulate(view()) is None


def test_default_tau_is_the_published_one_where_it_can_be_reached():
    assert [default_tau(width) for width in (4096, 1024, 160)] == [20, 20, 4]
    v = view()
    VAR().modulate(v)
    assert v.carry[SINKS].any()


def test_published_dims_are_used_for_their_models():
    for (model_type, width, inner), dims in KNOWN_SINK_DIMS.items():
        config = LlamaConfig(hidden_size=width, intermediate_size=inner)
        config.model_type = model_type
        assert max(dims) < width
        assert VAR().for_decoder(config).sink_dims == dims
        assert VAR(sink_dims=(0,)).for_decoder(config).sink_dims == (0,)
    assert VAR().for_decoder(LlamaConfig(hidden_size=64)).sink_dims is None
    with pytest.raises(ValueError, match="hidden size is 64"):
        VAR(sink_dims=(64,)).for_decoder(LlamaConfig(hidden_size=64))


def test_sink_dims_are_found_in_hidden_states():
    torch.manual_seed(0)
    layers = [torch.randn(2, 6, WIDTH) for _ in range(8)]
    assert find_sink_dims(layers, tau=5) == ()
    for hidden in layers[2:]:
        hidden[:, 0, [DIM, 30]] = torch.tensor([50.0, -80.0])
    layers[4][:, 0, 40] = 90  # one layer is not most of them
    assert find_sink_dims(layers, tau=4) == (30, DIM)
    with pytest.raises(ValueError, match=r"choose less than 8\.0"):
        find_sink_dims(layers, tau=20)


def test_first_token_shows_the_dims_behind_padding():
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, WIDTH)
    hidden[0, 0, DIM], hidden[1, 2, 30] = 50, -50
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False
    assert first_token_dims(hidden, 5, valid).tolist() == [[DIM, -1, -1], [30, -1, -1]]
    v = view()
    ACTIVE["var"].modulate(v)
    assert (v.state[DIMS] == -1).any()
