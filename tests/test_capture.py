"""Captured calls: what a graph computes is what an eager call computes, for new inputs too, and nothing else gets out.

On a CPU a `stand_in` records and replays, over poisoned buffers; tests marked ``cuda`` do the same with CUDA graphs.
"""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import vlm_prune
from tests.arranged import ARRANGED
from tests.models import FAMILIES, LAYOUTS, fingerprint, make, prompt, repeatable, shared
from tests.packed import PACKED
from tests.policy_table import TABLE, options
from tests.stand_in import StandIn, Tape, stand_in  # noqa: F401
from vlm_prune import PolicyError, prune, pruned, unprune
from vlm_prune.call.timing import Stopwatch
from vlm_prune.capture import device, graphs, region
from vlm_prune.capture.buckets import SMALLEST, bucket, pad_left, square_mask
from vlm_prune.capture.device import NotCapturable, Watch
from vlm_prune.capture.graphs import Graphs
from vlm_prune.errors import UnsupportedCallError
from vlm_prune.eval.bench import calls as bench_calls
from vlm_prune.eval.bench.presets import PRESETS
from vlm_prune.eval.bench.subject import Subject
from vlm_prune.kernels import plans
from vlm_prune.registry import policy_class
from vlm_prune.support import FULL, support
from vlm_prune.versions import CACHE, cache_of

WAITING = ("agilepruner", "flowcut", "mustdrop", "sparsevlm")
"""Policies that let the image decide on the host how much is computed, or wait for a solver."""
FIXED = [
    name for name in sorted(TABLE) if name not in WAITING and (policy_class(name).encodes or name == "none")
]
PAIRS = [
    ("llava", "uniform"),
    ("llava", "none"),
    ("llava", "cdpruner"),
    ("internvl", "visionzip"),
    ("llava_next", "divprune"),
]
TOWER, LANGUAGE = "vision tower", "language model"


def compared(family: str, policy: str, model: Any, where: str = "cpu") -> None:
    """Calls of ``model``, eager and captured: several prompts and layouts, each seen again with other inputs."""
    single = [(3, -1, 5)]
    sketches = [
        (single, 1),
        (single, 7),
        ([(4, -1, 6)], 3),
        (single, 1),
        (LAYOUTS["ragged"], 5),
        (LAYOUTS["ragged"], 6),
    ]
    prompts = [prompt(family, rows, seed=seed) for rows, seed in sketches]
    inputs = [{name: x.to(where) for name, x in one.inputs.items()} for one in prompts]
    eager, handed_out = [], []
    with pruned(model, **options(policy)):
        for one in inputs:
            output = model(**one)
            eager.append((output, model.pruning.receipt.kept))
    with pruned(model, capture=True, **options(policy)):
        for one, (_, kept) in zip(inputs, eager, strict=True):
            output, receipt = model(**one), model.pruning.receipt
            handed_out.append(output)
            parts = set(receipt.captured.items())
            inside = policy_class(policy).acts.inside
            if family not in PACKED:
                assert (TOWER, "captured") in parts, receipt.captured
            if family != "qwen3_vl" and not inside:
                assert (LANGUAGE, "captured") in parts, receipt.captured
            assert receipt.kept == kept
        for sketch, output, (wanted, _) in zip(prompts, handed_out, eager, strict=True):
            # compared when all are done: nobody else's call may have written to what was handed out
            live = sketch.mask.bool().to(where)
            torch.testing.assert_close(output.logits[live], wanted.logits[live], rtol=1e-3, atol=1e-4)
            ours, stock = cache_of(output), cache_of(wanted)
            assert ours.get_seq_length() == stock.get_seq_length()
            for a, b in zip(ours.layers, stock.layers, strict=True):
                assert a.keys.shape == b.keys.shape
                if len(live) == 1:
                    torch.testing.assert_close(a.keys, b.keys, rtol=1e-3, atol=1e-4)
                    torch.testing.assert_close(a.values, b.values, rtol=1e-3, atol=1e-4)
        # the prompts of one bucket share a graph
        assert len(model.pruning.graphs) <= 4 if family in FAMILIES else model.pruning.graphs


@pytest.mark.parametrize(("family", "policy"), PAIRS)
@torch.no_grad()
def test_a_captured_call_computes_what_an_eager_one_does(family, policy, stand_in):  # noqa: F811
    compared(family, policy, shared(family))


