"""What pruning adds makes the host wait for the device nowhere, or once: shown on a machine without a GPU.

For one sequence, model, prompt and cache are fake tensors on a fake GPU (FakeTensorMode): they have shapes and no
values, so whatever asks for a value raises. `Waits` notes the other ways to wait: results whose size depends on values,
copies between host and device, solvers. For batches and for policies whose counts depend on the image, `Questions`
counts how often a real run asks for values. docs/performance.md lists the answers.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaForConditionalGeneration

import vlm_prune
from tests.arranged import ARRANGED
from tests.models import EVERY, FAMILIES, prompt, shared
from tests.policy_table import EVICTING, TABLE, options
from vlm_prune import cache, call, encode, language, pruned
from vlm_prune.call.timing import Stopwatch
from vlm_prune.policies import fastv
from vlm_prune.registry import policy_class
from vlm_prune.support import PART, support
from vlm_prune.versions import CACHE, cache_of

SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique", "unique_dim", "bincount", "equal", "_linalg_eigh")
MASKS = ("flowcut",)
"""Policies that let the image decide, and do so on the device where that is faster than waiting for it."""
ADAPTIVE = ("mustdrop", "sparsevlm", "pai", "dola", *EVICTING)
"""Policies that let the image decide how many tokens they drop where, and those whose rows are counted by a cache, or
for a second pass or reading."""


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    """A fake GPU records no events; and stock code's own check of the placeholders, which waits, is switched off."""
    monkeypatch.setattr(Stopwatch, "__init__", lambda self, device: None)
    monkeypatch.setattr(Stopwatch, "stop", lambda self: lambda: 0.0)
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


