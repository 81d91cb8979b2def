"""Where a run's samples come from: scenes, jsonl, COCO, data sets on disk; and what each task makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.processors import llava_next, llava_onevision, qwen2_vl
from vlm_prune import pruned
from vlm_prune.eval.choice import read_choice
from vlm_prune.eval.measure import prompt_text
from vlm_prune.eval.models import load_model, model_path
from vlm_prune.eval.runs import RunFolder, run
from vlm_prune.eval.runs.asking import batches, tiles_of
from vlm_prune.eval.runs.images import Picture
from vlm_prune.eval.runs.models import Loaded
from vlm_prune.eval.runs.samples import Sample, build_samples
from vlm_prune.eval.runs.scoring import Scorer
from vlm_prune.eval.runs.tiles import Tiles
from vlm_prune.eval.runs.yaml_file import parse_config
from vlm_prune.eval.scenes import make_scene, make_scenes
from vlm_prune.eval.scenes.questions import CATEGORIES
from vlm_prune.eval.vqa import exact_accuracy, normalised, vqa_accuracy

weights = pytest.mark.skipif(
    not (model_path("tiny-internvl") / "model.safetensors").exists(),
    reason="the package was installed without the weights of the test models",
)


@pytest.fixture
def images(tmp_path):
    """Ten scenes as files, and what is in them."""
    folder = tmp_path / "images"
    folder.mkdir()
    scenes = list(make_scenes(10, 7, [(128, 128), (160, 128)], min_names=3))
    for number, scene in enumerate(scenes):
        scene.image.save(folder / f"{number}.png")
    return folder, scenes


def samples(task: str, **where) -> list[Sample]:
    text = f"models: [m]\npolicies: [none]\ntasks:\n  - {task}\noutput: out\n".replace("\\n", "\\\\n")
    for name, value in where.items():
        text = text.replace(name, str(value))
    config = parse_config(text, "run.yaml")
    return build_samples(config.tasks[0], "m", config.seed)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_pope_of_question_files(images, tmp_path):
    folder, _ = images
    for split in ("random", "popular"):
        rows = [
            {
                "question_id": i,
                "image": f"{i}.png",
                "text": f"Is there a {split}?",
                "label": ("Yes", "no")[i % 2],
            }
            for i in range(4)
        ]
        write_lines(tmp_path / f"coco_pope_{split}.json", rows)
    found = samples(
        "{task: pope, data: {jsonl: [FILE1, FILE2], images: IMAGES, limit: 3}, prompt: '{question} One word.'}",
        FILE1=tmp_path / "coco_pope_random.json", FILE2=tmp_path / "coco_pope_popular.json", IMAGES=folder,
    )  # fmt: skip
    assert [sample.id for sample in found] == [f"{s}/{i}" for s in ("random", "popular") for i in range(3)]
    assert found[1].question == "Is there a random? One word."
    assert [sample.label for sample in found[:3]] == ["yes", "no", "yes"]
    assert found[2].picture.file == (folder / "2.png").resolve()


def test_splits_of_one_file_are_told_by_its_category(images, tmp_path):
    rows = [
        {
            "question_id": i,
            "image": "0.png",
            "question": "?",
            "answer": "no",
            "category": ("random", "popular")[i % 2],
        }
        for i in range(4)
    ]
    path = write_lines(tmp_path / "q.jsonl", rows)
    found = samples(
        "{task: pope, data: {jsonl: FILE, images: IMAGES, limit: 1}}", FILE=path, IMAGES=images[0]
    )
    assert [(sample.split, sample.id) for sample in found] == [
        ("random", "random/0"),
        ("popular", "popular/1"),
    ]


def coco(folder: Path, scenes, also: int = 0) -> Path:
    """Annotation files about the scenes, and about images that are not there."""
    annotations = folder.parent / "annotations"
    annotations.mkdir()
    words = ["person", "dog", "car", "cat", "bus", "chair", "cup", "bowl", "book", "clock", "vase", "boat"]
    names = sorted({name for scene in scenes for name in scene.names})
    listed = [{"id": i, "file_name": f"{i}.png"} for i in range(len(scenes) + also)]
    objects = [
        {"image_id": i, "category_id": names.index(name)}
        for i, scene in enumerate(scenes)
        for name in scene.names
    ]
    categories = [{"id": i, "name": word} for i, word in enumerate(words[: len(names)])]
    instances = {"images": listed, "annotations": objects, "categories": categories}
    (annotations / "instances_val2014.json").write_text(json.dumps(instances))
    captions = [{"image_id": i, "caption": "A zebra."} for i in range(len(scenes))]
    (annotations / "captions_val2014.json").write_text(
        json.dumps({"images": listed, "annotations": captions})
    )
    return annotations


def test_coco_for_both_scores(images):
    folder, scenes = images
    annotations = coco(folder, scenes, also=3)
    where = {"COCO": annotations, "IMAGES": folder}
    asked = samples("{task: pope, data: {coco: COCO, images: IMAGES, count: 4}}", **where)
    assert len(asked) == 3 * 4 * 6
    assert len({sample.picture.file for sample in asked}) == 4
    assert not [sample for sample in asked if "zebra" in sample.question and sample.label == "no"]
    described = samples("{task: chair, data: {coco: COCO, images: IMAGES, count: 4}}", **where)
    assert [sample.picture.file for sample in described] == [
        sample.picture.file
        for sample in samples("{task: chair, data: {coco: COCO, images: IMAGES, count: 4}}", **where)
    ]
    assert all("zebra" in sample.label and len(sample.label) >= 4 for sample in described)
    (annotations / "ids.json").write_text("[3, 1]")
    listed = samples("{task: chair, data: {coco: COCO, images: IMAGES, image_ids: COCO/ids.json}}", **where)
    assert [sample.id for sample in listed] == ["3", "1"]
    (annotations / "ids.json").write_text("[11]")
    with pytest.raises(ValueError, match="there is no image"):
        samples("{task: chair, data: {coco: COCO, images: IMAGES, image_ids: COCO/ids.json}}", **where)


@pytest.mark.parametrize("there", ["{:012}.jpg", "COCO_val2014_{:012}.jpg", "COCO_train2014_{:012}.jpg"])
@pytest.mark.parametrize("named", ["{:012}.jpg", "COCO_val2014_{:012}.jpg", "val2017/{:012}.jpg"])
def test_images_of_coco_are_found_by_their_names_of_either_release(images, tmp_path, there, named):
    _, scenes = images
    folder = tmp_path / "coco"
    folder.mkdir()
    for number, scene in enumerate(scenes):
        scene.image.save(folder / there.format(number))
    rows = [{"question_id": 3, "image": named.format(3), "question": "?", "answer": "no"}]
    (found,) = samples(
        "{task: pope, data: {jsonl: FILE, images: IMAGES}}",
        FILE=write_lines(tmp_path / "q.jsonl", rows), IMAGES=folder,
    )  # fmt: skip
    assert found.picture.file == (folder / there.format(3)).resolve()
    annotations = coco(folder, scenes, also=2)
    path = annotations / "instances_val2014.json"
    listed = json.loads(path.read_text())
    listed["images"] = [{"id": i, "file_name": Path(named).name.format(i)} for i in range(12)]
    path.write_text(json.dumps(listed))
    for task in (
        "{task: chair, data: {coco: COCO, images: IMAGES, count: 10}}",
        "{task: pope, data: {coco: COCO, images: IMAGES}}",
    ):
        asked = samples(task, COCO=annotations, IMAGES=folder)
        assert {sample.picture.file.name for sample in asked} == {there.format(i) for i in range(10)}


def test_rows_of_a_table_with_commas(images, tmp_path):
    path = tmp_path / "coco_pope_random.csv"
    path.write_text(
        'question_id,image,text,label\n1,0.png,"Is there a dog, or not?",no\n2,1.png,Is it?,Yes\n'
    )
    found = samples("{task: pope, data: {jsonl: FILE, images: IMAGES}}", FILE=path, IMAGES=images[0])
    assert [(s.id, s.question, s.label) for s in found] == [
        ("1", "Is there a dog, or not?", "no"),
        ("2", "Is it?", "yes"),
    ]


def test_a_data_set_on_disk_keeps_its_images(images, tmp_path):
    datasets = pytest.importorskip("datasets")
    _, scenes = images
    table = datasets.Dataset.from_dict(
        {
            "questionId": [7, 8],
            "picture": [scene.image for scene in scenes[:2]],
            "query": ["How many?", "What?"],
            "answers": [["2", "two"], ["star"]],
        },
        features=datasets.Features(
            {
                "questionId": datasets.Value("int64"),
                "picture": datasets.Image(),
                "query": datasets.Value("string"),
                "answers": datasets.Sequence(datasets.Value("string")),
            }
        ),
    )
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "set"))
    task = "{task: vqa, data: {disk: DISK, split: train, columns: {image: picture}}}"
    found = samples(task, DISK=tmp_path / "set")
    assert [(sample.id, sample.label) for sample in found] == [("7", ["2", "two"]), ("8", ["star"])]
    assert found[0].question.startswith("How many?\n")
    assert np.array_equal(np.asarray(found[1].picture.load()), np.asarray(scenes[1].image))
    kept = found[1].picture.keep(tmp_path / "run")
    assert kept.startswith("images/")
    assert Image.open(tmp_path / "run" / kept).size == scenes[1].image.size
    with pytest.raises(ValueError, match="train, test"):
        samples("{task: vqa, data: {disk: DISK}}", DISK=tmp_path / "set")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{task: pope, data: {jsonl: none.jsonl}}", "does not exist"),
        ("{task: pope, data: {jsonl: FILE, images: IMAGES}}", "label 'maybe', 'yes' or 'no' is needed"),
        ("{task: chair, data: {jsonl: FILE, images: IMAGES}}", "objects is 'None', list is needed"),
        ("{task: vqa, data: {jsonl: FILE, images: IMAGES, columns: {answer: reply}}}", "no column 'reply'"),
        ("{task: vqa, data: {jsonl: FILE, images: IMAGES/nowhere}}", "there is no image"),
        (
            "{task: vqa, data: {jsonl: FILE, images: IMAGES, columns: {id: image}}}",
            "ids stand in several rows",
        ),
        ("{task: vqa, data: {scenes: 4}}", "a vqa task needs scenes of kind: desk"),
        ("{task: pope, data: {scenes: 4, kind: desk}}", "pope asks about kind: shapes"),
        (
            "{task: pope, data: {scenes: 1}}",
            r"1 scenes show 3 kinds of objects.*Take more scenes, 4 at least",
        ),
        ("{task: pope, data: {scenes: 1}, splits: [popular]}", "Take more scenes, 4 at least"),
        ("{task: vqa, data: {coco: IMAGES, images: IMAGES}}", "hold no questions"),
        ("{task: chair, data: {coco: IMAGES, images: IMAGES}}", "holds no instances_"),
        ("{task: vqa, data: {disk: IMAGES/nowhere}}", "is no folder"),
    ],
)
def test_missing_data_are_named(task, message, images, tmp_path):
    rows = [{"question_id": i, "image": "0.png", "question": "?", "answer": "maybe"} for i in range(2)]
    path = write_lines(tmp_path / "q.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        samples(task, FILE=path, IMAGES=images[0])


def test_the_hub_cannot_be_reached_here(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*given, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="lmms-lab/POPE could not be loaded"):
        samples("{task: pope, data: {hub: lmms-lab/POPE}}")


@pytest.mark.parametrize("ending", ["png", "jpg", "gif"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("as_file", [True, False])
def test_an_image_that_is_not_whole_is_named(tmp_path, ending, kept, as_file):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"torn.{ending}"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    if as_file:
        picture = Picture.of(path.name, tmp_path, "q.jsonl, row 3")
    else:
        value = {"bytes": content[: int(kept * len(content))] or b" ", "path": path.name}
        picture = Picture.of(value, None, "q.jsonl, row 3")
    with pytest.raises(ValueError, match=rf"torn\.{ending} \(q\.jsonl, row 3\) cannot be read: "):
        picture.load()


@weights
def test_a_cell_that_fails_for_an_image_names_it(images, tmp_path):
    folder, _ = images
    content = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(content[: len(content) // 2])
    rows = [{"id": i, "image": f"{i}.png", "question": "Is it?", "answer": "yes"} for i in range(2)]
    path = write_lines(tmp_path / "q.jsonl", rows)
    text = f"models: [tiny-internvl]\npolicies: [none]\noutput: {tmp_path}/run\n"
    text += f"tasks: [{{task: vqa, data: {{jsonl: {path}, images: {folder}}}, max_new_tokens: 2}}]\n"
    done = run.execute(parse_config(text, "run.yaml"), Console(file=io.StringIO()))
    (failure,) = done.failed.values()
    assert f"{folder.resolve()}/1.png ({path}, row 2) cannot be read" in failure["error"]


@weights
def test_a_model_folder_answers_a_file_of_questions(images, tmp_path):
    folder, scenes = images
    rows = [
        {"id": f"q{i}", "image": f"{i}.png", "question": "Is there a star in the image?", "answer": answer}
        for i, answer in enumerate("Yes" if "star" in scene.names else ["no", "none"] for scene in scenes)
    ]
    path = write_lines(tmp_path / "q.jsonl", rows)
    text = f"""\
