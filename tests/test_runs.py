"""A run: complete on disk, resumable after a kill without repeating a sample, the same over two processes."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlm_prune.cli import app
from vlm_prune.eval.models import model_path
from vlm_prune.eval.runs import RunFolder, asking, run
from vlm_prune.eval.runs.parts import add_part, read_parts
from vlm_prune.eval.runs.tasks import Task
from vlm_prune.eval.runs.yaml_file import parse_config
from vlm_prune.eval.scenes import make_scenes

pytestmark = pytest.mark.skipif(
    not (model_path("tiny-llava") / "model.safetensors").exists(),
    reason="the package was installed without the weights of the test models",
)

TEXT = """\
models: [tiny-llava]
policies: [flowcut, {policy: random, settings: {seed: 3}}]
ratios: [0.25]
tasks:
  - {task: pope, data: &scenes {scenes: 4}, splits: [adversarial, random], max_new_tokens: 2}
  - {task: chair, data: *scenes, max_new_tokens: 24}
batch_size: 4
output: OUTPUT
"""
KINDS = {get_args(kind.model_fields["task"].annotation)[0] for kind in get_args(get_args(Task)[0])}
"""All kinds of tasks that a file may name."""
SPEED = "tasks:\n  - {task: speed, data: {scenes: 2}, rounds: 1, prompts: 1}\n"


def config(output: Path, text: str = TEXT):
    return parse_config(text.replace("OUTPUT", str(output)), "run.yaml")


def execute(output: Path, text: str = TEXT, **options) -> tuple[run.Run, str]:
    screen = io.StringIO()
    return run.execute(
        config(output, text), Console(file=screen, width=200), text, **options
    ), screen.getvalue()


def note_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of all samples that are asked from now on, as they are."""
    asked: list[str] = []
    ask = asking.ask
    monkeypatch.setattr(
        run,
        "ask",
        lambda loaded, batch, *rest: asked.extend(s.id for s in batch) or ask(loaded, batch, *rest),
    )
    return asked


