"""Caption files and lists of image ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm_prune.eval.coco import ImageId, image_id
from vlm_prune.eval.records import read_json, read_records

_CAPTION_KEYS = ("caption", "filtered_resps", "response", "prediction", "text", "answer")
_IMAGE_KEYS = ("image_id", "image", "question_id", "file_name", "id")


def _key(row: dict[str, Any], given: str | None, usual: tuple[str, ...], where: str) -> str:
    for key in (given,) if given else usual:
        if key in row:
            return key
    wanted = given or " or ".join(usual)
    raise ValueError(f"{where}: no key {wanted!r}; it has {', '.join(map(repr, row)) or 'none'}")


def read_captions(
    path: Path | str, image_key: str | None = None, caption_key: str | None = None
) -> list[tuple[ImageId, str]]:
    """``(image id, caption)`` pairs of a file, in its order.

    JSON lines or a JSON list of ``{"image_id": .., "caption": ..}``, the official ``{"imgToEval": {..}}``,
    ``{image: caption}``, or CSV. Without the keys being given, ``image`` (a file name) and ``text`` or ``answer`` are
    understood too, and what other tools write.
    """
    found = []
    for number, row in enumerate(read_records(path, by_id=("image_id", "caption")), 1):
        where = f"{path}, record {number}"
        caption = row[_key(row, caption_key, _CAPTION_KEYS, where)]
        while isinstance(caption, list) and len(caption) == 1:  # as lmms-eval writes filtered_resps
            caption = caption[0]
        if not isinstance(caption, str):
            raise ValueError(
                f"{where}: the caption is {caption!r}, not text (an empty caption is an empty string)"
            )
        key = _key(row, image_key, _IMAGE_KEYS, where)
        try:
            found.append((image_id(row[key]), caption))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return found


def read_image_ids(path: Path | str) -> list[ImageId]:
    """A saved list of image ids: a JSON list, or an object with one under ``image_ids``."""
    data = read_json(path)
    listed = data.get("image_ids") if isinstance(data, dict) else data
    if not isinstance(listed, list) or not listed:
        raise ValueError(
            f"{path}: a JSON list of image ids is needed, or an object with one under 'image_ids'"
        )
    ids = [image_id(value) for value in listed]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path}: some image ids are listed twice")
    return ids


def write_image_ids(path: Path | str, ids: Iterable[ImageId], **about: Any) -> None:
    """Save a list of image ids (sorted, with ``about``: seed, source ...) for :func:`read_image_ids`."""
    listed = sorted(set(ids), key=lambda value: (isinstance(value, str), value))
    Path(path).write_text(json.dumps({**about, "image_ids": listed}, indent=1) + "\n", encoding="utf-8")


def sample_image_ids(ids: Iterable[ImageId], count: int, seed: int) -> list[ImageId]:
    """``count`` ids drawn with ``seed``. The result depends on the set of ids only, never on their order."""
    pool = sorted(set(ids), key=lambda value: (isinstance(value, str), value))
    if not 0 < count <= len(pool):
        raise ValueError(f"{count} images were asked for; between 1 and {len(pool)} can be had")
    return sorted(random.Random(seed).sample(pool, count), key=lambda value: (isinstance(value, str), value))


def only_images(captions: Iterable[tuple[ImageId, str]], ids: Iterable[ImageId]) -> list[tuple[ImageId, str]]:
    """The captions of the images in ``ids``.

    Raises:
        ValueError: an image of the list has no caption: the score would be of another set of images.
    """
    wanted = set(ids)
    kept = [(image, caption) for image, caption in captions if image in wanted]
    missing = sorted(wanted - {image for image, _ in kept}, key=str)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} listed images have no caption, first {missing[:3]}"
        )
    return kept
