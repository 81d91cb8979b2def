"""Where the samples of a task come from: procedural scenes, tables on disk or on the hub, COCO's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from vlm_prune.eval.runs.strict import Count, Strict


class ScenesData(Strict):
    """Procedural scenes, made for the shipped models.

    Attributes:
        scenes: number of scenes.
        kind: ``shapes``, a few coloured objects; ``desk``, with signs, charts, tiny objects and clutter as well, of
            which a ``vqa`` task asks one question a category.
        size: width and height in pixels.
        sizes: other sizes for some models, by label.
    """

    scenes: Annotated[int, Field(ge=1)]
    kind: Literal["shapes", "desk"] = "shapes"
    size: tuple[int, int] = (128, 128)
    sizes: dict[str, tuple[int, int]] = Field(default_factory=dict)


class Columns(Strict):
    """Which columns hold what; the first of the usual names that a data set has, unless given.

    Attributes:
        id: question_id, questionId, id or index; default the row's number.
        image: image, image_path, image_id, file_name or image_source; a path below ``images``, or the image itself.
        question: question, text or query.
        answer: label, answer or answers; for VQA a list of accepted answers, or of VQAv2's mappings with ``answer``.
        objects: objects: the names of what is in the image.
        split: category or split; default one split.
    """

    id: str | None = None
    image: str | None = None
    question: str | None = None
    answer: str | None = None
    objects: str | None = None
    split: str | None = None


class TableData(Strict):
    """What all data in rows have in common.

    Attributes:
        images: folder of the images that rows name by path.
        columns: names of the columns, if they are not the usual ones.
        limit: the number of first rows to use of each split.
    """

    images: Path | None = None
    columns: Columns = Columns()
    limit: Count | None = None


class JsonlData(TableData):
    """JSON lines (or a JSON list, or CSV), one file or one a split.

    Attributes:
        jsonl: the files. Each of several is a split, called random, popular or adversarial if its name says so.
    """

    jsonl: list[Path]

    @field_validator("jsonl", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


class DiskData(TableData):
    """A Hugging Face data set that ``save_to_disk`` wrote.

    Attributes:
        disk: its folder.
        split: of a folder with several.
    """

    disk: Path
    split: str | None = None


class HubData(TableData):
    """A data set on the Hugging Face hub.

    Attributes:
        hub: its name, such as ``lmms-lab/POPE``.
        config: its configuration, if it has several.
        split: the split.
        revision: a commit or tag.
    """

    hub: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None


class CocoData(Strict):
    """Images with annotations in COCO's format.

    Attributes:
        coco: the folder with instances_*.json and captions_*.json, or one instances file (POPE only).
        images: folder of the images.
        image_ids: a saved list of image ids; these and no others.
        count: instead, the number of images to draw from those in the folder (500 in usual protocols); default all.
    """

    coco: Path
    images: Path
    image_ids: Path | None = None
    count: Count | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> CocoData:
        if self.image_ids and self.count:
            raise ValueError("image_ids and count both choose images: keep one")
        return self


SOURCES: dict[str, type[Strict]] = {
    "scenes": ScenesData,
    "jsonl": JsonlData,
    "disk": DiskData,
    "hub": HubData,
    "coco": CocoData,
}
"""The key that names a source -> its mapping."""


def _source(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((key for key in SOURCES if key in value), None)
    return next((key for key, source in SOURCES.items() if isinstance(value, source)), None)


Data = Annotated[
    Annotated[ScenesData, Tag("scenes")]
    | Annotated[JsonlData, Tag("jsonl")]
    | Annotated[DiskData, Tag("disk")]
    | Annotated[HubData, Tag("hub")]
    | Annotated[CocoData, Tag("coco")],
    Discriminator(
        _source,
        custom_error_type="no_source",
        custom_error_message=f"one of the keys {', '.join(SOURCES)} has to say where the data are",
    ),
]
