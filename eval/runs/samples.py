"""The samples of a task, from scenes, from tables of rows, or from COCO's annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_prune.eval import choice
from vlm_prune.eval.amber import DIMENSIONS, read_annotations
from vlm_prune.eval.chair import CaptionReader, Vocabulary, coco_truth, read_image_ids, sample_image_ids
from vlm_prune.eval.coco import ImageId, image_id, instance_objects, other_names
from vlm_prune.eval.pope import relabelled
from vlm_prune.eval.pope_questions import build_questions, read_object_lists
from vlm_prune.eval.records import read_records
from vlm_prune.eval.runs.config import OnBadImage
from vlm_prune.eval.runs.images import Picture
from vlm_prune.eval.runs.sources import CocoData, JsonlData, ScenesData
from vlm_prune.eval.runs.tables import Row, table_rows
from vlm_prune.eval.runs.tasks import (
    AmberGenerativeTask,
    AmberQuestionsTask,
    ChairTask,
    ChoiceTask,
    JudgedTask,
    MmeTask,
    PopeTask,
    SpeedTask,
    Task,
    VqaTask,
)
from vlm_prune.eval.scenes import PLURALS, Scene, make_desks, make_scenes, pope_questions
from vlm_prune.eval.scenes.questions import desk_questions


@dataclass(frozen=True)
class Sample:
    """One prompt and its ground truth.

    Attributes:
        id: unique in the task.
        split: such as "adversarial"; empty if there is one only.
        picture: the image.
        question: what is asked, without the chat template.
        label: "yes" or "no" (pope, amber_d, mme), the objects in the image (chair), those and the objects that are
            imagined there (amber_g), the right letter and the options (choice), accepted answers (vqa, judged),
            nothing (speed).
    """

    id: str
    split: str
    picture: Picture
    question: str
    label: Any

    def digest(self) -> list[Any]:
        """What makes it another sample."""
        return [self.id, self.split, self.picture.digest, self.question, self.label]


def build_samples(task: Task, model: str, seed: int, on_bad_image: OnBadImage = "fail") -> list[Sample]:
    """All samples of a task, in their order.

    Args:
        task: what is asked of which data.
        model: the model's label: scenes may have another size for it.
        seed: of random choices.
        on_bad_image: ``skip`` lets images be missing; a speed task takes the next image instead.

    Raises:
        ValueError: data are missing, or are not what the task needs.
    """
    if isinstance(task.data, ScenesData):
        found = list(_of_scenes(task, task.data, model, seed))
    elif isinstance(task.data, CocoData):
        found = list(_of_coco(task, task.data, seed))
    else:
        found = list(_of_table(task, table_rows(task.data)))
    if isinstance(task, SpeedTask):
        first: dict[str, Sample] = {}
        for sample in found:
            first.setdefault(sample.picture.digest, sample)
        whole = (s for s in first.values() if on_bad_image == "fail" or not s.picture.problem)
        found = list(islice(whole, task.prompts))
    if not found:
        raise ValueError(f"task {task.name}: the data hold no samples")
    if on_bad_image == "fail" and (absent := [s.picture.absent for s in found if s.picture.absent]):
        raise ValueError(absent[0])
    if twice := [name for name, count in Counter(sample.id for sample in found).items() if count > 1]:
        raise ValueError(f"task {task.name}: {len(twice)} ids stand in several rows, first {twice[0]!r}")
    return found


def asked(task: Task, question: str) -> str:
    """The task's prompt about a question."""
    return task.prompt.replace("{question}", question)


