"""The plug-in under lmms-eval itself, end to end and offline: `make test-lmms`, which installs lmms-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="make test-lmms installs lmms-eval and runs this")

from vlm_prune.cli import app
from vlm_prune.eval.scenes import PLURALS, make_scenes, pope_questions

pytestmark = pytest.mark.slow
SPLITS = ("random", "popular", "adversarial")
PRUNED = "pretrained=tiny-internvl,dtype=float32,policy=flowcut,tokens=16"


@pytest.fixture(scope="module")
def scenes():
    return list(make_scenes(5, 7, [(128, 128), (256, 128), (128, 192)], min_names=3))


@pytest.fixture(scope="module")
def data(scenes, tmp_path_factory) -> Path:
    """Images, POPE questions and object lists in the benchmarks' own forms; POPE as a saved data set too."""
    import datasets

    folder = tmp_path_factory.mktemp("data")
    for n, scene in enumerate(scenes):
        scene.image.save(folder / f"scene-{n}.png")
    for split in SPLITS:
        rows = [{**row, "image": f"scene-{row['image']}.png"} for row in pope_questions(scenes, split, 7)]
        (folder / f"pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = [
        {
            "question_id": r["question_id"],
            "image": scenes[r["image"]].image,
            "question": r["text"],
            "answer": r["label"],
        }
        for r in pope_questions(scenes, "random", 7)
    ]
    features = datasets.Features(
        question_id=datasets.Value("int64"),
        image=datasets.Image(),
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
    )
    datasets.DatasetDict(test=datasets.Dataset.from_list(saved, features)).save_to_disk(folder / "saved")
    objects = [{"image": f"scene-{n}.png", "objects": list(scene.names)} for n, scene in enumerate(scenes)]
    (folder / "objects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    (folder / "words.txt").write_text("[objects]\n" + "".join(f"{k}: {v}\n" for k, v in PLURALS.items()))
    return folder


@pytest.fixture(scope="module")
def tasks(data) -> Path:
    """Our tasks on these files."""
    arguments = ["lmms-tasks", "--images", str(data), "--out", str(data / "tasks"), "--post-prompt", ""]
    for split in SPLITS:
        arguments += ["--pope", str(data / f"pope_{split}.json")]
    arguments += ["--chair", str(data / "objects.jsonl"), "--vocabulary", str(data / "words.txt")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


def lmms_eval(out: Path, include: Path, model_args: str, names: str, *more: str, processes: int = 1) -> Any:
    """The results file of a run of the command line. Its exit code says nothing: it is 0 after any error."""
    command = [sys.executable, "-m", "lmms_eval"]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        command += ["-m", "lmms_eval"]
    command += ["--model", "vlm_prune", "--model_args", model_args, "--tasks", names]
    command += ["--include_path", str(include), "--output_path", str(out), "--log_samples", *more]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment = {**os.environ, **offline, "ACCELERATE_USE_CPU": "true", "HF_HOME": str(out.parent / "hf")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    files = list(out.rglob("*_results.json"))
    assert len(files) == 1, ran.stdout[-3000:] + ran.stderr[-3000:]
    samples = {
        file.stem.partition("_samples_")[2]: [json.loads(line) for line in file.read_text().splitlines()]
        for file in out.rglob("*_samples_*.jsonl")
    }
    return json.loads(files[0].read_text()), samples


def figures(found: Any) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in row.items() if k != "alias"} for name, row in found[0]["results"].items()}


@pytest.fixture(scope="module")
def one_process(tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    return lmms_eval(out, tasks, PRUNED, "vlm_prune_pope,vlm_prune_chair", "--batch_size", "4")


def test_the_command_line_scores_our_tasks(one_process):
    found, samples = one_process
    results = found["results"]
    splits = [results[f"vlm_prune_pope_{split}"] for split in SPLITS]
    for rate in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        mean = sum(row[f"{rate},none"] for row in splits) / 3
        assert results["vlm_prune_pope"][f"{rate},none"] == pytest.approx(mean)
    assert results["vlm_prune_pope"]["f1,none"] > 0.6
    assert results["vlm_prune_chair"]["recall,none"] > 0.3
    assert results["vlm_prune_chair"]["length,none"] > 5
    assert found["throughput"]["avg_visual_tokens_per_image"] < 16 * 4
    assert found["config"]["batch_size"] in (4, "4")
    for split in SPLITS:
        rows = samples[f"vlm_prune_pope_{split}"]
        assert len(rows) == 30
        right = sum(row["filtered_resps"].strip().lower() == row["target"] for row in rows)
        assert results[f"vlm_prune_pope_{split}"]["accuracy,none"] == pytest.approx(right / 30)


def test_two_processes_equal_one(one_process, tasks, tmp_path):
    two = lmms_eval(
        tmp_path / "out", tasks, PRUNED, "vlm_prune_pope,vlm_prune_chair", "--batch_size", "3", processes=2
    )
    assert figures(two) == figures(one_process)
    for name, rows in one_process[1].items():
        said = {row["doc_id"]: row["filtered_resps"] for row in rows}
        assert {row["doc_id"]: row["filtered_resps"] for row in two[1][name]} == said


def test_dense_from_a_saved_data_set_and_plain_text(data, tmp_path):
    tasks = CliRunner().invoke(
        app, ["lmms-tasks", "--pope", str(data / "saved"), "--out", str(tmp_path / "t"), "--post-prompt", ""]
    )
    found, samples = lmms_eval(
        tmp_path / "out",
        Path(tasks.stdout.strip()),
        "pretrained=tiny-llava,policy=none,dtype=float32",
        "vlm_prune_pope",
        "--batch_size",
        "4",
        "--force_simple",
    )
    assert found["config"]["model_backend"].startswith("vlm_prune.eval.lmms.model.VlmPruneSimple")
    assert found["results"]["vlm_prune_pope"]["accuracy,none"] > 0.9
    assert found["throughput"]["avg_visual_tokens_per_image"] == 256
    assert {row["filtered_resps"].strip().lower() for row in samples["vlm_prune_pope"]} == {"yes", "no"}


# --- other kinds of tasks, by the Python interface ---

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
doc_to_visual: !function tests.lmms_tasks.visuals
doc_to_target: answer
"""
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: !function tests.lmms_tasks.question
doc_to_choice: ["no", "yes"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "likely": """
output_type: loglikelihood
doc_to_text: !function tests.lmms_tasks.question
process_results: !function tests.lmms_tasks.likelihood_results
metric_list:
  - {metric: total, aggregation: !function tests.lmms_tasks.mean, higher_is_better: true}
  - {metric: greedy, aggregation: !function tests.lmms_tasks.mean, higher_is_better: true}
""",
    "talk": """
output_type: generate_until_multi_round
doc_to_text: !function tests.lmms_tasks.rounds
process_results: !function tests.lmms_tasks.round_results
generation_kwargs: {max_new_tokens: 3}
metric_list:
  - {metric: rounds, aggregation: !function tests.lmms_tasks.mean, higher_is_better: true}
  - {metric: said, aggregation: !function tests.lmms_tasks.mean, higher_is_better: true}
""",
    "write": """
output_type: generate_until
doc_to_text: !function tests.lmms_tasks.question
generation_kwargs: {max_new_tokens: 3, image_aspect_ratio: pad}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
""",
}


@pytest.fixture(scope="module")
def kinds(scenes, tmp_path_factory) -> Path:
    """One small task of each kind about any number of images."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = []
    for n, scene in enumerate(scenes):
        scene.image.save(folder / f"{n}.png")
    for question in pope_questions(scenes, "random", 3)[:12]:
        path = str(folder / f"{question['image']}.png")
        rows.append({"images": [path], "question": question["text"], "answer": question["label"]})
    rows[0]["images"] *= 2
    rows[1]["images"] = []
    rows = [{**row, "more_rounds": n % 3} for n, row in enumerate(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in KINDS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name) + body)
    return folder


def evaluate(folder: Path, names: list[str], model_args: str, size: int, simple: bool = True) -> Any:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(folder)], include_defaults=False, model_name="vlm_prune")
    return simple_evaluate(
        "vlm_prune",
        model_args=f"pretrained=tiny-llava,dtype=float32,{model_args}",
        tasks=names,
        batch_size=size,
        device="cpu",
        task_manager=manager,
        force_simple=simple,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize(
    "model_args", ["policy=none", "policy=flowcut+vhr,ratio=0.5,flowcut.compat=official"]
)
def test_likelihoods(kinds, model_args):
    alone, together = (evaluate(kinds, ["choice", "likely"], model_args, size) for size in (1, 4))
    # an image is missing from one row, and another shows it twice; the model was trained without the space
    assert alone["results"]["choice"]["acc,none"] >= 10 / 12
    assert alone["results"]["likely"]["greedy,none"] >= 10 / 12
    assert -1 < alone["results"]["likely"]["total,none"] < 0
    for name in ("choice", "likely"):
        for one, other in zip(alone["samples"][name], together["samples"][name], strict=True):
            for (a, greedy), (b, same) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert a == pytest.approx(b, abs=1e-3)
                assert greedy == same


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
def test_rounds_and_answers(kinds, simple):
    model_args = "policy=random,ratio=0.5,seed=1"
    alone, together = (evaluate(kinds, ["talk", "write"], model_args, size, simple) for size in (1, 5))
    assert alone["results"]["talk"]["rounds,none"] == 2
    assert alone["results"]["talk"]["said,none"] == 1
    assert alone["results"]["write"]["exact_match,none"] >= 9 / 12
    for name in ("talk", "write"):
        assert [s["filtered_resps"] for s in alone["samples"][name]] == [
            s["filtered_resps"] for s in together["samples"][name]
        ]


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ("policy=flowcutt", 'Did you mean "flowcut"'),
        ("policy=flowcut,tokenz=3", "no settings of a policy: pretrained"),
        ("tokens=300", "Choose 1 to 256"),
    ],
)
def test_wrong_arguments_stop_before_any_answer(kinds, model_args, message):
    with pytest.raises(ValueError, match=message):
        evaluate(kinds, ["write"], model_args, 1)
    with pytest.raises(ValueError, match="a number is needed"):
        evaluate(kinds, ["write"], "policy=none", "auto")  # type: ignore[arg-type]


def test_importing_the_package_imports_no_lmms_eval():
    code = "import sys, vlm_prune, vlm_prune.eval.lmms; print([m for m in sys.modules if m.startswith('lmms_eval')])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
