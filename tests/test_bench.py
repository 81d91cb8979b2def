"""The benchmark on a model of toy size: what it measures and when it fails, not how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

from vlm_prune.cli import app
from vlm_prune.eval.bench import bounds, cli, presets
from vlm_prune.eval.bench import counts as counting
from vlm_prune.eval.bench.calls import Call, calls
from vlm_prune.eval.bench.clock import LiveBytes, Times, interleaved, moved_bytes, shortest, spent_in
from vlm_prune.eval.bench.counts import Counts, Operations, counts
from vlm_prune.eval.bench.report import regressions
from vlm_prune.eval.bench.speed import speed
from vlm_prune.eval.bench.subject import Subject


def toy(layers, tower):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=tower, image_size=84, patch_size=14)
    text = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=32064)
    return LlavaForConditionalGeneration, LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=presets.IMAGE
    )


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    image = presets._pixels(1, 3, 84, 84)
    monkeypatch.setitem(presets.PRESETS, "quick", presets.Preset("a toy", 8, 2, 4, 9, image, toy))


def bench(*more):
    return CliRunner().invoke(app, ["bench", "--preset", "quick", "--rounds", "2", *more])


def test_rows_add_up():
    subject = Subject.of("quick", None, torch.float32, "cpu")
    dense, ours = speed(subject, ["uniform"], [9], 2, "cpu")
    assert (dense.tokens, dense.prompt_rows) == (36, 36 + presets.TEXT_TOKENS)
    assert (ours.tokens, ours.prompt_rows) == (9, 9 + presets.TEXT_TOKENS)
    assert ours.flops == ours.flops_formula < dense.flops
    assert ours.kv_bytes * dense.prompt_rows == dense.kv_bytes * ours.prompt_rows
    assert 0 < ours.peak_bytes < dense.peak_bytes
    assert ours.prefill_over_oracle is not None
    assert subject.model.__dict__.get("pruning") is None


def test_the_oracle_computes_what_the_pruned_prefill_computes():
    subject = Subject.of("quick", None, torch.float32, "cpu")
    shortened = subject.shortened("flowcut", {"tokens": 9})
    with torch.no_grad():
        want = subject.decoder(**shortened).last_hidden_state
        from vlm_prune import pruned

        with pruned(subject.model, "flowcut", tokens=9):
            rows = subject.model.model(**subject.inputs).last_hidden_state
    live = rows[rows.abs().sum(-1) > 0][None]
    torch.testing.assert_close(live, want)


def test_command_line(tmp_path, monkeypatch):
    first = bench("--out", str(tmp_path), "--tokens", "9", "--json")
    result = json.loads(first.stdout[first.stdout.index("{") :])
    assert first.exit_code == 0
    assert [row["policy"] for row in result["rows"]] == ["dense", "uniform", "flowcut"]
    assert (tmp_path / "bench.svg").stat().st_size > 1000
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored == result
    stored["rows"][1]["kv_over_dense"] = 0.1
    (tmp_path / "before.json").write_text(json.dumps(stored))
    worse = bench("--out", str(tmp_path), "--tokens", "9", "--check", str(tmp_path / "before.json"))
    assert worse.exit_code == 1
    assert "uniform at 9: kv_over_dense" in worse.output.replace("\n", " ")
    assert bench("--out", str(tmp_path), "--preset", "quack").exit_code == 2
    for value, code in ((1.0, 0), (1.1, 1)):
        made = [bounds.Bound("prefill", value, 1.02, "oracle")]
        monkeypatch.setattr(cli, "bounds", lambda *given, made=made: iter(made))
        assert bench("--out", str(tmp_path), "--tokens", "9", "--require").exit_code == code


def test_a_batch_is_measured_and_its_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    ended, measured = [], cli.speed

    def ends_early(*given):
        for row in measured(*given):
            yield row
            if (row.batch, row.policy) == (2, "dense"):
                ended.append((tmp_path / "rows.jsonl").read_text().splitlines())
                raise KeyboardInterrupt

    monkeypatch.setattr(cli, "speed", ends_early)
    options = ("--policy", "uniform", "--tokens", "9", "--batch", "1,2", "--answer", "2")
    bench("--out", str(tmp_path), *options)
    rows = [json.loads(line) for line in ended[0]]
    assert [(row["policy"], row["batch"]) for row in rows] == [("dense", 1), ("uniform", 1), ("dense", 2)]
    assert {row["answer"] for row in rows} == {2}
    assert rows[2]["kv_bytes"] == 2 * rows[0]["kv_bytes"]
    for row in rows:
        assert row["requests_per_s"] == pytest.approx(1e3 * row["batch"] / row["end_to_end_ms"])
        assert row["tokens_per_s"] == pytest.approx(2 * row["requests_per_s"])


def test_whole_calls_alone(tmp_path):
    """The depth, the attention and the policies that were asked for, without a column for a GPU."""
    options = ("--calls", "--policy", "uniform", "--policy", "vhr", "--tower", "3", "--attn", "eager")
    done = bench("--out", str(tmp_path), "--tokens", "9", *options)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["policy"], row["tokens"]) for row in rows] == [("dense", 36), ("uniform", 9), ("vhr", 36)]
    assert all(row["counts"]["operations"] > 0 and row["counts"]["device_ms"] is None for row in rows)
    assert "3 vision layers" in done.output
    assert "device ms" not in done.output
    assert not (tmp_path / "bench.svg").exists()


def test_the_oracle_of_a_call_is_smaller_than_the_stock_call():
    subject = Subject.of("quick", None, torch.float32, "cpu").batched(2)
    dense, ours = calls(subject, ["uniform"], 9, 1, "cpu")
    assert dense.batch == ours.batch == 2
    assert ours.peak_over_oracle < dense.peak_over_oracle
    assert ours.counts.operations >= dense.counts.operations


def test_qwen_has_as_many_tokens_as_its_windows_merge():
    preset = presets.PRESETS["qwen2.5-vl-7b"]
    kind, config = preset.build(1, 1)
    vision, text = config.vision_config, config.text_config
    vision.hidden_size = vision.intermediate_size = vision.out_hidden_size = 32
    text.hidden_size = text.intermediate_size = 32
    vision.num_heads, text.num_attention_heads, text.num_key_value_heads = 2, 2, 1
    text.rope_parameters["mrope_section"] = [2, 3, 3]
    with pytest.MonkeyPatch.context() as patch:
        small = dataclasses.replace(preset, build=lambda layers, tower: (kind, config))
        patch.setitem(presets.PRESETS, "qwen2.5-vl-7b", small)
        subject = Subject.of("qwen2.5-vl-7b", 1, torch.float32, "cpu")
    assert subject.visual == 576
    dense, ours = speed(subject.batched(2), ["uniform"], [64], 1, "cpu", 2)
    assert (dense.batch, ours.batch, ours.prompt_rows) == (2, 2, 64 + presets.TEXT_TOKENS)


def test_operations_and_reads_are_counted_and_views_are_not():
    x = torch.arange(6.0)
    with Operations() as seen:
        (x.view(2, 3) + 1).sum()
    assert (seen.started, seen.reads) == (2, 0)
    with Operations() as seen:
        x[x > 2]  # a comparison, and a choice by values
        float(x.sum())
        torch.empty(3)
    assert (seen.started, seen.reads) == (4, 2)
    assert counts(lambda: x + x, "cpu") == Counts(1, 0)


def test_a_gpu_is_read_off_the_profiler(monkeypatch):
    """Its work is the sum of what ran there; launches and waits are the host's, the wait for its end apart."""

    def event(name, where, begin=0, end=0):
        span = SimpleNamespace(elapsed_us=lambda: end - begin)
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=where), time_range=span)

    host, gpu = "CPU", "CUDA"  # as torch's enumeration of devices names them
    assert {host, gpu} <= set(torch.autograd.DeviceType.__members__)
    names = [
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
    ]
    names += ["cudaStreamSynchronize", "cudaDeviceSynchronize"]
    seen = [event(name, host, 0, 900) for name in names]
    seen += [event("a_kernel", gpu, 100, 600), event("Memcpy DtoH", gpu, 1000, 2500)]
    monkeypatch.setattr(
        counting, "profile", lambda activities: nullcontext(SimpleNamespace(events=lambda: seen))
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    x = torch.ones(3)
    assert counts(lambda: x + x, "cuda") == Counts(1, 0, device_ms=2.0, launches=4, waits=1)


def made_row(subject_row, policy, batch, **parts):
    call = {name: parts.pop(name) for name in ("wall_over_dense", "peak_over_oracle") if name in parts}
    counted = Counts(100, 0, 1.0, 100, parts.pop("waits", 5))
    whole = dataclasses.replace(subject_row.call, policy=policy, batch=batch, counts=counted, **call)
    return dataclasses.replace(subject_row, policy=policy, batch=batch, call=whole, **parts)


def test_a_gpu_is_held_to_what_makes_sense_there():
    subject = Subject.of("quick", None, torch.float32, "cpu")
    dense, row = speed(subject, ["uniform"], [9], 1, "cpu")
    rows = [
        made_row(dense, "dense", 1),
        made_row(row, "uniform", 1, wall_over_dense=1.03, prefill_over_oracle=9.0, decode_over_dense=1.0),
        made_row(row, "flowcut", 1, wall_over_dense=1.03, waits=6, decode_over_dense=1.02),
        made_row(row, "divprune", 1, wall_over_dense=1.0, waits=6, decode_over_dense=1.0),
        made_row(dense, "dense", 16),
        made_row(row, "uniform", 16, prefill_over_oracle=1.02, peak_over_oracle=1.0, decode_over_dense=1.0),
        made_row(row, "flowcut", 16, prefill_over_oracle=1.0, peak_over_oracle=1.06, decode_over_dense=1.0),
    ]
    found = list(bounds.gpu_bounds(rows, [row.call for row in rows]))
    assert sorted(bound.name for bound in found if not bound.kept) == [
        "decode step, flowcut at 9, batch 1",
        "peak memory, flowcut, batch 16",
        "prefill, uniform at 9, batch 16",
        "waits, divprune, batch 1",
        "whole call, uniform, batch 1",
    ]
    assert not [b for b in found if b.name.startswith(("scoring", "selection", "growth", "FlowCut"))]


def test_the_host_is_held_to_the_time_of_the_oracle():
    made = Call("dense", 1, 36, 1.0, 0.0, 1.0, 2.0, Counts(1, 0), 1, 1.0)
    some = [made] + [
        dataclasses.replace(made, policy=p, wall_over_oracle=1.04) for p in ("uniform", "flowcut")
    ]
    assert [bound.kept for bound in bounds.host_bounds(some)] == [False, True]


def test_bounds_are_measured(monkeypatch):
    monkeypatch.setattr(bounds, "GROWTH", (64, 128))
    subject = Subject.of("quick", None, torch.float32, "cpu")
    rows = list(speed(subject, ["uniform"], [9], 2, "cpu"))
    found = {bound.name: bound for bound in bounds.bounds(subject, rows, 2)}
    assert {"prefill, uniform at 9", "decode step, uniform at 9", "FlowCut's tower"} <= set(found)
    assert {"scoring, fastv", "scoring, flowcut", "scoring, vhr", "selection, agilepruner"} <= set(found)
    assert all(bound.value > 0 for bound in found.values())


def test_ratios_are_taken_round_by_round():
    assert Times([2.0, 20.0, 2.2]).over(Times([1.0, 10.0, 1.0])) == 2.0
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: 3.0}, rounds=2, warm=1)
    assert times["b"].rounds == [3.0, 3.0]
    assert len(order) == 3


