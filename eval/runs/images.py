"""Images of samples: files that stay where they are, or images that a run has to keep itself."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_prune.eval.coco import other_names
from vlm_prune.eval.images import image_size, load_image, upright_rgb
from vlm_prune.eval.runs.folder import write_whole


@dataclass(frozen=True)
class Picture:
    """An image, opened when it is needed.

    Attributes:
        name: what the data set calls it.
        digest: of the content, if the image is not a file, otherwise of its path.
        file: where it is, if it is a file.
        read: returns PNG, JPEG ... bytes, if it is not a file.
        where: what refers to it, such as a row of a file.
        absent: the message if the file does not exist.
    """

    name: str
    digest: str
    file: Path | None = None
    read: Callable[[], bytes] | None = None
    where: str = ""
    absent: str = ""

    @classmethod
    def of(
        cls,
        value: Any,
        folder: Path | None,
        where: str,
        name: str | None = None,
        again: Callable[[], bytes] | None = None,
    ) -> Picture:
        """From a value in a data set: a path below ``folder``, an image, or a mapping with ``bytes`` or ``path``.

        COCO's images are found under their names of 2014 and of 2017, whichever the folder has.

        ``again`` reads the bytes another time, so that they need not be kept until then.

        A file that does not exist is an error when the image is loaded.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, Image.Image):
            kept = io.BytesIO()
            upright_rgb(value).save(kept, "PNG")
            value = {"bytes": kept.getvalue()}
        if isinstance(value, dict) and value.get("bytes"):
            content: bytes = value["bytes"]
            called = name or str(value.get("path") or "")
            return cls(called, _digest(content), None, again or (lambda: content), where)
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str) or not path:
            raise ValueError(f"{where}: an image or the path of one is needed, got {str(value)[:80]!r}")
        below = folder or Path()
        file = next((f for one in (path, *other_names(path)) if (f := below / one).is_file()), below / path)
        absent = ""
        if not file.is_file():
            hint = "" if folder else " (images: names the folder of the images)"
            absent = f"{where}: there is no image {file}{hint}"
        digest = _digest(str(file.resolve()).encode())
        return cls(name or path, digest, file.resolve(), where=where, absent=absent)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, read from the head of the file."""
        return image_size(self._source(), self.named)

    @property
    def named(self) -> str:
        """Its name in errors."""
        return f"{self.file or self.name} ({self.where})" if self.where else f"{self.file or self.name}"

    def load(self) -> Image.Image:
        """The image, upright, as RGB.

        Raises:
            ValueError: it is missing, damaged, or not an image; the message says which one.
        """
        return load_image(self._source(), self.named)

    def _source(self) -> Path | bytes:
        if self.absent:
            raise ValueError(self.absent)
        if self.read is not None:
            return self.read()
        return self.file or Path(self.name)

    @cached_property
    def problem(self) -> str:
        """Why it cannot be read; empty if it can."""
        try:
            self.load()
        except ValueError as error:
            return str(error)
        return ""

    def keep(self, folder: Path) -> str:
        """Where a record finds the image: its file, or a copy that is made in ``folder/images``."""
        if self.read is None:
            return str(self.file)
        content = self.read()
        with Image.open(io.BytesIO(content)) as image:
            ending = (image.format or "png").lower().replace("jpeg", "jpg")
        path = folder / "images" / f"{self.digest}.{ending}"
        if not path.exists():
            write_whole(path, content)
        return path.relative_to(folder).as_posix()


def _digest(what: bytes) -> str:
    return hashlib.sha256(what).hexdigest()[:20]