models: [{{model: {model_path("tiny-internvl")}, label: folder, dtype: bfloat16}}]
policies: [flowcut]
tokens: [16]
tasks:
  - {{task: vqa, data: {{jsonl: {path}, images: {folder}}}, prompt: "{{question}}", max_new_tokens: 2}}
  - {{task: speed, label: time, data: {{jsonl: {path}, images: {folder}}}, prompts: 1, rounds: 1}}
output: {tmp_path / "run"}
"""
    done = run.execute(parse_config(text, "run.yaml"), Console(file=io.StringIO()))
    assert not done.failed, done.failed
    row, speed = RunFolder(tmp_path / "run").rows()
    assert row["n"] == 10
    assert row["metrics"]["accuracy"] > 0.7
    assert row["intervals"]["accuracy"][0] <= row["metrics"]["accuracy"] <= row["intervals"]["accuracy"][1]
    records = RunFolder(tmp_path / "run").samples(row["cell"])
    assert {record["scores"]["accuracy"] for record in records} <= {0.0, 1.0}
    assert all(len(tile["kept"]) == 16 for record in records for tile in record["tiles"])
    assert records[0]["image"]["path"] == str((folder / "0.png").resolve())
    assert speed["task"] == "time"
    (line,) = done.lines()
    assert line["vqa_accuracy"] == row["metrics"]["accuracy"]
    assert line["time_prefill_ms"] > 0
    assert "| 16 tokens |" in (tmp_path / "run" / "results.md").read_text()


@weights
@pytest.mark.parametrize(
    ("name", "size", "boxes"),
    [
        ("tiny-llava", (128, 128), [[0, 0, 128, 128]]),
        ("tiny-llava", (256, 128), [[64, 0, 192, 128]]),
        ("tiny-llava", (100, 300), [[0, 100, 100, 200]]),
        ("tiny-internvl", (256, 128), [[0, 0, 128, 128], [128, 0, 256, 128], [0, 0, 256, 128]]),
        ("tiny-internvl", (80, 240), [[0, 0, 80, 80], [0, 80, 80, 160], [0, 160, 80, 240], [0, 0, 80, 240]]),
    ],
)
def test_tiles_show_what_the_processor_makes_of_an_image(name, size, boxes):
    _, processor = load_model(name)
    found = Tiles(processor).boxes(size)
    assert np.abs(np.array(found) - np.array(boxes)).max() <= 1


def test_a_batch_holds_one_split_and_similar_prompts(tmp_path):
    def sample(number: int, split: str, width: int, words: int) -> Sample:
        image = Image.new("RGB", (width, 64))
        return Sample(str(number), split, Picture.of(image, None, "here"), "a " * words, None)

    given = [sample(0, "a", 64, 9), sample(1, "a", 32, 5), sample(2, "a", 64, 1), sample(3, "a", 32, 2)]
    given += [sample(4, "b", 32, 1)]
    found = [[one.id for one in batch] for batch in batches(given, 3)]
    assert found == [["3", "1", "2"], ["0"], ["4"]]


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The two dogs.", "2 dogs"), ("Yes!", "yes"), (" A\nred  car ", "red car"), ("1,000", "1000"), ("2.5", "2.5"),
        ("it's", "it's"), ("", ""), ("none", "0"), ("blue/green", "blue green"), ("St. John", "st john"),
    ],
)  # fmt: skip
def test_answers_are_compared_in_a_plain_form(answer, plain):
    assert normalised(answer) == plain


def test_vqa_accuracy_is_that_of_ten_annotators():
    assert exact_accuracy("Red.", ["red", "crimson"]) == 1
    assert exact_accuracy("blue", ["red", "crimson"]) == 0
    ten = ["red"] * 3 + ["blue"] * 7
    assert vqa_accuracy("red", ten) == pytest.approx(0.9)  # 3 of the nines hold two reds, 7 hold three
    assert vqa_accuracy("blue", ten) == 1
    assert vqa_accuracy("green", ten) == 0
    assert vqa_accuracy("red", ["red"]) == 1


@pytest.mark.parametrize(
    ("build", "grids"),
    [
        pytest.param(llava_next, [[(8, 8)] * 5, [(8, 8)] * 3], id="llava_next"),
        pytest.param(llava_onevision, [[(8, 8), (8, 14)], [(8, 8)] * 2], id="llava_onevision"),
        pytest.param(qwen2_vl, [[(5, 7)], [(2, 2)]], id="qwen2_vl"),
    ],
)
def test_tiles_of_images_of_different_sizes_in_one_batch(build, grids):
    model, processor = build()
    images = [make_scene(3, size).image for size in ((200, 128), (64, 64))]
    texts = [prompt_text(processor, "What?")] * 2
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    batch = [SimpleNamespace(picture=SimpleNamespace(size=image.size)) for image in images]
    with pruned(model, "random", ratio=0.5), torch.no_grad():
        model(**inputs)
        found = tiles_of(Loaded(model, processor, Tiles(processor)), batch, model.pruning.receipt)
    assert [[tuple(tile["grid"]) for tile in tiles] for tiles in found] == grids
    for tile in (tile for tiles in found for tile in tiles):
        rows, columns = tile["grid"]
        assert 0 < len(tile["kept"]) < rows * columns
        assert max(tile["kept"]) < rows * columns


def test_a_vqa_task_asks_a_desk_one_question_a_category():
    found = samples("{task: vqa, data: {scenes: 12, kind: desk}}")
    assert {sample.split for sample in found} == set(CATEGORIES)
    assert len({sample.id for sample in found}) == len(found)
    assert all(sample.question.endswith("single word or phrase.") for sample in found)
    assert all(isinstance(sample.label, list) and len(sample.label) == 1 for sample in found)
    captions = samples("{task: chair, data: {scenes: 12, kind: desk}}")
    assert [s.picture.digest for s in captions] == list(dict.fromkeys(s.picture.digest for s in found))


AMBER_G = "{task: amber_g, data: {jsonl: ROWS, images: IMAGES}, annotations: TRUTH, relations: RELATIONS}"
AMBER_D = "{task: amber_d, data: {jsonl: ROWS, images: IMAGES}, annotations: TRUTH}"


def record_of(sample: Sample, answer: str) -> dict:
    return {
        "id": sample.id, "split": sample.split, "label": sample.label, "question": sample.question,
        "answer": answer, "scores": {}, "image": {"path": sample.picture.digest}, "tokens": 4, "visual_tokens": 16,
    }  # fmt: skip


def scored(text: str, samples: list[Sample], answers: list[str], **where) -> tuple[list[dict], dict]:
    """Records and the row of a task's answers."""
    text = f"models: [m]\npolicies: [none]\ntasks:\n  - {text}\noutput: out\n"
    for name, value in where.items():
        text = text.replace(name, str(value))
    scorer = Scorer(parse_config(text, "run.yaml").tasks[0])
    records = [scorer.judge(record_of(s, answer)) for s, answer in zip(samples, answers, strict=True)]
    return records, scorer.row(records)