def test_the_shortest_of_a_turn_counts():
    spent = iter([3.0, 1.0, 2.0, 5.0])
    turn = shortest(lambda: next(spent), 3)
    assert turn() == 1.0
    assert next(spent) == 5.0


def test_time_in_methods_is_counted_and_they_come_back():
    class Base:
        def work(self):
            return 1

    class Mine(Base):
        pass

    with spent_in(Mine, ("work",)) as calls:
        assert Mine().work() == 1
    assert len(calls["work"]) == 1
    assert "work" not in vars(Mine)


def test_live_bytes_forget_what_is_gone():
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = torch.ones(1000) + a
        del a
        c = b.view(10, 100) * 2
        del b, c
    assert live.held == 0
    assert live.peak == 3 * 4000


def test_only_what_got_worse_is_a_regression():
    subject = Subject.of("quick", None, torch.float32, "cpu")
    _, row = speed(subject, ["uniform"], [9], 2, "cpu")
    row = dataclasses.replace(row, prefill_over_oracle=1.01, decode_over_oracle=1.0)
    before = {"rows": [{**row.json(), "prefill_over_oracle": 0.97}]}
    assert regressions([row], before) == []
    slow = dataclasses.replace(row, prefill_over_oracle=1.06)
    assert len(regressions([slow], before)) == 1


