"""The demo, small: rows are complete and true to what was asked for, files are written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vlm_prune.eval import demo_report
from vlm_prune.eval.demo import DemoSettings
from vlm_prune.eval.models import model_path
from vlm_prune.eval.runs import RunFolder
from vlm_prune.eval.runs.cells import build_cells

KEYS = {
    *("model", "policy", "ratio", "tokens", "pope_accuracy", "pope_f1", "chair_s", "chair_i", "chair_recall"),
    *("caption_length", "prefill_ms", "kv_bytes", "n_questions", "n_captions", "seed"),
}
SMALL = DemoSettings(policies=("none", "flowcut"), ratios=(1.0, 0.25), scenes=4, rounds=1)

weights = pytest.mark.skipif(
    not all((model_path(name) / "model.safetensors").exists() for name in SMALL.models),
    reason="the package was installed without the weights of the test models",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, screen = tmp_path_factory.mktemp("demo") / "new", io.StringIO()
    rows = demo_report.demo(SMALL, folder, Console(file=screen, width=80))
    return rows, folder, screen.getvalue()


def settings(config) -> list[tuple[str, str, float | None]]:
    """Model, policy and ratio of every row that is due."""
    cells = build_cells(config)
    return list(
        dict.fromkeys((cell.model.name, cell.entry.name, cell.budget.get("ratio", 1.0)) for cell in cells)
    )


@weights
def test_every_cell_is_there_once(finished, tmp_path):
    rows, folder, _ = finished
    assert [(row["model"], row["policy"], row["ratio"]) for row in rows] == settings(SMALL.config(tmp_path))
    saved = json.loads((folder / "results.json").read_text())
    assert saved == rows
    assert all(set(row) >= KEYS for row in saved)


@weights
def test_rows_say_what_ran(finished):
    rows = {(row["model"], row["policy"], row["ratio"]): row for row in finished[0]}
    assert rows["tiny-llava", "flowcut", 0.25]["tokens"] == 64
    assert rows["tiny-llava", "none", 1.0]["tokens"] == 256
    for (model, policy, ratio), row in rows.items():
        assert row["n_questions"] == 24
        assert row["n_captions"] == 4
        assert 0 < row["prefill_ms"] < row["answer_ms"]
        whole = rows[model, "none", 1.0]
        assert row["tokens"] == ratio * whole["tokens"]
        assert (row["kv_bytes"] < whole["kv_bytes"]) == (ratio < 1)
        if ratio == 1:
            same = (
                "pope_f1",
                "pope_accuracy",
                "chair_s",
                "chair_i",
                "chair_recall",
                "caption_length",
                "kv_bytes",
            )
            assert all(row[name] == whole[name] for name in same), policy


@weights
def test_honest_models_answer_well_with_all_tokens(finished):
    for row in finished[0]:
        if row["ratio"] == 1:
            assert row["pope_f1"] > 0.85
            assert row["chair_recall"] > 0.8


@weights
def test_the_demo_is_a_run(finished):
    rows, folder, _ = finished
    run = RunFolder(folder / "run")
    figures = {
        (row["model"], row["policy"], *row["budget"].values()): row
        for row in run.rows()
        if row["kind"] == "pope"
    }
    assert figures["tiny-llava", "flowcut", 0.25]["metrics"]["f1"] == rows[2]["pope_f1"]
    assert run.times().keys() == {row["cell"] for row in run.rows() if row["kind"] == "speed"}


@weights
def test_picture_and_table_are_shown(finished):
    rows, folder, screen = finished
    with Image.open(folder / "kept.png") as picture:
        assert min(picture.size) > 200
    assert "results.json" in screen
    assert "kept.png" in screen
    assert all(len(line) <= 80 for line in screen.splitlines() if "wrote" not in line)
    assert demo_report.markdown(rows).count("\n") == 1 + len(SMALL.models) * len(SMALL.ratios)


@weights
def test_a_second_demo_measures_again(tmp_path):
    small = SMALL.replaced(models=("tiny-llava",), policies=("flowcut",), ratios=(0.25,))
    for seed in (1, 2):
        rows = demo_report.demo(small.replaced(seed=seed), tmp_path, Console(file=io.StringIO()))
        assert [row["seed"] for row in rows] == [seed]
        assert len(RunFolder(tmp_path / "run").rows()) == 3


@weights
def test_policies_without_a_budget_run_once(tmp_path):
    whole = settings(DemoSettings(models=("tiny-llava",)).config(tmp_path))
    assert len(whole) == 16
    assert [cell for cell in whole if cell[1] == "none"] == [("tiny-llava", "none", 1.0)]
    mixed = DemoSettings(models=("tiny-llava",), policies=("vhr", "flowcut+vhr"), ratios=(0.5,))
    assert settings(mixed.config(tmp_path)) == [
        ("tiny-llava", "vhr", 1.0),
        ("tiny-llava", "flowcut+vhr", 0.5),
    ]
    assert DemoSettings().quick().scenes <= DemoSettings().scenes / 4


@weights
def test_the_first_snippet_of_the_readme_runs(capsys):
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    begin = lines.index("```python")
    end = lines.index("```", begin)
    assert end < 40
    exec("\n".join(lines[begin + 1 : end]), {})
    assert "kept 64 of 256 visual tokens per image" in capsys.readouterr().out