class Waits(TorchDispatchMode):
    """Notes every operation on a GPU's tensors for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        waits = "cuda" in devices and name in (*SIZED_BY_VALUES, "_local_scalar_dense")
        if name in ("index", "index_put", "index_put_"):
            waits = any(x.dtype == torch.bool for x in tensors[1:])
        if name in ("_to_copy", "copy_"):
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            waits = len(devices) > 1 and not kwargs.get("non_blocking")
        if waits:
            self.seen.append(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize(("family", "device"), [*((family, "cuda") for family in FAMILIES), ("llava", "cpu")])
@torch.no_grad()
def test_one_sequence_with_a_fixed_budget_never_waits(family, device):
    sketch = prompt(family, [(3, -1, 5)])
    with FakeTensorMode():
        with torch.device(device):
            model = FAMILIES[family].build().eval()
        inputs = {n: torch.empty(x.shape, dtype=x.dtype, device=device) for n, x in sketch.inputs.items()}
        with Waits() as stock:
            model(**inputs)
        for policy in TABLE:
            if policy in ADAPTIVE or (policy in MASKS and device == "cpu"):
                continue
            if policy_class(policy).second_pass:  # waits where stock code does, once more
                continue
            with pruned(model, **options(policy)), Waits() as waits:
                output = model(**inputs)
            assert sorted(waits.seen) == sorted(stock.seen), policy
            assert output.logits.shape[1] == sketch.ids.shape[1]


class Questions:
    """Where the engine and the policies, not stock code, ask for the value of a tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, self._asking(getattr(torch.Tensor, name)))

    def _asking(self, method: Any) -> Any:
        def ask(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            asker = sys._getframe(1).f_code.co_filename
            if Path(asker).parent in OURS:
                self.seen.append(Path(asker).name)
            return method(tensor, *args, **kwargs)

        return ask


OURS = {Path(module.__file__).parent for module in (vlm_prune, cache, call, encode, language, fastv)}
BATCH = {
    **{policy: ["row_counts.py"] for policy in TABLE},
    "none": [],
    "vcd": [],
    "dola": ["guidance.py"],  # how many rows the head is to read
    "pai": ["guidance.py", "row_counts.py"],  # how much text there is
    "flowcut": ["flowcut.py", "flowcut.py", "row_counts.py"],
    "mustdrop": ["window_merge.py", "row_counts.py"],
    # words that rate, raters, and merged tokens; the rows of two cuts
    "sparsevlm": [
        "attention_rows.py",
        "scores.py",
        "sparsevlm.py",
        "layers.py",
        "scores.py",
        "sparsevlm.py",
        "layers.py",
        "row_counts.py",
    ],
    # rows that leave the cache are counted once for all layers
    **{
        key: ["eviction.py", "row_counts.py"]
        for key in ("h2o", "lookm", "pyramidkv", "snapkv", "streamingllm")
    },
    "vlcache": [*["attention_rows.py"] * 3, "eviction.py", "row_counts.py"],
}
"""Who asks in the prefill of a padded batch: the census, and the policies that let the image decide."""


@pytest.mark.parametrize("policy", TABLE)
@torch.no_grad()
def test_waits_of_a_padded_batch(policy, monkeypatch):
    model, inputs = shared("llava"), prompt("llava", [(2, -1, 4), (1, -1, 6)]).inputs
    with pruned(model, **options(policy)):
        questions = Questions(monkeypatch)
        model(**inputs)
    # what VFlowOpt asks is on the host, and known from the second call on
    assert [name for name in questions.seen if name != "vflowopt.py"] == BATCH[policy]


@torch.no_grad()
def test_mustdrop_waits_for_the_windows_of_one_sequence_alone(monkeypatch):
    model, inputs = shared("llava"), prompt("llava", [(2, -1, 4)]).inputs
    with pruned(model, **options("mustdrop")):
        questions = Questions(monkeypatch)
        model(**inputs)
    assert questions.seen == ["window_merge.py"]


ON_THE_HOST = ("assembly.py", "encode_call.py", "checks.py", "vflowopt.py")
"""Their questions are about tensors that are made on the host, or asked only if they are there."""


@pytest.mark.parametrize("family", EVERY[len(FAMILIES) :])
@torch.no_grad()
def test_waits_of_one_sequence_where_images_have_any_size(family, monkeypatch):
    """Whether a newline is left depends on the tokens left of its line, so tiled families take a census.

    Packed towers ask for the sizes of the images, as stock code does.
    """
    model, inputs = shared(family), prompt(family, [(3, -1, 5)]).inputs
    for policy in TABLE:
        if policy_class(policy).second_pass:  # asks for the sizes again
            continue
        if policy in (*ADAPTIVE, *MASKS) or (
            family == "llava_onevision" and support(policy, family).level == PART
        ):
            continue
        with pruned(model, **options(policy)), monkeypatch.context() as patch:
            questions = Questions(patch)
            model(**inputs)
        seen = [name for name in questions.seen if name not in ON_THE_HOST]
        cuts = ["layers.py"] * 2 if policy == "vflowopt" else []
        # at the entry, newlines and padding go by what was chosen: rows are counted before and after
        again = ["row_counts.py"] if policy_class(policy).enters else []
        allowed = [[], ["row_counts.py", *again, *cuts]] if family in ARRANGED else [["packed.py"]]
        assert seen in allowed, policy


class Operations(TorchDispatchMode):
    """Counts operations that launch something: views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("policy", ["uniform", "flowcut", "fastv"])
@torch.no_grad()
def test_a_decoding_step_asks_nothing_and_adds_a_handful_of_operations_whatever_the_depth(
    policy, positions, monkeypatch
):
    inputs = prompt("llava", [(3, -1, 5)]).inputs
    token = inputs["input_ids"][:, -1:]
    extra = {}
    for depth in (3, 9):
        model = deep(depth)
        counts = []
        for prune_it in (False, True):
            with pruned(model, **options(policy, positions=positions)) if prune_it else nullcontext():
                past = cache_of(model(**inputs))
                step = {"input_ids": token, CACHE: past}
                questions = Questions(monkeypatch)
                with Operations() as operations:
                    model(**step)
                assert not questions.seen
            counts.append(operations.count)
        extra[depth] = counts[1] - counts[0]
    assert extra[9] == extra[3] <= (24 if policy == "fastv" else 12), extra


def deep(layers: int) -> torch.nn.Module:
    """A tiny LLaVA with so many decoder layers."""
    config = copy.deepcopy(shared("llava").config)
    config.text_config.num_hidden_layers = layers
    return LlavaForConditionalGeneration(config).eval()