def test_moved_bytes_are_those_that_operations_take_and_return():
    x = torch.zeros(100)
    assert moved_bytes(x.clone) == 800
    assert moved_bytes(lambda: x.view(10, 10)) == 0
    assert moved_bytes(lambda: (x + x)[:50].sum()) == 1200 + 204


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "foo"], 'policy="foo" is not known. Did you mean "pool"?'),
        (["--policy", "uniform", "--policy", "flowcutt"], 'Did you mean "flowcut"?'),
        (["--policy", "dyvte"], "gates"),
        (["--tokens", "99"], "36"),
        (["--tokens", "0"], "tokens"),
        (["--calls", "--require"], "the bounds of a CPU are on the parts: leave out --calls"),
        (["--batch", "1,x"], "'1,x': whole numbers from 1 on, separated by commas"),
        (["--batch", "0"], "'0': whole numbers from 1 on"),
        (["--answer", "0"], "0: 1 or more is needed"),
        (["--attn", "flashy"], "flashy"),
        (["--rounds", "0"], "0: 1 or more is needed"),
        (["--layers", "-1"], "-1: 1 or more is needed"),
        (["--device", "cuda:99"], "'cuda:99' cannot be used on this machine"),
        (["--device", "gpu"], "'gpu' cannot be used on this machine"),
        (["--dtype", "int8"], "choose float32, bfloat16 or float16"),
        (["--check", "nowhere.json"], "nowhere.json does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_one_clear_error(options, message, tmp_path):
    result = bench(*options, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    said = " ".join(re.sub(r"[\u2500-\u257f]", " ", result.output).split())  # Typer draws a box around some
    assert message in said
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
