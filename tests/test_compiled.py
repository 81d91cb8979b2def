"""``torch.compile`` of decoding: one graph for all steps and prompts, and what it gives."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import CompileConfig, StaticCache

from tests.models import IMAGE, LAYOUTS, make, prompt
from tests.policy_table import MODULATE, TABLE, options
from vlm_prune import pruned
from vlm_prune.versions import CACHE

STEPS = 5


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler that runs graphs as they are, and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo):  # generate copies its settings
        return self


def generate(model, batch, **more):
    fixed = {"max_new_tokens": STEPS, "suppress_tokens": [IMAGE], "do_sample": False}
    return model.generate(**batch.inputs, **fixed, **more)


def compiled(graphs, fullgraph=True):
    config = CompileConfig(fullgraph=fullgraph, backend=graphs, mode=None, dynamic=False)
    config._compile_all_devices = True  # by itself, generate compiles on accelerators only
    return {"cache_implementation": "static", "compile_config": config}


QUICK = {("flowcut", "internvl", "ragged"), ("mustdrop", "llava-gqa", "ragged")}
WHOLE = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in product(
        [p for p in sorted(TABLE) if p not in MODULATE],
        ["llava", "llava-gqa", "internvl"],
        ["single", "ragged", "row-without-image"],
    )
]


@pytest.mark.parametrize(("policy", "family", "layout"), WHOLE)
def test_steps_are_one_graph(policy, family, layout):
    """Not one graph a step, nor one a prompt, as long as the sizes are the same; and no part of it in Python."""
    model, graphs = make(family), Graphs()
    fixed = TABLE[policy].holds in ("tile", "prompt", "all", "exit")
    with pruned(model, **options(policy)):
        for seed in (1, 2, 3):
            batch = prompt(family, LAYOUTS[layout], seed=seed)
            want = generate(model, batch)
            assert torch.equal(generate(model, batch, **compiled(graphs)), want)
            assert graphs.count == 1 or (not fixed and seed > 1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", MODULATE)
def test_edited_attention_runs_between_graphs(policy):
    model, batch, graphs = make("llava"), prompt("llava", LAYOUTS["ragged"]), Graphs()
    with pruned(model, **options(policy)):
        want = generate(model, batch)
        assert torch.equal(generate(model, batch, **compiled(graphs, fullgraph=False)), want)
        assert graphs.count > 1
        with pytest.raises(torch._dynamo.exc.Unsupported):
            generate(model, batch, **compiled(Graphs()))
        assert torch.equal(generate(model, batch), want)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["random", "fastv"])
def test_a_loop_of_my_own(policy):
    """The prompt by the model, the steps by a compiled one, with padding masks and a static cache."""
    model, graphs = make("llava"), Graphs()
    step = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    for seed in (1, 2):
        batch = prompt("llava", [(3, -1, 4)], seed=seed)
        with pruned(model, **options(policy)):
            want = generate(model, batch)[0, batch.ids.shape[1] :].tolist()
            cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
            logits, tokens = model(**batch.inputs, **{CACHE: cache}).logits[:, -1], []
            for number in range(STEPS):
                logits[:, IMAGE] = -torch.inf
                tokens.append(int(logits.argmax()))
                place = torch.tensor([[batch.ids.shape[1] + number]])
                ids = torch.tensor([tokens[-1:]])
                logits = step(input_ids=ids, position_ids=place, **{CACHE: cache}).logits[:, -1]
            assert tokens == want
    assert graphs.count <= 2  # a second one for the second time that the model was pruned


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("policy", ["flowcut", "fastv", "vhr"])
def test_a_prompt_through_a_compiled_model(policy):
    """Whatever of it becomes a graph: it gives the same."""
    model, batch, graphs = make("llava"), prompt("llava", LAYOUTS["ragged"]), Graphs()
    with pruned(model, **options(policy)):
        want = model(**batch.inputs).logits
        whole = torch.compile(model, backend=graphs)
        torch.testing.assert_close(whole(**batch.inputs).logits, want)
        assert model.pruning.receipt.decoder_tokens
    assert graphs.count