@pytest.mark.slow
@pytest.mark.parametrize("policy", FIXED)
@pytest.mark.parametrize("family", [*FAMILIES, *ARRANGED, *PACKED])
@torch.no_grad()
def test_every_policy_on_every_family(family, policy, stand_in):  # noqa: F811
    if support(policy, family).level != FULL:
        pytest.skip("not on every call of this family")
    compared(family, policy, shared(family))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", FIXED)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cuda_graphs_compute_what_eager_calls_do(family, policy):
    """Not on LLaVA-NeXT: stock code there makes tensors on the GPU from image sizes, so its tower runs eagerly."""
    model = make(family).to("cuda")
    compared(family, policy, model, "cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_no_graph_memory_stays_on_a_gpu():
    model, inputs = make("llava").to("cuda"), prompt("llava", [(3, -1, 5)]).inputs
    inputs = {name: x.to("cuda") for name, x in inputs.items()}
    with pruned(model, "uniform", tokens=9):
        model(**inputs)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with pruned(model, "uniform", tokens=9, capture=True):
        model(**inputs)
        assert set(model.pruning.receipt.captured.values()) == {"captured"}
    with pruned(model, "flowcut", tokens=9, capture=True):  # a part that cannot be captured
        model(**inputs)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before[0]
    assert torch.cuda.memory_reserved() <= before[1] + 2**26  # blocks are not split as before
    torch.zeros(4, device="cuda").sum().item()  # the stream captures no more


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_graph_holds_the_plans_that_it_reads():
    """Tensors kept for a shape may go, and their memory may be used by others, while a graph still reads them."""
    model, inputs = make("llava").to("cuda"), prompt("llava", [(3, -1, 5)]).inputs
    inputs = {name: x.to("cuda") for name, x in inputs.items()}
    with pruned(model, "uniform", tokens=9, capture=True):
        want = model(**inputs).logits
        plans._plans.clear()
        torch.cuda.synchronize()
        others = []
        for _ in range(40):  # torch has 32 streams that it records on, each with memory of its own
            with torch.cuda.stream(torch.cuda.Stream()):
                others += [
                    torch.ones(n, dtype=torch.int64, device="cuda") for n in (1, 9, 36, *[64] * 60, 128, 300)
                ]
        torch.cuda.synchronize()
        assert torch.equal(model(**inputs).logits, want)
    assert others


def test_kept_tensors_are_held_by_whoever_asked_for_them():
    device, names = torch.device("cpu"), [("held", n) for n in range(plans.MOST + 1)]
    with plans.holding() as asked_for:
        first = plans.planned(names[0], lambda: torch.zeros(1, device=device))
        again = plans.planned(names[0], lambda: torch.ones(1, device=device))
    for name in names[1:]:
        plans.planned(name, lambda: torch.zeros(1, device=device))
    assert [id(x) for x in asked_for] == [id(first), id(again)]
    assert again is first
    assert names[0] not in plans._plans
    assert len(plans._plans) == plans.MOST


def test_buckets_are_few_and_waste_little():
    lengths = [bucket(rows) for rows in range(1, 4097)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) < 30
    for rows, length in enumerate(lengths, 1):
        assert rows <= length
        assert (rows > 128 and length - rows <= length / 5) or length - rows < SMALLEST
        assert bucket(length) == length


def test_a_mask_lets_rows_see_what_is_before_them_and_there():
    there = torch.tensor([[False, False, True, True, False, True], [True] * 6])
    mask = square_mask(there)
    assert mask.shape == (2, 1, 6, 6)
    for b in range(2):
        for query in range(6):
            for key in range(6):
                allowed = key == query or (key < query and bool(there[b, key]))
                assert bool(mask[b, 0, query, key]) == allowed


def test_padding_goes_in_front():
    x = torch.arange(6).view(1, 3, 2)
    assert pad_left(x, 4, 1).tolist() == [[[0, 0], [0, 1], [2, 3], [4, 5]]]
    assert pad_left(x, 3, 1) is x


@torch.no_grad()
def test_the_stand_in_sees_what_a_graph_cannot_do(stand_in):  # noqa: F811
    x = torch.tensor([1.0, 2.0, 3.0])
    for compute in (
        lambda s: s["x"] * s["x"][0].item(),
        lambda s: s["x"] * len(s["x"].tolist()),
        lambda s: s["x"][s["x"] > 1],
        lambda s: s["x"].nonzero(),
        lambda s: s["x"] if s["x"].sum() > 0 else -s["x"],
    ):
        with pytest.raises(NotCapturable, match="the host waits"):
            Graphs().run(("part",), {"x": x}, compute, lambda recorded: recorded.result.clone())


@torch.no_grad()
def test_the_stand_in_replays_on_poisoned_buffers(stand_in):  # noqa: F811
    kept = Graphs()
    outside: list[torch.Tensor] = []

    def leaks(static: dict[str, torch.Tensor]) -> torch.Tensor:
        outside.append(static["x"] * 2)
        return outside[0] + 1 if len(outside) > 2 else outside[-1] + 1

    def take(recorded: Any) -> torch.Tensor:
        return recorded.result.clone()

    def double(static: dict[str, torch.Tensor]) -> torch.Tensor:
        y = torch.zeros(3)
        y += static["x"] * 2
        return y.view(3, 1).expand(3, 2)

    x = torch.tensor([1.0, 2.0, 3.0])
    for _ in range(3):
        got = kept.run(("double",), {"x": x}, double, take)
        assert got.tolist() == [[2 * v, 2 * v] for v in x.tolist()]
        x = x + 1
    got = kept.run(("leaks",), {"x": x}, leaks, take)
    kept_in = outside[0]
    assert torch.equal(got, 2 * x + 1)
    assert torch.equal(kept_in, 2 * x)


@torch.no_grad()
def test_what_runs_eagerly_has_its_reason_in_the_receipt(stand_in):  # noqa: F811
    model, inputs = shared("llava"), prompt("llava", [(3, -1, 5)]).inputs

    def reasons(policy: str = "uniform", **more: Any) -> dict[str, str]:
        with pruned(model, capture=True, **options(policy)):
            model(**inputs, **more)
            assert "eager: " in str(model.pruning.receipt)
            return model.pruning.receipt.captured

    assert reasons(output_hidden_states=True)[LANGUAGE] == "eager: output_hidden_states is asked for"
    assert "between the decoder's layers" in reasons("fastv")[LANGUAGE]
    assert "waits" in reasons("agilepruner")[TOWER]
    with torch.enable_grad():
        assert "gradients are enabled" in reasons()[TOWER]
        assert "gradients are enabled" in reasons()[LANGUAGE]
    model.train()
    try:
        assert "training mode" in reasons()[LANGUAGE]
    finally:
        model.eval()
    handle = model.model.language_model.layers[1].register_forward_hook(lambda *_: None)
    try:
        answer = reasons()
        assert "hooks" in answer[LANGUAGE]
        assert answer[TOWER] == "captured"
    finally:
        handle.remove()
    past = model.model.language_model.layers[0]
    past.forward = past.forward  # as accelerate does
    try:
        assert "offloaded" in reasons()[LANGUAGE]
    finally:
        del past.forward
    with Watch(torch.device("meta")):
        assert "looks at each operation" in reasons()[TOWER]
    packed = shared("qwen2_5_vl")
    with pruned(packed, "uniform", ratio=0.3, capture=True):
        packed(**prompt("qwen2_5_vl", [(3, -1, 5)]).inputs)
        assert "packs images" in packed.pruning.receipt.captured[TOWER]


@torch.no_grad()
def test_on_a_cpu_calls_run_eagerly_and_say_so():
    model, inputs = shared("llava"), prompt("llava", [(3, -1, 5)]).inputs
    with pruned(model, "uniform", tokens=9):
        wanted = model(**inputs).logits
    with pruned(model, "uniform", tokens=9, capture=True):
        assert torch.equal(model(**inputs).logits, wanted)
        receipt = model.pruning.receipt
        assert set(receipt.captured) == {TOWER, LANGUAGE}
        assert all(
            how == "eager: captured calls need a CUDA device, this model is on cpu"
            for how in receipt.captured.values()
        )
        assert not len(model.pruning.graphs)
    with pytest.raises(PolicyError, match="True or False"):
        prune(model, "uniform", tokens=9, capture="yes")
    assert not hasattr(model, "pruning")


@torch.no_grad()
def test_generate_with_beams_static_caches_and_turns(stand_in):  # noqa: F811
    model = shared("llava")
    single, batch = prompt("llava", [(3, -1, 5)]).inputs, prompt("llava", repeatable(model, "llava")).inputs
    calls = [
        (single, {}),
        (batch, {"num_beams": 3}),
        (single, {"cache_implementation": "static", "disable_compile": True}),
        (batch, {"cache_implementation": "static", "disable_compile": True}),
        (batch, {"num_beams": 2, "num_return_sequences": 2}),
    ]
    for policy in ("uniform", "none"):
        answers: list[list[torch.Tensor]] = []
        for capture in (False, True):
            with pruned(model, capture=capture, **options(policy)):
                found = [
                    model.generate(**one, **how, max_new_tokens=5, do_sample=False) for one, how in calls
                ]
                first = model.generate(
                    **single, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
                )
                ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9, 10]])], 1)
                more = {CACHE: cache_of(first), "attention_mask": torch.ones_like(ids)}
                found.append(model.generate(input_ids=ids, **more, max_new_tokens=4, do_sample=False))
                if capture:
                    assert len(model.pruning.graphs) >= 4
            answers.append(found)
        for ours, wanted in zip(*reversed(answers), strict=True):
            assert torch.equal(ours, wanted)


