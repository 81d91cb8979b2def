"""The objects that are really in an image: segmented ones and those its reference captions name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from vlm_prune.eval.chair.mentions import CaptionReader
from vlm_prune.eval.coco import ImageId, instance_objects, reference_captions
from vlm_prune.eval.records import choose


def object_named(name: str, reader: CaptionReader) -> str:
    """The vocabulary's object for an annotated name.

    Raises:
        ValueError: the vocabulary does not know it; the message names the nearest word.
    """
    object_of = reader.vocabulary.object_of
    if name not in object_of and name.lower() in object_of:
        name = name.lower()
    return object_of[choose("object", name, sorted(object_of)) if name not in object_of else name]


def coco_truth(
    folder: Path | str, reader: CaptionReader, image_ids: Collection[ImageId] | None = None
) -> dict[ImageId, frozenset[str]]:
    """CHAIR's ground truth from a folder of COCO annotations.

    For each image, the union of the objects in all ``instances_*.json`` and those that ``reader`` finds in
    the reference captions of all ``captions_*.json`` (any splits, 2014 or 2017). Images that are listed but
    empty are kept: whatever a caption says of them is hallucinated.

    Raises:
        ValueError: no such files, a category outside the vocabulary, an image that is not annotated.
    """
    folder = Path(folder)
    instances, captions = sorted(folder.glob("instances_*.json")), sorted(folder.glob("captions_*.json"))
    if not instances or not captions:
        missing = " and ".join(
            n for n, f in (("instances_*.json", instances), ("captions_*.json", captions)) if not f
        )
        raise ValueError(
            f"{folder} {'holds no ' + missing if folder.is_dir() else 'is not a folder'}; CHAIR needs COCO's "
            "instances_*.json and captions_*.json (annotations_trainval2014.zip, unpacked)"
        )
    wanted = None if image_ids is None else frozenset(image_ids)
    truth: dict[ImageId, set[str]] = {}
    for path in instances:
        for image, (_, names) in instance_objects(path, wanted).items():
            truth.setdefault(image, set()).update(object_named(name, reader) for name in set(names))
    for path in captions:
        for image, texts in reference_captions(path, wanted).items():
            truth.setdefault(image, set()).update(
                m.object for text in texts for m in reader.read(text).mentions
            )
    unknown = sorted((wanted or frozenset()) - truth.keys(), key=str)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(wanted or ())} images are not in the annotations of {folder}, first "
            f"{unknown[:3]}; add the split they come from or correct their ids"
        )
    return {image: frozenset(objects) for image, objects in truth.items()}