def start(folder: Path, output: Path, text: str = TEXT, **variables: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(text.replace("OUTPUT", str(output)))
    command = [sys.executable, "-m", "vlm_prune", "run", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def contents(folder: Path) -> dict[str, bytes]:
    """What must not differ from one run of a config to another."""
    names = ["results.json", *(str(p.relative_to(folder)) for p in folder.glob("cells/*/samples.jsonl"))]
    return {name: (folder / name).read_bytes() for name in names}


def on_disk(output: Path) -> int:
    """Samples that a run has answered so far, those of a cell that is just being finished twice."""
    done = [line for path in output.glob("cells/*/samples.jsonl") for line in path.read_text().splitlines()]
    return len(done) + sum(len(read_parts(path)) for path in output.glob("cells/*"))


def kill(process: subprocess.Popen[bytes], output: Path, enough: int, later: float = 0.0) -> bool:
    """End a run without warning, ``later`` seconds after it has ``enough`` samples; False if it was finished before."""
    until = time.monotonic() + 300
    while on_disk(output) < enough and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(later)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    execute(folder)
    return folder


def test_rows_and_records_are_complete(whole):
    folder = RunFolder(whole)
    rows = folder.rows()
    assert [(row["policy"], row["kind"], row["n"]) for row in rows] == [
        ("flowcut", "pope", 48), ("flowcut", "chair", 4), ("random", "pope", 48), ("random", "chair", 4),
    ]  # fmt: skip
    for row in rows:
        assert (row["tokens"], row["visual_tokens"], row["budget"]) == (64, 256, {"ratio": 0.25})
        records = folder.samples(row["cell"])
        assert len({record["id"] for record in records}) == len(records) == row["n"]
        for record in records:
            (tile,) = record["tiles"]
            assert (tile["box"], tile["grid"], len(tile["kept"])) == ([0, 0, 128, 128], [16, 16], 64)
            assert folder.image(record).size == tuple(record["image"]["size"])
            for mention in record["scores"].get("mentions", ()):
                begin, end = mention["span"]
                assert record["answer"][begin:end].startswith(mention["word"])
        if row["kind"] == "pope":
            right = sum(record["scores"]["correct"] for record in records)
            assert row["metrics"]["accuracy"] == pytest.approx(right / row["n"])
    assert (whole / "config.yaml").read_text() == TEXT
    assert "## tiny-llava" in (whole / "results.md").read_text()
    assert (whole / "report.html").read_text(encoding="utf-8").count("<tr data-model=") == 2
    assert not list(whole.glob("cells/*/part-*")) + list(whole.glob("**/*.new"))


def test_a_finished_run_asks_nothing_again(whole, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(run, "load", lambda *given: pytest.fail("a model was loaded"))
    done, screen = execute(whole)
    assert "4 cells, 4 of them finished already" in screen
    assert contents(whole) == before
    assert not done.failed


def test_a_killed_run_goes_on_where_it_was(whole, tmp_path, monkeypatch):
    output = tmp_path / "run"
    process = start(tmp_path, output)
    kill(process, output, random.Random(os.getpid()).randint(1, 60))  # of 104 samples
    # a cell's samples are on disk before its parts go, so between the two they count twice
    known = {
        (path.name, name)
        for path in output.glob("cells/*")
        for name in [*read_parts(path), *(r["id"] for r in _finished(path))]
    }
    assert known, "killed too early to mean anything"

    asked = note_asked(monkeypatch)
    execute(output)
    assert contents(output) == contents(whole)
    assert len(asked) == 104 - len(known)


def _finished(cell: Path) -> list[dict]:
    path = cell / "samples.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines()] if (cell / "row.json").exists() else []
    )


@pytest.mark.parametrize(
    ("file", "damage", "message", "asked"),
    [
        ("row.json", lambda text: "", "row.json is empty", 0),
        ("row.json", lambda text: text[: len(text) // 2], "not JSON", 0),
        ("row.json", lambda text: "{}", "is not the row of this cell", 0),
        ("samples.jsonl", lambda text: text[:-9], "samples.jsonl has 47 of 48 samples", 1),
        ("samples.jsonl", lambda text: "\0" * 100 + text[100:], "samples.jsonl has 47 of 48 samples", 1),
        ("samples.jsonl", None, "samples.jsonl has 0 of 48 samples", 48),
    ],
)
def test_a_finished_cell_that_is_not_whole_is_done_again(
    whole, tmp_path, monkeypatch, file, damage, message, asked
):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    path = output / "cells" / RunFolder(output).rows()[0]["cell"] / file
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text()))
    again = note_asked(monkeypatch)
    done, screen = execute(output)
    (line,) = [line for line in screen.splitlines() if "1 finished cells are not whole" in line]
    assert message in line
    assert not done.failed
    assert contents(output) == contents(whole)
    assert len(again) == asked


def in_two_processes(folder: Path, output: Path, text: str = TEXT) -> None:
    """The command as torchrun starts it; both processes have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [start(folder / rank, output, text, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]
    try:
        for process in both:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in both:
            process.kill()
    assert not list(output.glob("cells/*/part-*"))


def test_two_processes_are_as_good_as_one(whole, tmp_path):
    output = tmp_path / "run"
    in_two_processes(tmp_path, output)
    assert contents(output) == contents(whole)


EVERY_KIND = """\
models: [tiny-llava]
policies: [flowcut]
ratios: [0.25]
batch_size: 4
tasks:
  - {task: pope, data: &scenes {scenes: 3}, splits: [random], max_new_tokens: 2}
  - {task: chair, data: *scenes, max_new_tokens: 8}
  - {task: speed, data: *scenes, rounds: 1, prompts: 1}
  - {task: pope, label: own pope, data: &own {jsonl: ROWS}, max_new_tokens: 2}
  - {task: chair, label: own chair, data: *own, max_new_tokens: 8}
  - {task: vqa, data: *own, max_new_tokens: 2}
  - {task: vqa, label: vqa of ten, metric: vqa, data: *own, max_new_tokens: 2}
  - {task: speed, label: own speed, data: *own, rounds: 1, prompts: 2}
  - {task: amber_g, data: *own, annotations: FOLDER/shown.json, relations: FOLDER/relation.json, max_new_tokens: 8}
  - {task: amber_d, data: *own, annotations: FOLDER/questions.json, max_new_tokens: 2}
  - {task: choice, data: {jsonl: FOLDER/choice.jsonl}, max_new_tokens: 2}
  - {task: judged, judge: "tests.test_runs_data:length", data: *own, max_new_tokens: 2}
  - {task: mme, data: {jsonl: FOLDER/mme.jsonl}, max_new_tokens: 2}
output: OUTPUT
"""


def test_every_kind_of_task_over_two_processes(tmp_path):
    rows = []
    for number, scene in enumerate(make_scenes(5, 3, [(128, 128)], min_names=3)):
        scene.image.save(tmp_path / f"{number}.png")
        # an odd number of rows: with batches of 4, the second process has the smaller share
        rows.append(
            {
                "id": number, "image": str(tmp_path / f"{number}.png"), "objects": ["dog", "cat"],
                "question": f"Is there a {scene.names[0]} in the image?", "answer": "yes",
            }
        )  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    shown = [{"id": row["id"], "type": "generative", "truth": ["dog"], "hallu": ["cat"]} for row in rows]
    (tmp_path / "shown.json").write_text(json.dumps(shown))
    asked = [{"id": row["id"], "type": "discriminative-relation", "truth": "no"} for row in rows]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    (tmp_path / "relation.json").write_text(json.dumps({"dog": ["puppy"], "cat": []}))
    pairs = [{**row, "answer": answer, "category": "count"} for row in rows for answer in ("yes", "no")]
    lettered = [{**row, "answer": "A", "A": "a dog", "B": "a cat"} for row in rows]
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, lettered)))
    (tmp_path / "mme.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    text = EVERY_KIND.replace("ROWS", str(path)).replace("FOLDER", str(tmp_path))
    in_two_processes(tmp_path, tmp_path / "two", text)
    alone, _ = execute(tmp_path / "one", text)
    assert not alone.failed
    found = RunFolder(tmp_path / "two").rows()
    assert {row["kind"] for row in found} == KINDS
    assert len(found) == 13
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert [*RunFolder(tmp_path / "two").times()] == [row["cell"] for row in found if row["kind"] == "speed"]


@pytest.mark.slow
def test_torchrun_and_a_run_killed_over_and_over(whole, tmp_path):
    path, output = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(TEXT.replace("OUTPUT", str(output)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, "-m", "vlm_prune", "run", str(path)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert contents(output) == contents(whole)
    again, draw = tmp_path / "again", random.Random(5)
    while kill(process := start(tmp_path, again), again, on_disk(again) + 1, draw.uniform(0, 0.5)):
        pass
    assert process.returncode == 0
    assert contents(again) == contents(whole)


def test_batch_size_changes_nothing(whole, tmp_path):
    execute(tmp_path, TEXT.replace("batch_size: 4", "batch_size: 32"))
    assert contents(tmp_path) == contents(whole)


def test_a_torn_line_is_no_record(tmp_path):
    add_part(tmp_path, 0, [{"id": "a"}, {"id": "b"}])
    with (tmp_path / "part-0.jsonl").open("a") as file:
        file.write('\n[{"id": "c"}, {"i')
    add_part(tmp_path, 0, [{"id": "d"}])
    add_part(tmp_path, 1, [{"id": "e"}])
    assert sorted(read_parts(tmp_path)) == ["a", "b", "d", "e"]


def test_a_failed_cell_is_reported_and_the_rest_goes_on(tmp_path):
    text = TEXT.replace("[flowcut,", "[{policy: flowcut, tokens: [999]}, none,").replace(
        "models: [tiny-llava]", f"models: [{{model: {tmp_path}/missing, label: gone}}, tiny-llava]"
    )
    text = text[: text.index("tasks:")] + SPEED + "output: OUTPUT\n"
    done, screen = execute(tmp_path / "run", text)
    folder = RunFolder(tmp_path / "run")
    assert [(row["model"], row["policy"]) for row in folder.rows()] == [
        ("tiny-llava", "none"),
        ("tiny-llava", "random"),
    ]
    failed = json.loads((tmp_path / "run" / "failed.json").read_text())
    assert [(row["model"], row["policy"]) for row in failed] == [
        ("gone", "flowcut"), ("gone", "none"), ("gone", "random"), ("tiny-llava", "flowcut"),
    ]  # fmt: skip
    assert "BudgetError" in failed[-1]["error"]
    assert "Traceback" in failed[-1]["traceback"]
    assert "2 of 6 cells" in screen
    assert "4 failed" in screen
    assert len(done.failed) == 4


def test_brackets_in_labels_errors_and_answers_are_shown_as_they_are(tmp_path, monkeypatch):
    ask = asking.ask

    def chatty(*given):
        return [record | {"answer": "Sure [/INST] it is"} for record in ask(*given)]

    monkeypatch.setattr(run, "ask", chatty)
    text = f"""\
models: [{{model: "{tmp_path}/gone[/models]", label: "gone[/models]"}}, {{model: tiny-llava, label: "[bold]"}}]
policies: [{{policy: none, label: "all[/]"}}]
tasks: [{{task: pope, label: "pope[/x]", data: {{scenes: 3}}, splits: [random], max_new_tokens: 2, parser: strict}}]
output: "{tmp_path}/run[/out]"
"""
    done, screen = execute(tmp_path, text)
    assert len(done.failed) == 1
    assert "gone[/models]" in screen
    assert "[bold] all[/] pope[/x]" in screen
    assert "Sure [/INST] it is" in screen
    assert f"look at {tmp_path}/run[/out]/report.html" in screen
    assert (tmp_path / "run[" / "out]" / "report.html").exists()


def test_times_are_kept_apart_and_can_be_taken_again(tmp_path):
    text = TEXT[: TEXT.index("tasks:")] + SPEED + "output: OUTPUT\n"
    execute(tmp_path, text)
    folder = RunFolder(tmp_path)
    before, times = (tmp_path / "results.json").read_bytes(), folder.times()
    assert b"_ms" not in before
    for row in folder.rows():
        assert 0 < row["metrics"]["kv_bytes"] < row["metrics"]["kv_bytes_dense"]
        assert 0 < row["metrics"]["flops"] < row["metrics"]["flops_dense"]
        assert 0 < times[row["cell"]]["prefill_ms"] < times[row["cell"]]["answer_ms"]
    execute(tmp_path, text)
    assert folder.times() == times
    (tmp_path / "cells" / folder.rows()[0]["cell"] / "times.json").write_text("")
    _, screen = execute(tmp_path, text)
    assert "times.json is empty" in screen
    assert set(folder.times()) == set(times)
    times = folder.times()
    done, _ = execute(tmp_path, text, retime=True)
    assert folder.times() != times
    assert (tmp_path / "results.json").read_bytes() == before
    (line, _) = done.lines()
    assert line["kv_ratio"] < 0.5
    assert line["prefill_ms"] == folder.times()[folder.rows()[0]["cell"]]["prefill_ms"]


def test_the_command_tells_by_its_exit_code(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TEXT.replace("policies", "polices"))
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 2
    assert 'Did you mean "policies"?' in result.output
    good = TEXT[: TEXT.index("tasks:")] + SPEED + f"output: {tmp_path}/run\n"
    path.write_text(good.replace("[flowcut,", "[{policy: flowcut, tokens: [999]},"))
    result = CliRunner().invoke(app, ["run", str(path), "--output", str(tmp_path / "other")])
    assert result.exit_code == 1
    assert "1 of 2 cells" in result.output
    assert "BudgetError" in result.output
    assert len(RunFolder(tmp_path / "other").rows()) == 1
