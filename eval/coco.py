"""COCO-format annotation files: objects per image and reference captions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_prune.eval.records import read_json, whole

ImageId = int | str
_FILE_NAME = re.compile(r"(?:^|[_/\\])(\d{12})(?:\.\w+)?$")

_RELEASES = ("", "COCO_val2014_", "COCO_train2014_")
"""How file names begin in COCO 2017 and 2014; an image has the same number in both."""


def image_id(value: Any) -> ImageId:
    """The number of an image from a number, a string of digits or COCO's file name or path; other strings stay.

    COCO's releases of 2014 and 2017 hold the same images under the same numbers.

    >>> image_id("COCO_val2014_000000310196.jpg"), image_id("val2017/000000310196.jpg")
    (310196, 310196)
    >>> image_id("42"), image_id(7.0), image_id("scene-7")
    (42, 7, 'scene-7')
    """
    value = whole(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"an image id is a number or a string, got {value!r}")
    if value.isdecimal():
        return int(value)
    number = _FILE_NAME.search(value)
    return int(number[1]) if number else value


def other_names(name: str) -> list[str]:
    """What the file of a COCO image may be called instead, by the releases of 2014 and 2017; none for other names.

    >>> other_names("val2014/COCO_val2014_000000310196.jpg")[:2]
    ['val2014/000000310196.jpg', '000000310196.jpg']
    """
    if not _FILE_NAME.search(name):
        return []
    path, ending = Path(name), Path(name).suffix or ".jpg"
    usual = (f"{release}{image_id(name):012}{ending}" for release in _RELEASES)
    found = [place for file in usual for place in (str(path.with_name(file)), file)]
    return [other for other in dict.fromkeys(found) if other != name]


@contextmanager
def _missing_keys(path: Path | str) -> Iterator[None]:
    try:
        yield
    except KeyError as missing:
        raise ValueError(
            f"{path}: a record has no key {missing}; a COCO annotation file is needed"
        ) from missing


def _part(path: Path | str, data: Any, key: str, kind: str) -> list[dict[str, Any]]:
    part = data.get(key) if isinstance(data, dict) else None
    if not isinstance(part, list) or not all(isinstance(row, dict) for row in part):
        raise ValueError(f"{path} has no list of records under {key!r}; a COCO {kind} file is needed")
    return part


def _category(path: Path | str, value: Any) -> ImageId:
    if not isinstance(value, int | str):
        raise ValueError(f"{path}: a category id is a number or a string, got {value!r}")
    return value


def instance_objects(
    path: Path | str, image_ids: Collection[ImageId] | None = None
) -> dict[ImageId, tuple[str, list[str]]]:
    """``{image id: (file name, category names in the order of the annotations, repeats included)}``.

    Args:
        path: an ``instances_*.json`` file: lists ``images``, ``annotations`` and ``categories``.
        image_ids: only these images; default all that the file lists.
    """
    data = read_json(path)
    found: dict[ImageId, tuple[str, list[str]]] = {}
    with _missing_keys(path):
        names: dict[ImageId, str] = {}
        for row in _part(path, data, "categories", "instances"):
            if not isinstance(row["name"], str):
                raise ValueError(f"{path}: the name of category {row['id']!r} is {row['name']!r}, not text")
            names[_category(path, row["id"])] = row["name"]
        for row in _part(path, data, "images", "instances"):
            image = image_id(row["id"])
            if image_ids is None or image in image_ids:
                found[image] = (row.get("file_name", str(row["id"])), [])
        for row in _part(path, data, "annotations", "instances"):
            image, category = image_id(row["image_id"]), _category(path, row["category_id"])
            if category not in names:
                raise ValueError(f"{path}: category {category} of an annotation is not in 'categories'")
            if image_ids is None or image in image_ids:
                found.setdefault(image, (str(image), []))[1].append(names[category])
    return found


def reference_captions(
    path: Path | str, image_ids: Collection[ImageId] | None = None
) -> dict[ImageId, list[str]]:
    """``{image id: its reference captions}`` of a ``captions_*.json`` file; an empty list if it has none."""
    data = read_json(path)
    found: dict[ImageId, list[str]] = {}
    with _missing_keys(path):
        for row in _part(path, data, "images", "captions"):
            image = image_id(row["id"])
            if image_ids is None or image in image_ids:
                found[image] = []
        for row in _part(path, data, "annotations", "captions"):
            image, caption = image_id(row["image_id"]), row["caption"]
            if not isinstance(caption, str):
                raise ValueError(f"{path}: caption {caption!r} of image {image} is not text")
            if image_ids is None or image in image_ids:
                found.setdefault(image, []).append(caption)
    return found
