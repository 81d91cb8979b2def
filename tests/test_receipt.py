"""The receipt is the truth: each number is compared with what really ran."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models import FAMILIES, IMAGE, LAYOUTS, make, prompt, shared
from tests.reference import CASES, POLICIES, budget, expect
from vlm_prune import pruned
from vlm_prune.versions import cache_of

families = pytest.mark.parametrize("family", FAMILIES)
policies = pytest.mark.parametrize("policy", POLICIES)
cases = pytest.mark.parametrize(("policy", "family", "positions"), CASES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Lengths:
    """The sequence length that entered each layer of a list."""

    def __init__(self, layers):
        self.seen: list[int] = []
        self.handles = [layer.register_forward_pre_hook(self.note) for layer in layers]

    def note(self, module, args):
        self.seen.append(args[0].shape[1])

    def close(self):
        for handle in self.handles:
            handle.remove()


def vision_layers(model):
    return next(list(m) for m in model.model.vision_tower.modules() if isinstance(m, torch.nn.ModuleList))


@families
@policies
@pytest.mark.parametrize("layout", ["single", "ragged"])
def test_numbers_are_what_ran(layout, policy, family):
    model, batch = shared(family), prompt(family, LAYOUTS[layout])
    kept, short = expect(model, batch, policy)
    tower, decoder = Lengths(vision_layers(model)), Lengths(model.model.language_model.layers)
    with pruned(model, policy, **budget(policy)):
        output = model(**batch.inputs)
        receipt = model.pruning.receipt
    tower.close()
    decoder.close()

    assert receipt.kept == kept.units
    visual = (output.logits != 0).any(-1) & (batch.ids == IMAGE)
    cls = int(family == "llava-full")
    assert int(visual.sum()) == sum(len(units) + cls for units in receipt.kept)
    assert receipt.tiles == len(batch.pixels)
    assert receipt.units == receipt.grid[0] * receipt.grid[1] == FAMILIES[family].placeholders - cls
    assert receipt.planned == len(kept.units[0])
    assert receipt.tower_tokens == tower.seen
    assert receipt.decoder_tokens == decoder.seen
    assert receipt.decoder_tokens[0] == short.embeds.shape[1]
    assert (receipt.batch, receipt.prompt_tokens) == tuple(batch.ids.shape)

    tensors = [t for layer in cache_of(output).layers for t in (layer.keys, layer.values)]
    assert receipt.kv_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert {t.shape[2] for t in tensors} == {short.embeds.shape[1]}
    dense = cache_of(model(**batch.inputs))
    dense_tensors = [t for layer in dense.layers for t in (layer.keys, layer.values)]
    assert receipt.kv_bytes_dense == sum(t.numel() * t.element_size() for t in dense_tensors)


def counted(model, batch):
    """FLOPs of vision layers and decoder layers, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(**batch.inputs)
    counts = counter.get_flop_counts()
    name = type(model).__name__
    layers = re.compile(rf"{name}\.model\.(vision_tower\.encoder\.layers?|language_model\.layers)\.\d+")
    return sum(sum(ops.values()) for module, ops in counts.items() if layers.fullmatch(module))


@families
@pytest.mark.parametrize("policy", ["none", "uniform", "random"])
def test_flops_are_those_that_torch_counts(policy, family):
    model, batch = make(family, "eager"), prompt(family, LAYOUTS["ragged"])
    dense = counted(model, batch)
    with pruned(model, policy, **budget(policy)):
        ours = counted(model, batch)
        receipt = model.pruning.receipt
    assert receipt.flops == ours
    assert receipt.flops_dense == dense
    assert (ours < dense) == (policy != "none")


@families
def test_flops_with_cuts_inside_the_tower(family):
    model, batch = make(family, "eager"), prompt(family, LAYOUTS["ragged"])
    with pruned(model, "flowcut", **budget("flowcut")):
        ours = counted(model, batch)
        receipt = model.pruning.receipt
    assert receipt.tower_tokens[-1] < receipt.tower_tokens[0]
    assert receipt.flops <= ours <= 1.05 * receipt.flops  # torch counts the scores too


@cases
def test_generate_and_decoding_steps_keep_the_receipt_of_the_prompt(policy, family, positions):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, policy, positions=positions, **budget(policy)):
        assert model.pruning.receipt is None
        model(**batch.inputs)
        first = model.pruning.receipt
        model.generate(**batch.inputs, max_new_tokens=4)
        second = model.pruning.receipt
        assert second is not first
        for name in (
            "kept",
            "tower_tokens",
            "decoder_tokens",
            "prompt_tokens",
            "kv_bytes",
            "flops",
            "positions",
        ):
            assert getattr(second, name) == getattr(first, name), name
        model(**prompt(family, [(4,)]).inputs)
        assert model.pruning.receipt is second
        other = prompt(family, LAYOUTS["single"])
        model(**other.inputs, use_cache=False)
        assert model.pruning.receipt.tiles == 1
        assert model.pruning.receipt.kv_bytes is None
    assert second.kept == first.kept


def test_receipts_are_per_thread():
    model, batch = shared("llava"), prompt("llava", LAYOUTS["single"])
    with pruned(model, "uniform"):
        model(**batch.inputs)
        mine, seen = model.pruning.receipt, []
        thread = threading.Thread(target=lambda: seen.append(model.pruning.receipt))
        thread.start()
        thread.join()
        assert seen == [None]
        assert model.pruning.receipt is mine


@pytest.mark.parametrize(("policy", "family", "positions"), [case for case in CASES if case[1] in FAMILIES])
def test_printed_form(policy, family, positions):
    model, batch = shared(family), prompt(family, LAYOUTS["several-images"])
    with pruned(model, policy, positions=positions, **budget(policy)):
        model(**batch.inputs)
        receipt = model.pruning.receipt
        lines = str(receipt).splitlines()
    tile, units, count = receipt.tile, receipt.units, len(receipt.kept[0])
    numbers = ", ".join([str(count)] * 5)
    assert lines[0] == (
        f"{policy} on {receipt.family}: kept {numbers} of {units} visual tokens per {tile} "
        f"(planned {count}), positions {positions}"
    )
    assert lines[1].split()[0] == "tower"
    assert lines[2].split() == (
        f"decoder {receipt.decoder_tokens[0]} of {batch.ids.shape[1]} tokens through 3 layers".split()
    )
    assert lines[3].startswith("  compute  ")
    assert lines[3].endswith("GFLOP")
    assert re.fullmatch(r"  KV cache [\d.e-]+ of [\d.e-]+ MiB", lines[4])
    assert re.fullmatch(r"  time     tower [\d.]+ ms, prefill [\d.]+ ms", lines[5])
    assert receipt.tower_ms > 0
    assert receipt.prefill_ms > 0


def test_printed_form_of_many_tiles_is_short():
    model, batch = shared("internvl"), prompt("internvl", [(2, -12, 3)])
    with pruned(model, "uniform", **budget("uniform")):
        model(**batch.inputs)
        assert "kept 5, 5, 5, 5, 5, 5, 5, 5, ... of 16 visual tokens per tile" in str(model.pruning.receipt)
