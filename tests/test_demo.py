"""The demo, small: rows are complete and true to what was asked for, files are written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vlm_prune.eval import demo_report
from vlm_prune.eval.demo import DemoSettings, f1_interval, run
from vlm_prune.eval.measure import Setting, batches
from vlm_prune.eval.models import model_path

KEYS = {
    *("model", "policy", "ratio", "tokens", "pope_accuracy", "pope_f1", "chair_s", "chair_i", "chair_recall"),
    *("caption_length", "prefill_ms", "kv_bytes", "n_questions", "n_captions", "seed"),
}
SMALL = DemoSettings(policies=("none", "flowcut", "random"), ratios=(1.0, 0.25), scenes=4, rounds=1)

weights = pytest.mark.skipif(
    not all((model_path(name) / "model.safetensors").exists() for name in SMALL.models),
    reason="the package was installed without the weights of the test models",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, screen = tmp_path_factory.mktemp("demo") / "new", io.StringIO()
    rows = demo_report.demo(SMALL, folder, Console(file=screen, width=80))
    return rows, folder, screen.getvalue()


@weights
def test_every_cell_is_there_once(finished):
    rows, folder, _ = finished
    cells = [(name, cell.policy, cell.ratio) for name in SMALL.models for cell in SMALL.cells()]
    assert [(row.model, row.policy, row.ratio) for row in rows] == cells
    saved = json.loads((folder / "results.json").read_text())
    assert len(saved) == len(rows)
    assert all(set(row) >= KEYS for row in saved)


@weights
def test_rows_say_what_ran(finished):
    rows = {(row.model, row.policy, row.ratio): row for row in finished[0]}
    assert rows["tiny-llava", "flowcut", 0.25].tokens == 64
    assert rows["tiny-llava", "none", 1.0].tokens == 256
    for (model, policy, ratio), row in rows.items():
        assert row.n_questions == 24
        assert row.n_captions == 4
        assert 0 < row.prefill_ms < row.answer_ms
        whole = rows[model, "none", 1.0]
        assert row.tokens == ratio * whole.tokens
        assert (row.kv_bytes < whole.kv_bytes) == (ratio < 1)
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
            assert all(getattr(row, name) == getattr(whole, name) for name in same), policy


@weights
def test_honest_models_answer_well_with_all_tokens(finished):
    for row in finished[0]:
        if row.ratio == 1:
            assert row.pope_f1 > 0.85
            assert row.chair_recall > 0.8


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
def test_progress_adds_up():
    settings = SMALL.replaced(models=("tiny-llava",), policies=("none",))
    heard: list[int] = []
    assert len(list(run(settings, lambda what, done: heard.append(done)))) == 1
    assert sum(heard) == settings.prompts


def test_none_is_run_once():
    assert [cell for cell in DemoSettings().cells() if cell.policy == "none"] == [Setting("none", 1.0)]
    assert len(DemoSettings().cells()) == 16
    mixed = DemoSettings(policies=("vhr", "flowcut+vhr"), ratios=(0.5,))
    assert mixed.cells() == [Setting("vhr", None), Setting("flowcut+vhr", 0.5)]
    assert DemoSettings().quick().prompts < DemoSettings().prompts / 4


def test_batches_hold_one_size_first():
    wide, small = Image.new("RGB", (256, 128)), Image.new("RGB", (128, 128))
    prompts = [(wide, "long question"), (small, "a"), (wide, "b"), (small, "longer"), (small, "c")]
    found = list(batches(prompts, 3))
    assert found == [[1, 4, 3], [2, 0]]


def test_interval_holds_the_figure():
    questions = [{"image": i // 2, "label": ("yes", "no")[i % 2]} for i in range(40)]
    said = [i % 2 == 0 and i % 10 != 0 for i in range(40)]
    low, high = f1_interval(questions, said)
    assert low < 2 * 16 / (2 * 16 + 4) < high
    assert f1_interval(questions, [False] * 40) == (0, 0)


@weights
def test_the_first_snippet_of_the_readme_runs(capsys):
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    begin = lines.index("```python")
    end = lines.index("```", begin)
    assert end < 40
    exec("\n".join(lines[begin + 1 : end]), {})
    assert "kept 64 of 256 visual tokens per image" in capsys.readouterr().out