def amber(images, tmp_path):
    """AMBER's files in small: one description, three questions."""
    queries = [{"id": n, "image": f"{n}.png", "query": f"Question {n}?"} for n in range(1, 5)]
    truth = [
        {"id": 1, "type": "generative", "truth": ["dog", "tree"], "hallu": ["cat"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 4, "type": "relation", "truth": "no"},
    ]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "relations.json").write_text(json.dumps({"dog": ["puppy"], "tree": [], "cat": [], "sun": []}))
    return {
        "ROWS": write_lines(tmp_path / "queries.jsonl", queries), "IMAGES": images[0],
        "TRUTH": tmp_path / "truth.json", "RELATIONS": tmp_path / "relations.json",
    }  # fmt: skip


def test_amber_in_a_run(images, tmp_path):
    where = amber(images, tmp_path)
    described, questions = samples(AMBER_G, **where), samples(AMBER_D, **where)
    assert [s.id for s in described] == ["1"]
    assert [s.id for s in questions] == ["existence/2", "attribute/3", "relation/4"]
    assert questions[0].question == "Question 2? Please answer yes or no."
    records, row = scored(AMBER_G, described, ["Puppies under the sun, with a cat."], **where)
    assert records[0]["scores"]["hallucinated"] == ["sun", "cat"]
    assert row["metrics"] == {"chair": 2 / 3, "cover": 1 / 2, "hal": 1.0, "cog": 1.0}
    records, row = scored(AMBER_D, questions, ["No.", "no", "Yes"], **where)
    assert [record["scores"]["correct"] for record in records] == [True, False, False]
    assert row["metrics"]["accuracy"] == pytest.approx(1 / 3)
    assert (row["metrics"]["precision"], row["metrics"]["recall"]) == (1 / 2, 1 / 2)
    assert row["metrics"]["existence_f1"] == 1
    exact = AMBER_D.replace("}, annotations", "}, parser: exact, annotations")
    assert scored(exact, questions, ["No.", "Yes", "No"], **where)[1]["metrics"]["accuracy"] == pytest.approx(
        2 / 3
    )
    (tmp_path / "truth.json").write_text("[]")
    with pytest.raises(ValueError, match="has no annotation of id 1"):
        samples(AMBER_G, **where)