def _of_scenes(task: Task, data: ScenesData, model: str, seed: int) -> Iterator[Sample]:
    sizes = [data.sizes.get(model, data.size)]
    if data.kind == "desk":
        scenes = list(make_desks(data.scenes, seed, sizes))
    else:
        scenes = list(make_scenes(data.scenes, seed, sizes, min_names=3))
    if isinstance(task, PopeTask | VqaTask) and (data.kind == "desk") != isinstance(task, VqaTask):
        wanted = (
            "a vqa task needs scenes of kind: desk"
            if isinstance(task, VqaTask)
            else "pope asks about kind: shapes"
        )
        raise ValueError(f"task {task.name}: {wanted}; or give jsonl, disk or hub")
    pictures = [Picture.of(scene.image, None, "scene", f"scene-{i}") for i, scene in enumerate(scenes)]
    if isinstance(task, ChairTask):
        for i, scene in enumerate(scenes):
            yield Sample(str(i), "", pictures[i], asked(task, ""), list(scene.names))
        return
    if data.kind == "desk":
        for i, category, turn in desk_questions(scenes, seed):
            label = [turn.answer] if isinstance(task, VqaTask) else None
            yield Sample(f"{category}/{i}", category, pictures[i], asked(task, turn.question), label)
        return
    for split in task.splits if isinstance(task, PopeTask) else ["random"]:
        for row in _scene_questions(scenes, split, seed):
            name = f"{split}/{row['question_id']}"
            label = row["label"] if isinstance(task, PopeTask) else None
            yield Sample(name, split, pictures[row["image"]], asked(task, row["text"]), label)


