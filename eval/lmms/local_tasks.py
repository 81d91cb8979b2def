"""The POPE and CHAIR tasks on data of one's own: a folder of task files and data for ``--include_path``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm_prune.eval.lmms import TASKS
from vlm_prune.eval.pope_questions import SPLITS, read_object_lists
from vlm_prune.eval.records import read_records


def write_tasks(
    out: Path,
    pope: Sequence[str] = (),
    chair: str | None = None,
    *,
    images: Path | None = None,
    captions: Path | None = None,
    vocabulary: Path | None = None,
    post_prompt: str | None = None,
    prompt: str | None = None,
) -> list[str]:
    """Write ``vlm_prune_pope_*`` and ``vlm_prune_chair`` into a folder; returns the names of the tasks.

    Args:
        out: the folder; made if there is none.
        pope: question files in POPE's form (a task for each), a folder that ``datasets`` saved, or a hub name.
        chair: COCO's ``instances_*.json`` or lines with ``image`` and ``objects``; or a saved folder, or a hub name.
        images: where the images of the files are.
        captions: COCO's ``captions_*.json``, whose objects count as present.
        vocabulary: a table of objects and their words, if not COCO's.
        post_prompt: after each question; default that of LLaVA.
        prompt: for captions; default "Please describe this image in detail."

    Raises:
        ValueError: a file is not what is needed, an image is missing, two files make one task.
    """
    out.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for source in pope:
        name = f"vlm_prune_pope_{_split(source)}" if len(pope) > 1 else "vlm_prune_pope"
        if name in names:
            raise ValueError(f"{source}: two files would both be task {name}. Rename one.")
        data = _data(out, name, source, lambda path: _with_images(read_records(path), images))
        _write(out, "pope", name, data, {"post_prompt": post_prompt, "pre_prompt": ""})
        names.append(name)
    if len(names) > 1:
        group = yaml.safe_load((TASKS / "vlm_prune_pope.yaml").read_text(encoding="utf-8"))
        _dump(out / "vlm_prune_pope.yaml", {**group, "task": names})
        names.append("vlm_prune_pope")
    if chair is not None:
        if vocabulary is not None:
            vocabulary = Path(shutil.copy(vocabulary, out / "vocabulary.txt")).resolve()

        def rows(path: Path) -> Iterable[dict[str, Any]]:
            found = read_object_lists(path, captions)
            more = {} if vocabulary is None else {"vocabulary": str(vocabulary)}
            listed = ({"image_id": image, "image": image, "objects": found[image], **more} for image in found)
            return _with_images(listed, images)

        data = _data(out, "vlm_prune_chair", chair, rows)
        _write(out, "chair", "vlm_prune_chair", data, {"prompt": prompt})
        names.append("vlm_prune_chair")
    return names


def _split(source: str) -> str:
    return next((split for split in SPLITS if split in Path(source).stem), Path(source).stem)


def _with_images(rows: Iterable[Mapping[str, Any]], folder: Path | None) -> Iterable[dict[str, Any]]:
    for row in rows:
        path = (folder or Path()) / str(row.get("image"))
        if not path.is_file():
            raise ValueError(f"{path}: no such image. Say where they are with --images.")
        yield {**row, "image": str(path.resolve())}


def _data(out: Path, name: str, source: str, rows: Any) -> dict[str, Any]:
    """The keys of a task file that say where its data are."""
    path = Path(source)
    if path.is_file():
        text = "".join(json.dumps(row) + "\n" for row in rows(path))
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
            "test_split": "test",
        }
    if path.is_dir():
        splits = path / "dataset_dict.json"
        if not splits.is_file():
            raise ValueError(
                f"{path}: not a folder that DatasetDict.save_to_disk wrote (it has no {splits.name})."
            )
        known = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        return {
            "dataset_path": str(path.resolve()),
            "dataset_kwargs": {"load_from_disk": True},
            "test_split": "test" if "test" in known else known[0],
        }
    if source.count("/") != 1 or path.suffix in {".json", ".jsonl"}:
        raise ValueError(f"{source}: neither a file, nor a folder, nor the name of a data set (owner/name).")
    return {"dataset_path": source, "test_split": "test"}


def _write(out: Path, base: str, name: str, data: dict[str, Any], prompts: Mapping[str, str | None]) -> None:
    shutil.copy(TASKS / base, out / base)
    given = {key: text for key, text in prompts.items() if text is not None}
    more = {"lmms_eval_specific_kwargs": {"default": given}} if len(given) == len(prompts) else {}
    _dump(out / f"{name}.yaml", {"include": base, "task": name, **data, **more})


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
