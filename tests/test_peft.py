"""Adapters of PEFT and pruning together, in either order: the same answers, losses and files as without a wrapper."""

from __future__ import annotations

import json

import pytest
import torch

import vlm_prune
from tests.models import LAYOUTS, fingerprint, make, prompt
from tests.policy_table import options
from tests.test_training import gradients, text
from vlm_prune import StateError, UnsupportedModelError, prune, pruned, unprune
from vlm_prune.call.encode_call import current_encode
from vlm_prune.call.forward_call import current_forward

peft = pytest.importorskip("peft")

# PEFT 0.21 itself asks transformers 5.24 by a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

POLICIES = [
    "fastv",
    "flowcut+vhr",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("flowcut", "paint")),
]
ORDERS = ["adapter first", "pruned first", "base pruned inside"]
policies = pytest.mark.parametrize("policy", POLICIES)
orders = pytest.mark.parametrize("order", ORDERS)
DECODER = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def lora(**changes):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": DECODER, "lora_dropout": 0.0}
    return peft.LoraConfig(**settings | changes)


def stir(model, seed=0):
    """Adapters that change something: fresh ones are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def wrapped(order, policy, **changes):
    """A pruned model with an adapter, put together in one of three orders."""
    model = make("llava")
    if order == "pruned first":
        return stir(peft.get_peft_model(prune(model, **options(policy)), lora(**changes))).eval()
    tuned = stir(peft.get_peft_model(model, lora(**changes))).eval()
    prune(tuned if order == "adapter first" else tuned.get_base_model(), **options(policy))
    return tuned


def merged():
    """The same weights as a plain stock model."""
    return stir(peft.get_peft_model(make("llava"), lora())).merge_and_unload().eval()


def answers(model, batch):
    with torch.no_grad():
        return model(**batch.inputs).logits, model.generate(**batch.inputs, max_new_tokens=4)


@orders
@policies
def test_a_pruned_model_with_an_adapter_is_the_merged_one_pruned(policy, order):
    batch = prompt("llava", LAYOUTS["ragged"])
    with pruned(merged(), **options(policy)) as plain, torch.no_grad():
        logits, tokens = answers(plain, batch)
        loss, kept = plain(**batch.inputs, labels=text(batch)).loss, plain.pruning.receipt.kept
    tuned = wrapped(order, policy)
    ours, said = answers(tuned, batch)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(said, tokens)
    with torch.no_grad():  # PEFT calls `forward` itself, past the hooks on the model
        torch.testing.assert_close(tuned(**batch.inputs, labels=text(batch)).loss, loss)
    assert tuned.pruning.receipt.kept == kept
    with tuned.disable_adapter(), pruned(make("llava"), **options(policy)) as bare:
        assert torch.equal(answers(tuned, batch)[0], answers(bare, batch)[0])
    assert current_forward() is None
    assert current_encode() is None


def test_unpruning_gives_back_the_adapted_model():
    batch, tuned = prompt("llava", LAYOUTS["ragged"]), stir(peft.get_peft_model(make("llava"), lora())).eval()
    want, before = answers(tuned, batch), fingerprint(tuned)
    for model in (tuned, tuned.get_base_model()):
        for undo in (tuned, tuned.get_base_model()):
            assert prune(model, "flowcut+vhr", ratio=0.3) is model
            with pytest.raises(StateError, match="pruned already"):
                prune(tuned)
            answers(tuned, batch)
            assert unprune(undo) is undo
            assert fingerprint(tuned) == before
    for ours, theirs in zip(answers(tuned, batch), want, strict=True):
        assert torch.equal(ours, theirs)


@orders
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unloaded"])
def test_taking_the_adapter_off_leaves_the_model_pruned(merge, order):
    batch, tuned = prompt("llava", LAYOUTS["ragged"]), wrapped(order, "flowcut+vhr")
    model = tuned.merge_and_unload() if merge else tuned.unload()
    stock = merged() if merge else make("llava")
    with pruned(stock, **options("flowcut+vhr")):
        want = answers(stock, batch)
    for ours, theirs in zip(answers(model, batch), want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    unprune(model)
    for ours, theirs in zip(answers(model, batch), answers(stock, batch), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not hasattr(model, "pruning")
    assert "save_pretrained" not in vars(tuned)


@orders
def test_adapters_come_and_go_while_pruned(order):
    batch, tuned = prompt("llava", LAYOUTS["single"]), wrapped(order, "flowcut")
    first = answers(tuned, batch)[0]
    tuned.add_adapter("second", lora(r=2))
    stir(tuned, seed=1)
    tuned.set_adapter("second")
    second = answers(tuned, batch)[0]
    assert not torch.allclose(first, second)
    tuned.delete_adapter("default")
    assert torch.equal(answers(tuned, batch)[0], second)
    with torch.no_grad():
        assert tuned.pruning.receipt.kept


def test_adapters_of_transformers_own(tmp_path):
    """``model.add_adapter``, without a PEFT model around."""
    batch, model = prompt("llava", LAYOUTS["single"]), make("llava")
    prune(model, "flowcut", ratio=0.3)
    plain = answers(model, batch)[0]
    try:
        model.add_adapter(lora())
    except ValueError as error:
        pytest.skip(str(error))  # PEFT is older than this version of transformers wants
    stir(model)
    ours = answers(model, batch)[0]
    assert not torch.allclose(ours, plain)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_model.safetensors", "vlm_prune.json"}
    model.disable_adapters()
    assert torch.equal(answers(model, batch)[0], plain)
    unprune(model)
    assert "save_pretrained" not in vars(model)


@orders
@policies
def test_only_the_adapter_learns_and_the_loss_falls(policy, order):
    batch, tuned = prompt("llava", LAYOUTS["ragged"]), wrapped(order, policy).train()
    inputs = {**batch.inputs, "labels": text(batch)}
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = tuned(**inputs).loss
        found = gradients(tuned, loss)
        assert found
        assert all("lora_" in name for name in found)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def test_saving_an_adapter_says_how_its_model_was_pruned(tmp_path):
    batch = prompt("llava", LAYOUTS["single"])
    make("llava").save_pretrained(tmp_path / "base")
    model = vlm_prune.from_pretrained(tmp_path / "base", "none")
    tuned = stir(peft.get_peft_model(unprune(model), lora())).eval()
    prune(tuned, "flowcut", ratio=0.3)
    want = answers(tuned, batch)[0]
    tuned.save_pretrained(tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "vlm_prune.json"}
    assert "model.safetensors" not in files
    assert json.loads((tmp_path / "adapter" / "vlm_prune.json").read_text()) == tuned.pruning.config
    loaded = vlm_prune.from_pretrained(tmp_path / "adapter").eval()
    assert loaded.pruning.config == tuned.pruning.config
    torch.testing.assert_close(answers(loaded, batch)[0], want)
    again = peft.PeftModel.from_pretrained(
        vlm_prune.from_pretrained(tmp_path / "base", "none"), tmp_path / "adapter"
    )
    prune(unprune(again), config=tmp_path / "adapter")
    torch.testing.assert_close(answers(again.eval(), batch)[0], want)


def test_a_projector_that_is_trained_and_saved_whole():
    """PEFT copies such modules: before pruning that is fine, a part of a pruned model cannot be copied."""
    batch = prompt("llava", LAYOUTS["ragged"])
    whole = lora(modules_to_save=["multi_modal_projector"])
    tuned = stir(peft.get_peft_model(make("llava"), whole)).eval()
    answers(tuned, batch)  # the first call installs hooks of transformers
    before = fingerprint(tuned)
    with pruned(tuned, "flowcut", ratio=0.3), pruned(merged(), "flowcut", ratio=0.3) as plain:
        torch.testing.assert_close(answers(tuned, batch)[0], answers(plain, batch)[0], atol=1e-4, rtol=1e-4)
    assert fingerprint(tuned) == before
    with pytest.raises(StateError, match=r"modules_to_save.*unprune"):
        peft.get_peft_model(prune(make("llava"), "flowcut"), whole)


def test_learned_prompts_are_refused():
    tuned = peft.get_peft_model(
        make("llava"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    before = fingerprint(tuned)
    with pytest.raises(UnsupportedModelError, match="learned tokens into the prompt"):
        prune(tuned, "uniform")
    assert fingerprint(tuned) == before
