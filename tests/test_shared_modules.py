"""Models that share modules, and models that are called from inside each other."""

import threading

import pytest
import torch

from vlm_prune import StateError, prune, unprune
from vlm_prune.call.encode_call import current_encode
from vlm_prune.call.forward_call import current_forward

from .models import LAYOUTS, make, prompt

FAMILIES = ["llava", "llava_next", "qwen2_vl"]
POLICIES = {"flowcut": {"ratio": 0.3}, "divprune": {"ratio": 0.3}, "fastv": {"ratio": 0.3, "k": 1}}


def parts(model):
    """Where a model of any family keeps its tower, its projector and its decoder."""
    names = ("vision_tower", "visual", "multi_modal_projector", "language_model")
    return {name: getattr(model.model, name) for name in names if hasattr(model.model, name)}


def share(a, b, part):
    setattr(b.model, part, getattr(a.model, part))


def answer(model, batch):
    with torch.no_grad():
        return model(**batch.inputs).logits, model.generate(**batch.inputs, max_new_tokens=3)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_pruning_a_model_leaves_those_alone_that_share_a_module(family, policy):
    batch = prompt(family, LAYOUTS["ragged"])
    for part in parts(make(family)):
        a, b = make(family), make(family, seed=1)
        share(a, b, part)
        stock = answer(a, batch), answer(b, batch)
        prune(a, policy, **POLICIES[policy])
        ours = answer(a, batch)
        assert same(answer(b, batch), stock[1]), part
        with pytest.raises(StateError, match=f"shares a .*{type(a).__name__}.*pruned by {policy}.*unprune"):
            prune(b, "uniform")
        assert not hasattr(b, "pruning")
        assert same(answer(a, batch), ours)
        unprune(a)
        assert same(answer(a, batch), stock[0])
        assert same(answer(b, batch), stock[1])
        prune(b, policy, **POLICIES[policy])
        assert same(answer(a, batch), stock[0])
        unprune(b)
        assert same(answer(b, batch), stock[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["flowcut", "fastv"])
@pytest.mark.parametrize("kind", ["another", "one that shares the tower", "the same"])
def test_a_model_inside_another(family, policy, kind):
    """A hook anywhere in a pruned model asks another model, or the same one: both answer as they do by themselves."""
    a, b = make(family), make(family, seed=1)
    x, y = prompt(family, LAYOUTS["ragged"]), prompt(family, LAYOUTS["single"], seed=9)
    prune(a, policy, **POLICIES[policy])
    if kind == "another":
        prune(b, "uniform", ratio=0.3)
    elif kind == "the same":
        b = a
    else:
        share(a, b, next(iter(parts(a))))
    alone = answer(a, x), answer(b, y)
    tower = next(iter(parts(a).values()))
    places = {**parts(a), "embedding": a.get_input_embeddings(), "head": a.lm_head, "base": a.model}
    places["decoder layer"] = a.model.language_model.layers[1]
    places["tower layer"] = next(
        m for n, m in tower.named_modules() if n.endswith(("layers.1", "layer.1", "blocks.1"))
    )
    for name, module in places.items():
        inner = []

        def hook(*_, inner=inner):
            if not inner:
                inner.append(None)
                inner.append(answer(b, y))

        ways = (module.register_forward_hook, module.register_forward_pre_hook)
        for register in ways if family == "llava" else ways[:1]:
            inner.clear()
            handle = register(hook)
            try:
                ours = answer(a, x)
            finally:
                handle.remove()
            assert same(ours, alone[0]), name
            assert same(inner[1], alone[1]), name
    assert current_forward() is None
    assert current_encode() is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_tower_called_alone_is_a_stock_tower_and_leaves_nothing(family, error):
    model, other = make(family), make(family, seed=1)
    batch = prompt(family, LAYOUTS["single"])
    tower = next(iter(parts(model).values()))
    given = []
    handle = tower.register_forward_pre_hook(lambda m, args, kw: given.append((args, kw)), with_kwargs=True)
    answer(model, batch)
    handle.remove()
    args, kwargs = given[0]
    stock = tower(*args, **kwargs)
    prune(model, "flowcut", ratio=0.3)
    prune(other, "flowcut", ratio=0.3)
    ours = answer(model, batch), answer(other, batch)
    layer = next(m for n, m in tower.named_modules() if n.endswith(("layers.1", "layer.1", "blocks.1")))
    if error is None:
        assert torch.equal(tower(*args, **kwargs).last_hidden_state, stock.last_hidden_state)
    else:

        def fail(*_):
            raise error

        for call in (lambda: tower(*args, **kwargs), lambda: model.get_image_features(**batch.media)):
            handle = layer.register_forward_hook(fail)
            with pytest.raises(error):
                call()
            handle.remove()
    assert current_forward() is None
    assert current_encode() is None
    assert same(answer(other, batch), ours[1])
    assert same(answer(model, batch), ours[0])


def test_an_interrupted_model_does_not_disturb_another_around_it():
    """The inner model is interrupted in its decoder and the outer one goes on; both answer as before afterwards."""
    a, b = make("llava"), make("llava", seed=1)
    x, y = prompt("llava", LAYOUTS["ragged"]), prompt("llava", LAYOUTS["single"], seed=9)
    prune(a, "flowcut", ratio=0.3)
    prune(b, "fastv", ratio=0.3, k=1)
    alone = answer(a, x), answer(b, y)

    def fail(*_):
        raise KeyboardInterrupt

    def hook(*_):
        inner = b.model.language_model.layers[1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            b(**y.inputs)
        inner.remove()

    handle = a.model.multi_modal_projector.register_forward_hook(hook)
    assert same(answer(a, x), alone[0])
    handle.remove()
    assert same(answer(b, y), alone[1])
    assert same(answer(a, x), alone[0])
    assert current_forward() is None


def test_threads_that_call_models_inside_each_other():
    a, b = make("llava"), make("llava", seed=1)
    x, y = prompt("llava", LAYOUTS["ragged"]), prompt("llava", LAYOUTS["single"], seed=9)
    prune(a, "flowcut", ratio=0.3)
    prune(b, "uniform", ratio=0.3)
    alone, found = answer(a, x), []
    handle = a.model.vision_tower.register_forward_hook(lambda *_: b(**y.inputs) and None)
    threads = [threading.Thread(target=lambda: found.append(answer(a, x))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert len(found) == 3
    assert all(same(ours, alone) for ours in found)