def test_mme_in_a_run(images, tmp_path):
    folder, _ = images
    rows = [
        {
            "question_id": f"count/{n}.png", "image": f"{n}.png", "category": "count",
            "question": f"{answer}? Please answer yes or no.", "answer": answer,
        }
        for n in (1, 2) for answer in ("Yes", "No")
    ]  # fmt: skip
    where = {"ROWS": write_lines(tmp_path / "mme.jsonl", rows), "IMAGES": folder}
    text = "{task: mme, data: {jsonl: ROWS, images: IMAGES}}"
    found = samples(text, **where)
    assert [s.id for s in found][:2] == ["count/count/1.png#1", "count/count/1.png#2"]
    _, row = scored(text, found, ["Yes", "No", "yes", "Yes it is"], **where)
    assert row["metrics"] == {"count": 100 * (3 / 4 + 1 / 2), "perception": 125.0, "accuracy": 3 / 4}
    with pytest.raises(ValueError, match="leave limit out"):
        samples("{task: mme, data: {jsonl: ROWS, images: IMAGES, limit: 3}}", **where)
    with pytest.raises(ValueError, match="give jsonl, disk or hub"):
        samples("{task: mme, data: {scenes: 3}}")


def test_other_labels_for_popes_questions(images, tmp_path):
    """RePOPE: some labels turn, ambiguous questions go."""
    folder, _ = images
    rows = [
        {"question_id": n, "image": f"{n}.png", "text": f"Is there a {n}?", "label": "yes"}
        for n in range(1, 5)
    ]
    other = [{"question_id": n, "label": label} for n, label in ((1, "yes"), (2, "no"), (4, "yes"))]
    where = {
        "ROWS": write_lines(tmp_path / "coco_pope_random.jsonl", rows),
        "OTHER": write_lines(tmp_path / "repope.jsonl", other), "IMAGES": folder,
    }  # fmt: skip
    found = samples("{task: pope, data: {jsonl: ROWS, images: IMAGES}, labels: OTHER}", **where)
    assert [(s.id, s.label) for s in found] == [("1", "yes"), ("2", "no"), ("4", "yes")]
    with pytest.raises(ValueError, match="give one for each"):
        samples("{task: pope, data: {jsonl: ROWS, images: IMAGES}, labels: [OTHER, OTHER]}", **where)


