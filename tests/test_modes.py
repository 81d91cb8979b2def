"""Every way in which ``generate`` decodes, for every family and policies of every stage.

A policy of the encode stage has to give what the stock model gives, in the same mode, for the shortened prompt; one
that acts in the decoder what it gives in the default mode, which other tests compare with layers walked one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from transformers import Cache, StaticCache, StoppingCriteriaList, cache_utils
from transformers.cache_utils import QuantizedLayer

from tests.models import ARRANGED, FAMILIES, IMAGE, LAYOUTS, PACKED, PAD, VOCAB, prompt, repeatable, shared
from tests.packed import VIDEO
from tests.policy_table import IN_DECODER, options
from tests.reference import CASES, POLICIES, budget, expect
from vlm_prune import pruned
from vlm_prune.versions import CACHE

STEPS = 5
OLD_QUANTISED = "reorder_cache" not in vars(QuantizedLayer)  # transformers 5.4
HAS_FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")  # since transformers 5.24


class Exact(QuantizedLayer):
    """A quantised layer whose codes are exact, so that what it gives can be compared with a plain cache."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, q_tensor):
        return q_tensor


def exact_cache(model):
    depth = model.config.get_text_config().num_hidden_layers
    return {CACHE: Cache(layers=[Exact(residual_length=4) for _ in range(depth)])}


def static_cache(model):
    return {CACHE: StaticCache(config=model.config.get_text_config(), max_cache_len=400)}


def quantized(**config):
    return lambda model: {"cache_implementation": "quantized", "cache_config": config}


def stops(model):
    return {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: ids[:, -1] % 3 == 0])}


MODES: dict[str, dict[str, Any] | Callable[[Any], dict[str, Any]]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "group-sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam-sampling": {"num_beams": 2, "do_sample": True},
    "early-stop": {"eos_token_id": list(range(0, VOCAB, 5))},
    "stopping-criteria": stops,
    "no-cache": {"use_cache": False},
    "static-cache": {"cache_implementation": "static"},
    "static-cache-of-my-own": static_cache,
    "static-cache-beams": {"cache_implementation": "static", "num_beams": 3},
    "static-cache-sampling": {"cache_implementation": "static", "do_sample": True, "num_return_sequences": 2},
    "quantized-cache-fp8": quantized(backend="fp8"),
    "quantized-cache-quanto": quantized(backend="quanto", nbits=4, q_group_size=16, residual_length=4),
    "offloaded-cache": {"cache_implementation": "offloaded"},
}


class NoStream:
    """Stands for the stream of an accelerator, on which stock code prefetches an offloaded cache."""

    def __init__(self, *args: Any): ...

    def wait_stream(self, other: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


@pytest.fixture(autouse=True)
def _offload_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", NoStream)


def generate(model, inputs, mode, **more):
    torch.manual_seed(7)
    chosen = MODES[mode](model) if callable(MODES[mode]) else MODES[mode]
    fixed = {"max_new_tokens": STEPS, "pad_token_id": PAD, "suppress_tokens": [IMAGE, VIDEO]}
    return model.generate(**inputs, **fixed | chosen | more)


def everything():
    """Each policy and family in each mode: a few by default, all of them among the slow tests."""
    modes = [m for m in MODES if m != "quantized-cache-fp8" or HAS_FP8]
    families = [*FAMILIES, *ARRANGED, *PACKED]
    for family, policy, mode in product(families, [p for p in POLICIES if p != "none"], modes):
        positions = next((p for name, f, p in CASES if (name, f) == (policy, family)), "original")
        quick = (policy, family, positions) in CASES
        yield pytest.param(family, policy, positions, mode, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "policy", "positions", "mode"), everything())
def test_equals_the_shortened_prompt(mode, policy, family, positions):
    if OLD_QUANTISED and mode.startswith("quantized") and family in PACKED:
        pytest.skip("stock code makes a quantised cache of too few layers")
    model = shared(family)
    batch = prompt(family, repeatable(model, family))
    with torch.no_grad():
        _, short = expect(model, batch, policy, positions)
    with short.given(model):
        want = generate(model, short.inputs, "greedy" if mode == "no-cache" else mode)
    with pruned(model, policy, positions=positions, **budget(policy)):
        ours = generate(model, batch.inputs, mode)
    assert torch.equal(ours[:, batch.ids.shape[1] :], want)


PLAIN = {
    "static-cache": ({"cache_implementation": "static"}, "greedy"),
    "static-cache-of-my-own": (static_cache, "greedy"),
    "static-cache-beams": ({"cache_implementation": "static"}, "beams"),
    "static-cache-sampling": ({"cache_implementation": "static"}, "group-sampling"),
    "quantized-cache": (exact_cache, "greedy"),
    "quantized-cache-beams": (exact_cache, "beams"),
    "offloaded-cache": ({"cache_implementation": "offloaded"}, "greedy"),
}


@pytest.mark.parametrize("mode", PLAIN)
@pytest.mark.parametrize(
    "family",
    ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("internvl", "llava_next", "qwen3_vl"))],
)
@pytest.mark.parametrize("policy", IN_DECODER)
def test_equals_a_plain_cache(policy, family, mode):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    kind, decoding = PLAIN[mode]
    if OLD_QUANTISED and mode == "quantized-cache-beams":
        pytest.skip("stock code cannot reorder the rows of a quantised cache")
    with pruned(model, **options(policy)):
        want = generate(model, batch.inputs, decoding)
        ours = generate(model, batch.inputs, decoding, **(kind(model) if callable(kind) else kind))
    assert torch.equal(ours, want)