def _scene_questions(scenes: list[Scene], split: str, seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pope_questions(scenes, split, seed)
    return rows


def _of_table(task: Task, rows: Iterable[Row]) -> Iterator[Sample]:
    if isinstance(task, ChoiceTask):
        yield from _choices(task, rows)
        return
    label_of = _labels(task)
    counts: Counter[str] = Counter()
    for row in rows:
        found = label_of(row)
        if found is None:
            continue
        split, label = found
        question = "" if "{question}" not in task.prompt else row.need("question", str)
        name = f"{split}/{row.id}" if split else row.id
        if isinstance(task, MmeTask):  # both questions of an image have its name for an id
            counts[name] += 1
            name = f"{name}#{counts[name]}"
        yield Sample(name, split, row.picture(), asked(task, question), label)


def _choices(task: ChoiceTask, rows: Iterable[Row]) -> Iterator[Sample]:
    for row in rows:
        options = row.options()
        letter = row.need("answer", str).strip().upper()
        if letter not in choice.LETTERS[: len(options)] or len(letter) != 1:
            raise ValueError(
                f"{row.where}: answer {letter!r}, the letter of one of its {len(options)} options is needed"
            )
        right = choice.LETTERS.index(letter)
        for number, (order, place) in enumerate(choice.rotations(options, right, task.circular)):
            question = choice.asked(row.need("question", str), order, row.hint())
            name = f"{row.split}/{row.id}#{number}" if row.split else f"{row.id}#{number}"
            label = {"letter": choice.LETTERS[place], "options": order}
            yield Sample(name, row.split, row.picture(), asked(task, question), label)


def _labels(task: Task) -> Callable[[Row], tuple[str, Any] | None]:
    """The ground truth of a row, and its split; ``None`` leaves the row out."""
    if isinstance(task, ChairTask):
        return lambda row: (row.split, row.need("objects", list))
    if isinstance(task, VqaTask | JudgedTask):
        return lambda row: (row.split, row.answers())
    if isinstance(task, PopeTask) and task.labels:
        return _relabelled(task)
    if isinstance(task, PopeTask | MmeTask):
        return lambda row: (row.split, _yes_no(row))
    if isinstance(task, AmberGenerativeTask | AmberQuestionsTask):
        annotations = read_annotations(task.annotations)
        generative = isinstance(task, AmberGenerativeTask)

        def annotated(row: Row) -> tuple[str, Any] | None:
            if row.id not in annotations:
                raise ValueError(f"{row.where}: {task.annotations} has no annotation of id {row.id}")
            found = annotations[row.id]
            if (found["type"] == "generative") != generative:
                return None  # AMBER's files of all queries hold both
            if generative:
                return "", {"truth": found["truth"], "hallu": found["hallu"]}
            return DIMENSIONS.get(found["type"], "relation"), found["truth"]

        return annotated
    return lambda row: (row.split, None)


def _yes_no(row: Row) -> str:
    label: str = row.need("answer", str).strip().lower()
    if label not in ("yes", "no"):
        raise ValueError(f"{row.where}: label {label!r}, 'yes' or 'no' is needed")
    return label


def _relabelled(task: PopeTask) -> Callable[[Row], tuple[str, Any] | None]:
    """Labels from the files of other ones, one for each file of questions."""
    assert isinstance(task.data, JsonlData)
    other = {}
    for path, labels in zip(task.data.jsonl, task.labels, strict=True):
        questions, _ = relabelled(read_records(path), [], read_records(labels))
        other[str(path)] = {str(row["question_id"]): str(row["label"]).strip().lower() for row in questions}

    def label(row: Row) -> tuple[str, Any] | None:
        known = next(found for path, found in other.items() if row.where.startswith(f"{path}, row "))
        return (row.split, known[row.id]) if row.id in known else None

    return label


def _of_coco(task: Task, data: CocoData, seed: int) -> Iterator[Sample]:
    if isinstance(task, VqaTask) or (isinstance(task, SpeedTask) and "{question}" in task.prompt):
        raise ValueError(
            f"task {task.name}: COCO's annotations hold no questions; give jsonl, disk or hub, or (speed) a prompt"
        )
    if isinstance(task, PopeTask):
        yield from _coco_questions(task, data, seed)
        return
    instances, _ = _coco_files(data.coco)
    listed = {image: name for path in instances for image, (name, _) in instance_objects(path).items()}
    there = _files(data.images)
    names = {image: name for image, name in listed.items() if data.image_ids or there(name)}
    ids = _coco_ids(data, names, seed)
    truth: dict[ImageId, Any] = dict.fromkeys(ids)
    if isinstance(task, ChairTask):
        truth = {
            image: sorted(found) for image, found in coco_truth(data.coco, caption_reader(task), ids).items()
        }
    for image in ids:
        picture = Picture.of(names[image], data.images, f"{data.coco}, image {image}")
        yield Sample(str(image), "", picture, asked(task, ""), truth[image])


def _coco_questions(task: PopeTask, data: CocoData, seed: int) -> Iterator[Sample]:
    instances, captions = _coco_files(data.coco)
    objects: dict[str, list[str]] = {}
    for path in instances:
        # objects that an image's captions mention must not be asked about as absent
        objects |= read_object_lists(path, next((c for c in captions if _part(c) == _part(path)), None))
    if not data.image_ids:
        there = _files(data.images)
        objects = {name: found for name, found in objects.items() if there(name)}
    else:
        wanted = set(read_image_ids(data.image_ids))
        objects = {name: found for name, found in objects.items() if image_id(name) in wanted}
    built = build_questions(objects, task.splits, n_images=data.count, seed=seed)
    for split, rows in built.items():
        for row in rows:
            picture = Picture.of(row["image"], data.images, f"{data.coco}, {split}")
            name = f"{split}/{row['question_id']}"
            yield Sample(name, split, picture, asked(task, row["text"]), row["label"])


def _files(folder: Path) -> Callable[[str], bool]:
    """Whether a folder has an image, under any of its names: annotations often list more than one folder has."""
    if not folder.is_dir():
        raise ValueError(f"images: {folder} is no folder")
    names = {path.name for path in folder.iterdir()}
    return lambda name: not names.isdisjoint((name, *other_names(name)))


def _part(path: Path) -> str:
    """Such as val2014 of instances_val2014.json."""
    return path.stem.split("_", 1)[-1]


def _coco_files(path: Path) -> tuple[list[Path], list[Path]]:
    if path.is_file():
        return [path], []
    instances, captions = sorted(path.glob("instances_*.json")), sorted(path.glob("captions_*.json"))
    if not instances:
        what = "holds no instances_*.json" if path.is_dir() else "is neither a folder nor a file"
        raise ValueError(f"{path} {what}; COCO's annotations are needed")
    return instances, captions


def _coco_ids(data: CocoData, names: dict[ImageId, str], seed: int) -> list[ImageId]:
    if data.image_ids:
        ids = read_image_ids(data.image_ids)
        if missing := [image for image in ids if image not in names]:
            raise ValueError(
                f"{data.image_ids}: image {missing[0]!r} is not in the annotations of {data.coco}"
            )
        return ids
    if not names:
        raise ValueError(f"none of the images that {data.coco} lists is in {data.images}")
    return sample_image_ids(names, data.count or len(names), seed)


def caption_reader(task: ChairTask) -> CaptionReader:
    """How the objects of a caption are found."""
    if task.vocabulary is not None:
        return CaptionReader(Vocabulary.read(task.vocabulary), task.variant)
    if isinstance(task.data, ScenesData):
        return CaptionReader(Vocabulary.of({name: [plural] for name, plural in PLURALS.items()}), "plain")
    return CaptionReader(None, task.variant)
