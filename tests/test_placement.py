"""Models spread over devices by accelerate's hooks: the answers of the same model in one place."""

from __future__ import annotations

import pytest
import torch

import vlm_prune
from tests.models import LAYOUTS, clip_layers, make, prompt
from tests.policy_table import TABLE, options
from tests.second_device import SECOND, move, second_device
from vlm_prune import UnsupportedCallError, prune, pruned, unprune

hooks = pytest.importorskip("accelerate.hooks")
accelerate = pytest.importorskip("accelerate")

slow = pytest.mark.slow
FEW = ["fastv", "flowcut+vhr"]
MORE = [*(name for name in TABLE if name not in FEW), "uniform+fastv+paint"]
COMPOSITIONS = [*FEW, *(pytest.param(name, marks=slow) for name in MORE)]
ORDERS = ["placed first", "pruned first"]
FIRST = torch.device("cpu")
DECODER = ("embed_tokens", "layers", "norm", "rotary_emb")
SPLITS = {
    "tower": ["model.vision_tower"],
    "projector": ["model.multi_modal_projector"],
    "decoder": [*(f"model.language_model.{part}" for part in DECODER), "lm_head"],
    "tower layers": [f"{clip_layers()}.{n}" for n in (2, 3)],
    "decoder layers": [f"model.language_model.layers.{n}" for n in (1, 2)],
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def answers(model, inputs=None):
    inputs = prompt("llava", LAYOUTS["ragged"]).inputs if inputs is None else inputs
    out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    kept = model.pruning.receipt.kept if hasattr(model, "pruning") else None
    return [model(**inputs).logits, out.sequences, *out.logits], kept


def assert_same(ours, theirs):
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a.to(FIRST), b)


def in_one_place(policy):
    with pruned(make("llava"), **options(policy)) as model:
        return answers(model)


class Align(hooks.AlignDevicesHook):
    """The hook of accelerate, for weights that are in their place already."""

    def init_hook(self, module):
        return module


def spread(model, parts):
    """Put ``parts`` of a model on the second device, with the hooks that `accelerate.dispatch_model` adds."""
    for name in parts:
        move(model.get_submodule(name))
    own = [n for n, m in model.named_modules() if [*m.parameters(recurse=False), *m.buffers(recurse=False)]]
    blocks = {n for n in model._no_split_modules or () if n}
    names = [n for n, m in model.named_modules() if type(m).__name__ in blocks or n in parts or n in own]
    for name in names:
        if any(other != name and name.startswith(f"{other}.") for other in names):
            continue  # a block moves what it is given as a whole
        there = any(name == part or name.startswith(f"{part}.") for part in parts)
        device, skip = SECOND if there else FIRST, model._skip_keys_device_placement
        hooks.add_hook_to_module(model.get_submodule(name), Align(device, skip_keys=skip))
    hooks.add_hook_to_module(
        model, Align(FIRST, io_same_device=True, skip_keys=model._skip_keys_device_placement)
    )
    return model


@pytest.mark.parametrize("split", SPLITS)
def test_the_second_device_is_one(split):
    """Guards the tests below: a stock model works when it is spread, and what is not moved is missed."""
    want = answers(make("llava"))
    with second_device():
        assert_same(answers(spread(make("llava"), SPLITS[split])), want)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2) + torch.ones(2, device=SECOND)


@pytest.mark.parametrize("order", [ORDERS[0], pytest.param(ORDERS[1], marks=slow)])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("policy", COMPOSITIONS)
def test_parts_of_a_model_on_another_device(policy, split, order):
    want, model = in_one_place(policy), make("llava")
    if order == "pruned first":
        prune(model, **options(policy))
    with second_device():
        spread(model, SPLITS[split])
        if order == "placed first":
            prune(model, **options(policy))
        assert_same(answers(model), want)
        assert model.pruning.receipt.decoder_tokens


@pytest.mark.parametrize("policy", ["flowcut", *FEW])
def test_inputs_on_another_device_than_the_model(policy):
    """`generate` moves them, and what the tower returned with them, as copies."""
    want, model = in_one_place(policy), prune(make("llava"), **options(policy))
    with second_device():
        move(model)
        batch = prompt("llava", LAYOUTS["ragged"])
        moved = {**batch.inputs, "pixel_values": batch.pixels.to(SECOND)}
        out = model.generate(**moved, max_new_tokens=3)
        assert torch.equal(out.to(FIRST), want[0][1])
        assert model.pruning.receipt.kept == want[1]
        assert model.pruning.receipt.decoder_tokens


OFFLOADED = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.layers.2": "disk",
    "model.language_model.norm": "disk",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def hooked(model):
    return {
        name: type(module._hf_hook).__name__
        for name, module in model.named_modules()
        if hasattr(module, "_hf_hook")
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("where", ["some on disk", pytest.param("all on disk", marks=slow)])
@pytest.mark.parametrize("policy", COMPOSITIONS)
def test_weights_on_disk(policy, where, order, tmp_path):
    want, stock, model = in_one_place(policy), answers(make("llava")), make("llava")
    places = OFFLOADED if where == "some on disk" else dict.fromkeys(OFFLOADED, "disk")
    if order == "pruned first":
        prune(model, **options(policy))
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    placed = hooked(model)
    assert any(weight.is_meta for weight in model.parameters())
    if order == "placed first":
        prune(model, **options(policy))
    if policy == "downsample" and where == "all on disk":
        with pytest.raises(UnsupportedCallError, match="position_embedding"):
            answers(model)
    else:
        assert_same(answers(model), want)
    unprune(model)
    assert hooked(model) == placed
    assert_same(answers(model), stock)


def test_loading_and_saving_with_a_device_map(tmp_path):
    model = make("llava")
    with pruned(model, "flowcut+vhr", ratio=0.3):
        want = answers(model)
        model.save_pretrained(tmp_path / "saved")
    loaded = vlm_prune.from_pretrained(
        tmp_path / "saved", device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    ).eval()
    assert any(weight.is_meta for weight in loaded.parameters())
    assert_same(answers(loaded), want)
    with pytest.warns(UserWarning, match="offloaded"):
        loaded.save_pretrained(tmp_path / "again")
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "saved"))
    assert ours == theirs
    assert_same(answers(vlm_prune.from_pretrained(tmp_path / "again").eval()), want)