@torch.no_grad()
def test_graphs_are_few_and_the_oldest_goes(stand_in, monkeypatch):  # noqa: F811
    model = shared("llava")
    with pruned(model, "uniform", tokens=9, capture=True):
        kept = model.pruning.graphs
        kept.limit = 3
        sketches = [[(3, -n, 5)] for n in (1, 2, 3)]
        wanted = {}
        for _ in range(2):
            for n, sketch in enumerate(sketches):
                logits = model(**prompt("llava", sketch).inputs).logits
                assert len(kept) <= 3
                torch.testing.assert_close(logits, wanted.setdefault(n, logits))
        tapes = [recorded.graph for recorded in kept._recorded.values()]
        assert not any(tape.released for tape in tapes)
    assert all(tape.released for tape in tapes)
    assert not len(kept)


@torch.no_grad()
def test_a_model_is_as_it_was_after_unprune_and_after_errors(stand_in, monkeypatch):  # noqa: F811
    model, inputs = make("llava"), prompt("llava", [(3, -1, 5)]).inputs
    model(
        **inputs, output_hidden_states=True
    )  # transformers installs hooks of its own at the first such call
    before, wanted = fingerprint(model), model(**inputs).logits
    prune(model, "uniform", tokens=9, capture=True)
    right = model(**inputs).logits
    kept = model.pruning.graphs
    kept.clear()
    projector = model.model.multi_modal_projector
    for moment in (1, 2):  # while it is looked at, and in the middle of recording
        calls = []

        def breaks(*args: Any, at: int = moment, seen: list[int] = calls, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) == at:
                raise KeyboardInterrupt
            return torch.nn.functional.linear(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(
                type(projector.linear_1), "forward", lambda self, x: breaks(x, self.weight, self.bias)
            )
            with pytest.raises(KeyboardInterrupt):
                model(**inputs)
        assert not kept._busy
        kept.clear()
        torch.testing.assert_close(model(**inputs).logits, right)
        kept.clear()
    with pytest.raises(UnsupportedCallError):
        model(**{**inputs, "attention_mask": torch.ones(1, 1, 44, 44)})
    unprune(model)
    assert fingerprint(model) == before
    assert not len(kept)
    assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_new_weights_are_seen(stand_in):  # noqa: F811
    model, inputs = make("llava"), prompt("llava", [(3, -1, 5)]).inputs
    with pruned(model, "uniform", tokens=9, capture=True):
        first = model(**inputs).logits
        layer = model.model.language_model.layers[1].mlp.down_proj
        layer.weight.mul_(2)  # in place: the graph reads it
        changed = model(**inputs).logits
        layer.weight = torch.nn.Parameter(layer.weight / 2)  # another tensor
        again = model(**inputs).logits
        model.model.multi_modal_projector.linear_2.bias.data = (
            model.model.multi_modal_projector.linear_2.bias + 1
        )
        last = model(**inputs).logits
        twin = copy.deepcopy(model)
    assert not torch.allclose(first, changed, atol=1e-2)
    torch.testing.assert_close(first, again)
    with pruned(model, "uniform", tokens=9):
        torch.testing.assert_close(model(**inputs).logits, last)
    torch.testing.assert_close(twin(**inputs).logits, last)
    assert len(twin.pruning.graphs) == 2
    assert twin.pruning.receipt.captured[LANGUAGE] == "captured"
    unprune(twin)


@torch.no_grad()
def test_threads_do_not_meet(stand_in):  # noqa: F811
    model = shared("llava")
    prompts = [prompt("llava", [(3, -1, 5)], seed=seed).inputs for seed in range(4)]
    with pruned(model, "visionzip", tokens=9):
        wanted = [model(**one).logits for one in prompts]
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(4):
                    torch.testing.assert_close(
                        model(**prompts[number]).logits, wanted[number], rtol=1e-3, atol=1e-4
                    )
                    assert model.pruning.receipt.captured[TOWER] == "captured"
        except BaseException as error:
            wrong.append(error)

    with pruned(model, "visionzip", tokens=9, capture=True):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(model.pruning.graphs) == 2
    assert not wrong


@torch.no_grad()
def test_modes_of_torch_have_graphs_of_their_own(stand_in):  # noqa: F811
    model, inputs = shared("llava"), prompt("llava", [(3, -1, 5)]).inputs
    with pruned(model, "uniform", tokens=9):
        with torch.autocast("cpu", torch.bfloat16):
            half = model(**inputs).logits
        wanted = model(**inputs).logits
    with pruned(model, "uniform", tokens=9, capture=True):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(model(**inputs).logits, half, rtol=0.1, atol=0.1)
            with torch.inference_mode():
                torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-3, atol=1e-4)
        assert len(model.pruning.graphs) == 4


