"""PAINT, VHR and VAR alike: identities, invariances, and a naive reference that builds whole attention maps."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaModel

from tests.modulation import (
    ACTIVE,
    DEPTH,
    DIM,
    HEADS,
    KV_HEADS,
    WIDTH,
    Sample,
    driver,
    gain_of,
    heads_of,
    naive_map,
    naive_var,
    outputs,
    view,
)
from vlm_prune.policies.paint import LOCAL, SUMMARY, Paint
from vlm_prune.policies.sinks import sink_score
from vlm_prune.policies.var import SINKS, VAR
from vlm_prune.policies.vhr import VHR, head_divergence, text_activation

IDLE = {
    "paint": replace(ACTIVE["paint"], alpha=0, beta=0),
    "vhr": replace(ACTIVE["vhr"], alpha=1),
    "var": replace(ACTIVE["var"], move=0),
}
METHODS = pytest.mark.parametrize("method", ACTIVE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=8,
        initializer_range=0.15,
    )
    return LlamaModel(config).eval()


# --- with a stock model ---


@METHODS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_idle_setting_is_the_stock_model(model, method, implementation):
    model.set_attn_implementation(implementation)
    try:
        stock = outputs(model, None, Sample(1))
        assert torch.allclose(outputs(model, IDLE[method], Sample(1)), stock, atol=1e-5)
        assert not torch.allclose(outputs(model, ACTIVE[method], Sample(1)), stock, atol=1e-2)
    finally:
        model.set_attn_implementation("sdpa")


@METHODS
def test_nothing_but_rows_behind_the_image_changes(model, method):
    sample, policy = Sample(1), ACTIVE[method]
    changed = (outputs(model, policy, sample) != outputs(model, None, sample)).any(-1)[0]
    first = {"paint": 19, "var": 12, "vhr": 0}[method]
    assert not changed[:first].any()
    assert changed[first:].all()


@METHODS
def test_ragged_left_padded_batch_equals_single_runs(model, method):
    samples = Sample(1, 20, 3, 12), Sample(2, 17, 2, 14), Sample(3, 20, 8, 11)
    batch = outputs(model, ACTIVE[method], *samples)
    for got, sample in zip(batch, samples, strict=True):
        alone = outputs(model, ACTIVE[method], sample)[0, -batch.shape[1] :]
        torch.testing.assert_close(got, alone, atol=2e-5, rtol=1e-4)


@METHODS
def test_right_padded_prompts_equal_single_runs(model, method):
    samples = Sample(1, 20, 3, 12), Sample(2, 17, 2, 14)
    run, embeds, mask = driver(model, ACTIVE[method], *samples, side="right")
    states = run(embeds, mask).last_hidden_state
    for got, sample in zip(states, samples, strict=True):
        alone = outputs(model, ACTIVE[method], sample)[0, : sample.embeds.shape[1]]
        torch.testing.assert_close(got[: len(alone)], alone, atol=2e-5, rtol=1e-4)


@METHODS
def test_a_sample_does_not_depend_on_another(model, method):
    policy = ACTIVE[method]
    fresh = outputs(model, policy, Sample(2))
    outputs(model, policy, Sample(1))
    assert torch.equal(outputs(model, policy, Sample(2)), fresh)
    first = outputs(model, policy, Sample(1), Sample(2))
    second = outputs(model, policy, Sample(5, start=7, end=18), Sample(2))
    assert torch.equal(first[1], second[1])


@METHODS
def test_drafts_verified_together_equal_single_steps(model, method):
    sample = Sample(1)
    together = outputs(model, ACTIVE[method], sample, together=True)
    torch.testing.assert_close(together, outputs(model, ACTIVE[method], sample), atol=1e-5, rtol=1e-4)


@METHODS
def test_sample_without_image_is_stock(model, method):
    text = Sample(4)
    for name in ("visual", "local", "summary"):
        getattr(text, name)[:] = False
    batch = outputs(model, ACTIVE[method], Sample(1), text)
    torch.testing.assert_close(batch[1], outputs(model, None, Sample(1), text)[1])


# --- one attention call ---


def test_paint_equals_whole_map():
    v, policy = view(), ACTIVE["paint"]
    expected = heads_of(naive_map(v, gain_of(policy, v)), v)
    torch.testing.assert_close(policy.modulate(v).double(), expected, atol=1e-5, rtol=1e-4)


def test_var_equals_whole_map():
    v, policy = view(), ACTIVE["var"]
    got = policy.modulate(v)
    expected = naive_var(naive_map(v), v, policy)
    assert (expected != naive_map(v)).any()
    torch.testing.assert_close(got.double(), heads_of(expected, v), atol=1e-5, rtol=1e-4)


def test_paint_then_var_lifts_first_and_moves_then():
    v, paint, var = view(), ACTIVE["paint"], ACTIVE["var"]
    v.output = paint.modulate(v)
    got = var.modulate(v)
    expected = naive_var(naive_map(v, gain_of(paint, v)), v, var)
    torch.testing.assert_close(got.double(), heads_of(expected, v), atol=1e-5, rtol=1e-4)


@METHODS
def test_grouped_queries_equal_repeated_keys(method):
    v = view()
    groups = HEADS // KV_HEADS
    repeated = replace(
        view(), key=v.key.repeat_interleave(groups, 1), value=v.value.repeat_interleave(groups, 1)
    )
    got, expected = ACTIVE[method].modulate(v), ACTIVE[method].modulate(repeated)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_near(method, dtype):
    policy = ACTIVE[method]
    exact = view(dtype=dtype)
    wide = {n: getattr(exact, n).double() for n in ("query", "key", "value", "output", "hidden", "text_only")}
    expected = policy.modulate(replace(exact, **wide, state={}, carry=dict(exact.carry), logit_edits=[]))
    got = policy.modulate(exact)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=3e-2, rtol=3e-2)


def test_fp16_magnitudes_whose_squares_overflow():
    hidden = torch.ones(1, 3, WIDTH, dtype=torch.float16)
    hidden[:, 1, DIM] = 60000
    score = sink_score(hidden, torch.tensor([[DIM]]))
    assert score.isfinite().all()
    assert score[0, 1] > 7.9
    big = torch.full((1, 4, 8), 500.0, dtype=torch.float16)
    assert head_divergence(big, -big).isfinite().all()
    assert text_activation(big).isfinite().all()


@pytest.mark.parametrize(
    ("method", "prefill"), [("paint", True), ("vhr", True), ("paint", False), ("var", False)]
)
def test_nothing_is_asked_of_the_device(method, prefill):
    # var waits once a layer in prefill, to learn how many rows stand after the image
    real = view(queries=9 if prefill else 1, prefill=prefill)
    real.carry[SINKS] = real.visual
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(x) for n, x in vars(real).items() if isinstance(x, torch.Tensor)}
        carry = {n: mode.from_tensor(x) for n, x in real.carry.items()}
        assert ACTIVE[method].modulate(replace(real, **fakes, carry=carry)) is not None


@METHODS
def test_no_visual_key_left(method):
    v = view()
    for marks in (v.visual, v.carry[LOCAL], v.carry[SUMMARY]):
        marks[:] = False
    got = ACTIVE[method].modulate(v)
    assert got is None or torch.equal(got, v.output)


@pytest.mark.parametrize("method", ["paint", "var"])
def test_long_prompts_are_recomputed_in_blocks(method, monkeypatch):
    # after prefill, so that paint recomputes every row too
    whole, parts = view(), view()
    for v in (whole, parts):
        ACTIVE["var"].modulate(v)
        v.prefill = False
    expected = ACTIVE[method].modulate(whole)
    monkeypatch.setattr("vlm_prune.policies.attention_rows.BLOCK", 2)
    torch.testing.assert_close(ACTIVE[method].modulate(parts), expected)


# --- settings ---


@pytest.mark.parametrize("depth", [2, 3, 4, 32])
def test_shallow_models_have_a_layer_to_act_in(depth):
    assert list(Paint().modulate_layers(depth)) == list(range(min(2, depth - 1), depth))
    assert list(VAR().modulate_layers(depth)) == list(range(min(2, depth - 2), depth - 1))


def test_lists_of_configuration_files_are_taken():
    assert VHR(layers=[1, 2]).layers == (1, 2)
    assert VAR(sink_dims=[1, 2]).sink_dims == (1, 2)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Paint, {"alpha": 1.5}, "alpha=1.5: choose a number from 0 to 1"),
        (Paint, {"local_ratio": -0.1}, "local_ratio=-0.1"),
        (Paint, {"first_layer": -1}, "first_layer=-1"),
        (Paint, {"compat": "published"}, "compat='published': choose 'official' or 'paper'"),
        (VHR, {"alpha": -1}, "alpha=-1: choose a number from 0 to 100"),
        (VHR, {"layers": ()}, r"layers=\(\)"),
        (VAR, {"tau": 0}, "tau=0"),
        (VAR, {"move": 1.2}, "move=1.2: choose a number from 0 to 1"),
        (VAR, {"sink_dims": (-1,)}, r"sink_dims=\(-1,\)"),
        (VAR, {"compat": "code"}, "compat='code'"),
        (VAR, {"positions": "none"}, "positions='none'"),
    ],
)
def test_wrong_settings_are_explained(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@pytest.mark.parametrize(
    "policy",
    [
        Paint(first_layer=6),
        Paint(first_layer=3, end_layer=2),
        Paint(end_layer=9),
        VHR(layers=(6,)),
        VAR(first_layer=5),
    ],
)
def test_layers_that_do_not_exist_are_refused(policy):
    with pytest.raises(ValueError, match="the language model has 6 layers"):
        policy.modulate_layers(6)
