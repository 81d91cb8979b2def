"""``make gpu`` without a GPU: that every section runs, on tiny sizes, and that the page holds what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
import typer
from typer.testing import CliRunner

from vlm_prune.eval.bench import bars, gpu

TITLES = ["CUDA tests", "Against the CPU", "Kernels", "Whole calls", "Captured calls", "Answers"]


def run(*options):
    app = typer.Typer()
    app.command()(gpu.main)
    return CliRunner().invoke(app, list(options))


@pytest.fixture(autouse=True)
def _tf32_comes_back():
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


def test_every_section_runs(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path), "--commit", "abc")
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "dry-run-on-a-cpu.json").read_text())
    page = (tmp_path / "dry-run-on-a-cpu.md").read_text()
    assert [section["title"] for section in stored["sections"]] == TITLES
    for section in stored["sections"]:
        assert section["rows"], section["title"]
        assert not section["failed"] + section["left_out"]
        assert len({tuple(row) for row in section["rows"]}) == 1, "all rows of a table have the same columns"
        assert f"## {section['title']}" in page
    tests, correct, kernels, whole, graphs, answers = (section["rows"] for section in stored["sections"])
    assert tests[0]["failed"] == 0
    assert [row["same"] for row in correct] == [row["cells"] for row in correct] == [2]
    assert {"close_holes", "merge_rows", "attention_mass"} <= {row["op"] for row in kernels}
    assert [(row["policy"], row["batch"]) for row in whole][:3] == [
        ("dense", 1),
        ("uniform", 1),
        ("flowcut", 1),
    ]
    assert [row["policy"] for row in graphs] == ["dense", "none", "uniform"]
    assert all("need a CUDA device" in row["eager"] for row in graphs[1:]), (
        "nothing is captured on a CPU, and the page says so"
    )
    assert {row["batch"] for row in answers} == {1, 2}
    assert (tmp_path / "dry-run-on-a-cpu.png").stat().st_size > 1000
    assert stored["facts"]["commit"] == "abc"
    assert f"torch {torch.__version__}" in page


def test_a_row_is_on_the_page_at_once_and_a_broken_section_harms_no_other(tmp_path, monkeypatch):
    path, seen = tmp_path / "card", []

    def breaks(machine, section):
        yield {"what": "first", "ms": 1234.5}
        seen.append(path.with_suffix(".md").read_text())
        raise RuntimeError("no kernel image\nand more")

    def works(machine, section):
        yield {"what": "a|b", "ms": None}

    parts = [("Kernels", breaks, 0.5), ("Answers", works, 0.5)]
    monkeypatch.setattr(gpu, "sections", lambda dry: parts)
    page = gpu.Page(path, "a card", {"commit": "abc"})
    gpu.measure(page, "cpu", 1.0)
    assert "| first | 1234 |" in seen[0] or "| first | 1235 |" in seen[0]
    last = path.with_suffix(".md").read_text()
    assert "**Failed:** RuntimeError: no kernel image\n" in last
    assert "| a\\|b |  |" in last


def test_what_differs_from_the_cpu_fails(monkeypatch):
    from tests import models

    def broken(family):
        model = models.peaky(models.FAMILIES[family].build(), "sdpa", 0)
        model.__class__ = type(model.__class__.__name__, (model.__class__,), {"__deepcopy__": other})
        return model

    def other(self, memo):
        return models.peaky(models.FAMILIES["llava"].build(), "sdpa", 1)

    monkeypatch.setattr(models, "make", broken)
    section = gpu.Section("Against the CPU", "")
    (row,) = gpu.correctness(gpu.Machine("cpu", time.monotonic() + 60), section)
    assert row["same"] == 0
    assert len(section.failed) == 2
    assert "uniform on llava: logits off by" in section.failed[0]


def test_a_section_ends_when_its_time_is_up():
    section, late = gpu.Section("", ""), gpu.Machine("cpu", time.monotonic() - 1)
    assert len(list(gpu.whole_calls(late, section, {1: (1, ("uniform", "flowcut"))}))) == 1
    assert list(gpu.answers(late, section, (1,), 2)) == []
    assert section.left_out == [
        "what follows dense at batch 1, for want of time",
        "batch 1 and what follows, for want of time",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = run("--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "sees no CUDA device" in done.output
    assert "--dry-run" in done.output
    assert not (tmp_path / "out").exists()


def test_it_says_where_it_has_to_be_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("--dry-run", "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "root of a clone" in done.output


def test_it_starts_where_few_packages_are():
    code = (
        "import sys, torch, transformers\n"
        "from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration\n"
        "known = set(sys.modules)\n"
        "import vlm_prune.eval.bench.gpu\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - known} - set(sys.stdlib_module_names))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    foreign = set(ran.stdout.split()) - {"torch", "transformers"}
    unexpected = {"matplotlib", "pandas", "scipy", "datasets", "torchvision", "hypothesis", "pycocotools"}
    assert "vlm_prune" in foreign
    assert not foreign & unexpected


def test_bars_are_over_the_eager_stock_call(tmp_path):
    whole = [
        {"policy": "dense", "batch": 1, "over stock": 1.0, "peak MiB": 100.0},
        {"policy": "uniform", "batch": 1, "over stock": 1.25, "peak MiB": 25.0},
        {"policy": "flowcut", "batch": 16, "over stock": 0.5, "peak MiB": 50.0},
    ]
    graphs = [
        {"policy": "dense", "batch": 1, "over stock": 1.0, "peak MiB": 100.0, "captured": ""},
        {"policy": "none", "batch": 1, "over stock": 0.5, "peak MiB": 90.0, "captured": "vision tower"},
        {"policy": "uniform", "batch": 1, "over stock": 0.25, "peak MiB": 20.0, "captured": "vision tower"},
        {"policy": "flowcut", "batch": 1, "over stock": 1.5, "peak MiB": 20.0, "captured": ""},
    ]
    sections = [{"title": "Whole calls", "rows": whole}, {"title": "Captured calls", "rows": graphs}]
    page = {"title": "a card", "facts": {"commit": "abc", "calls": "x"}, "sections": sections}
    rows = bars.whole_calls(page)
    assert bars.times(rows) == {
        "batch 1, eager": {"uniform": 1.25},
        "batch 16, eager": {"flowcut": 0.5},
        "batch 1, captured": {"none": 0.5, "uniform": 0.25},
    }
    assert bars.memory(rows) == {
        "batch 1, eager": {"uniform": 0.25},
        "batch 1, captured": {"none": 0.9, "uniform": 0.2},
    }
    (tmp_path / "card.json").write_text(json.dumps(page))
    bars.main([str(tmp_path / "card.json")])
    assert (tmp_path / "card.png").stat().st_size > 1000
