"""Building POPE's questions: three objects that are in an image, three that are not, in turn.

The rules are those of ``main.py`` of RUCAIBox/POPE, with a seed. An image needs as many objects as are asked
about; asked are the *first* ones of its list. After each comes one that is not in the image and was not asked
there before:

- ``random``: any object seen in the chosen images, each as likely;
- ``popular``: the one in most of the chosen images;
- ``adversarial``: the one that is most often in an image together with the object just asked about (any other
  when that list is used up, as for ``popular``).

Ties go to the object seen first.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_prune.eval.chair import CaptionReader
from vlm_prune.eval.coco import instance_objects, reference_captions
from vlm_prune.eval.records import choose, read_records, read_text

SPLITS = ("random", "popular", "adversarial")
TEMPLATE = "Is there a {} in the image?"


def build_questions(
    objects: Mapping[str, Sequence[str]],
    splits: Iterable[str] = SPLITS,
    *,
    n_images: int | None = None,
    per_image: int = 3,
    seed: int = 0,
    template: str = TEMPLATE,
) -> dict[str, list[dict[str, Any]]]:
    """Questions for each split, over the same images.

    Args:
        objects: image -> its objects, most telling first; repeats are dropped.
        splits: any of :data:`SPLITS`.
        n_images: how many images to draw (POPE: 500); default all that have enough objects, in the given
            order.
        per_image: positives an image, and as many negatives (POPE: 3).
        seed: of the drawn images and of random negatives.
        template: the question; "a {}" becomes "an {}" before a vowel.

    Returns:
        ``{split: rows}`` with ``question_id`` (from 1 in each split), ``image``, ``text``, ``label`` and
        ``object``.

    Raises:
        ValueError: too few images, or an image that leaves no object to ask for.
    """
    if template.count("{}") != 1 or set(template.replace("{}", "")) & {*"{}"} or per_image < 1:
        raise ValueError(
            f"a template with one '{{}}' and no other braces, and per_image >= 1, are needed: got {template!r} and "
            f"{per_image}"
        )
    lists = {image: list(dict.fromkeys(names)) for image, names in objects.items()}
    images = [image for image, names in lists.items() if len(names) >= per_image]
    wanted = len(images) if n_images is None else n_images
    if not 0 < wanted <= len(images):
        raise ValueError(
            f"{wanted} images are wanted; {len(images)} of {len(lists)} have the {per_image} different "
            "objects that it takes"
        )
    rng = random.Random(seed)
    chosen = {image: lists[image] for image in (images if n_images is None else rng.sample(images, wanted))}
    count, together = _frequencies(chosen.values())
    built = {}
    for split in splits:
        choose("POPE split", split, SPLITS)
        # A split's own generator: its questions do not depend on which other splits are built.
        draw = random.Random(f"{seed} {split}")
        rows: list[dict[str, Any]] = []
        for image, names in chosen.items():
            asked = set(names)
            for positive in names[:per_image]:
                first = {"random": [], "popular": count, "adversarial": together[positive]}[split]
                negative = next((name for name in first if name not in asked), None)
                if negative is None:
                    left = [name for name in count if name not in asked]
                    if not left:
                        raise ValueError(
                            f"image {image!r} leaves no object to ask for: it has all, or too few are known"
                        )
                    negative = draw.choice(left)
                asked.add(negative)
                rows += [_row(image, positive, "yes", template), _row(image, negative, "no", template)]
        built[split] = [{"question_id": number, **row} for number, row in enumerate(rows, 1)]
    return built


def _frequencies(lists: Iterable[Sequence[str]]) -> tuple[list[str], dict[str, list[str]]]:
    """Objects by number of images, and for each one the others by images shared; most frequent first."""
    count: Counter[str] = Counter()
    together: dict[str, Counter[str]] = {}
    for names in lists:
        count.update(names)
        for name in names:
            together.setdefault(name, Counter()).update(other for other in names if other != name)
    return _by_count(count), {name: _by_count(others) for name, others in together.items()}


def _by_count(count: Counter[str]) -> list[str]:
    return sorted(count, key=lambda name: -count[name])


def _row(image: str, name: str, label: str, template: str) -> dict[str, Any]:
    text = template.replace("a {}", "an {}") if name[0].lower() in "aeiou" else template
    return {"image": image, "text": text.format(name), "label": label, "object": name}


def read_object_lists(path: Path | str, captions: Path | str | None = None) -> dict[str, list[str]]:
    """``{image: its objects}`` from a file, in the order of its annotations.

    Args:
        path: a COCO ``instances_*.json`` file (the image is then its file name), or POPE's own form: JSON
            lines of ``{"image": .., "objects": [..]}``.
        captions: a COCO ``captions_*.json`` file: objects its captions name are added, so that none of them
            is asked for as absent (POPE's published questions rest on both).
    """
    if '"annotations"' not in read_text(path):
        rows = read_records(path)
        if not all(
            isinstance(row.get("image"), str) and isinstance(row.get("objects"), list) for row in rows
        ):
            raise ValueError(f"{path}: COCO instances, or lines with 'image' and 'objects', are needed")
        for row in rows:
            if bad := [name for name in row["objects"] if not isinstance(name, str) or not name]:
                raise ValueError(f"{path}: object {bad[0]!r} of image {row['image']!r} is no name")
        return {row["image"]: row["objects"] for row in rows}
    found = instance_objects(path)
    if captions is not None:
        reader = CaptionReader()
        for image, texts in reference_captions(captions, found.keys()).items():
            found[image][1].extend(mention.object for text in texts for mention in reader.read(text).mentions)
    return {name: list(dict.fromkeys(objects)) for name, objects in found.values()}


def write_questions(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write questions as JSON lines with the four keys of POPE's own files."""
    keys = ("question_id", "image", "text", "label")
    lines = (json.dumps({key: row[key] for key in keys}) + "\n" for row in rows)
    Path(path).write_text("".join(lines), encoding="utf-8")