def test_multiple_choice_in_a_run(images, tmp_path):
    """All answers to a question have to be right, whatever the order of its options."""
    folder, _ = images
    rows = [
        {"index": 5, "image": "1.png", "category": "colour", "question": "Which?", "hint": "Look.",
         "A": "red", "B": "blue", "C": "green", "D": "nan", "answer": "B"},
        {"index": 6, "image": "2.png", "category": "count", "question": "How many?", "hint": None,
         "A": "one", "B": "two", "C": None, "D": None, "answer": "A"},
    ]  # fmt: skip
    where = {"ROWS": write_lines(tmp_path / "mmbench.jsonl", rows), "IMAGES": folder}
    text = "{task: choice, data: {jsonl: ROWS, images: IMAGES}}"
    found = samples(text, **where)
    assert [s.id for s in found] == [*(f"colour/5#{n}" for n in range(3)), "count/6#0", "count/6#1"]
    assert found[1].question == (
        "Look.\nWhich?\nA. blue\nB. green\nC. red\nAnswer with the option's letter from the given choices directly."
    )
    assert [s.label["letter"] for s in found] == ["B", "A", "C", "A", "B"]
    _, row = scored(text, found, ["B", "A.", "blue", "A", "A"], **where)
    assert row["metrics"] == {
        "accuracy": 0.5, "answers": 0.8, "colour_accuracy": 1.0, "count_accuracy": 0.0,
    }  # fmt: skip
    plain = "{task: choice, circular: false, data: {jsonl: ROWS, images: IMAGES}}"
    assert [s.id for s in samples(plain, **where)] == ["colour/5#0", "count/6#0"]
    write_lines(tmp_path / "mmbench.jsonl", [{**rows[0], "answer": "D"}])
    with pytest.raises(ValueError, match="the letter of one of its 3 options"):
        samples(text, **where)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("B. blue", "B"), ("The answer is C", "C"), ("blue", "B"), ("It's blue.", "B"),
        ("A", "A"), ("A blue ball on grass", "B"), ("A. a ball that is red", "A"), ("A or B", ""), ("red or blue", ""),
        ("", ""), ("E", ""), ("ABC", ""),
    ],
)  # fmt: skip
def test_letters_of_answers(answer, letter):
    assert read_choice(answer, ["red", "blue", "green"]) == letter