def test_the_switch_is_saved_and_shown(tmp_path):
    model = make("llava")
    prune(model, "uniform", tokens=9, capture=True)
    config = model.pruning.config
    assert config["capture"] is True
    assert "captured" in repr(model.pruning)
    model.save_pretrained(tmp_path)
    loaded = vlm_prune.from_pretrained(tmp_path)
    assert loaded.pruning.config == config
    other = prune(make("llava"), "uniform", tokens=9)
    assert "capture" not in other.pruning.config
    assert "captured" not in repr(other.pruning)


class OnFakes(Watch):
    """The look at a part before it is recorded, where tensors have no values."""

    def _constant(self, source: torch.Tensor) -> torch.Tensor:
        return torch.empty(source.shape, dtype=source.dtype, device=self.device)


class FakeGraphs(StandIn):
    """Only looks, as `device.CudaRecorder` does first."""

    def record(self, compute: Any, inputs: list[torch.Tensor]) -> tuple[Any, Tape]:
        with OnFakes(torch.device("cuda")):
            return compute(), Tape(inputs)

    def turn(self) -> Any:
        return nullcontext()


@pytest.mark.parametrize(
    "family", [*FAMILIES][:1] + [pytest.param(x, marks=pytest.mark.slow) for x in [*FAMILIES][1:]]
)
@torch.no_grad()
def test_on_a_gpu_nothing_in_a_captured_part_would_wait(family, monkeypatch):
    """As `test_no_wait` does: fake tensors on a fake GPU."""
    monkeypatch.setattr(Stopwatch, "__init__", lambda self, device: None)
    monkeypatch.setattr(Stopwatch, "stop", lambda self: lambda: 0.0)
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    monkeypatch.setattr(graphs, "_refusal", lambda device: None)
    monkeypatch.setattr(region.Region, "check", lambda self: 0)
    monkeypatch.setitem(device.RECORDERS, "cuda", FakeGraphs)
    monkeypatch.setattr(Tape, "replay", lambda self: None)
    sketch = prompt(family, [(3, -1, 5)])
    with FakeTensorMode():
        with torch.device("cuda"):
            model = FAMILIES[family].build().eval()
        inputs = {n: torch.empty(x.shape, dtype=x.dtype, device="cuda") for n, x in sketch.inputs.items()}
        for policy in FIXED:
            with pruned(model, capture=True, **options(policy)):
                model(**inputs)
                found = model.pruning.receipt.captured
            assert found[TOWER] == "captured", (policy, found)
            assert found[LANGUAGE] == "captured" or policy_class(policy).acts.inside, (policy, found)


@torch.no_grad()
def test_the_benchmark_has_rows_of_captured_calls(stand_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr(bench_calls, "peak_bytes", lambda run, device: 1)
    subject = Subject(PRESETS["quick"], shared("llava"), prompt("llava", [(3, -1, 5)]).inputs, 36)
    dense, *rows = bench_calls.calls(subject, ["uniform"], 9, 1, "cpu", capture=True)
    assert (dense.captured, dense.wall_over_captured) == (None, None)
    assert [(row.policy, row.tokens) for row in rows] == [("none", 36), ("uniform", 9)]
    for row in rows:
        assert row.captured == {TOWER: "captured", LANGUAGE: "captured"}
        assert row.wall_over_captured > 0
    assert not hasattr(subject.model, "pruning")