def length(question: str, answer: str, reference: list[str]) -> float:
    """A judge for the test: how many words of the reference an answer has, up to 6."""
    assert question
    return float(min(6, len(set(answer.split()) & set(reference[0].split()))))


def no_number(question: str, answer: str, reference: list[str]) -> str:
    return "good"


def test_answers_rated_by_a_judge(images, tmp_path):
    folder, _ = images
    rows = [
        {
            "id": n,
            "image": f"{n}.png",
            "question": "What?",
            "answer": "a b c d",
            "category": ("one", "two")[n % 2],
        }
        for n in range(3)
    ]
    where = {"ROWS": write_lines(tmp_path / "mmhal.jsonl", rows), "IMAGES": folder}
    text = "{task: judged, judge: tests.test_runs_data:length, data: {jsonl: ROWS, images: IMAGES}}"
    found = samples(text, **where)
    records, row = scored(text, found, ["a b c d", "a", "a b c"], **where)
    assert [record["scores"]["rating"] for record in records] == [4, 1, 3]
    assert row["metrics"] == {"rating": 8 / 3, "bad": 1 / 3, "one_rating": 3.5, "two_rating": 1.0}
    with pytest.raises(ValueError, match="rated sample one/0 'good': a number is needed"):
        scored(text.replace("length", "no_number"), found, ["a", "a", "a"], **where)
    with pytest.raises(ValueError, match="cannot be imported"):
        samples(text.replace("length", "nobody"), **where)
