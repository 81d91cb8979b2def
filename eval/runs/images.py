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

from vlm_prune.eval.runs.folder import write_whole


@dataclass(frozen=True)
class Picture:
    """An image, opened when it is needed.

    Attributes:
        name: what the data set calls it.
        digest: names the content of an image that is no file, and the path of one that is.
        file: where it is, if it is a file.
        read: gives PNG, JPEG ... bytes, if it is not.
    """

    name: str
    digest: str
    file: Path | None = None
    read: Callable[[], bytes] | None = None

    @classmethod
    def of(
        cls,
        value: Any,
        folder: Path | None,
        where: str,
        name: str | None = None,
        again: Callable[[], bytes] | None = None,
    ) -> Picture:
        """From what a data set holds: a path below ``folder``, an image, or a mapping with ``bytes`` or ``path``.

        ``again`` gives the bytes another time, so that they need not be kept until then.

        Raises:
            ValueError: there is no such file, or it is nothing of the kind.
        """
        if isinstance(value, Image.Image):
            kept = io.BytesIO()
            value.convert("RGB").save(kept, "PNG")
            value = {"bytes": kept.getvalue()}
        if isinstance(value, dict) and value.get("bytes"):
            content: bytes = value["bytes"]
            return cls(
                name or str(value.get("path") or ""), _digest(content), None, again or (lambda: content)
            )
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str) or not path:
            raise ValueError(f"{where}: an image or the path of one is needed, got {str(value)[:80]!r}")
        file = (folder or Path()) / path
        if not file.is_file():
            hint = "" if folder else " (images: names the folder of the images)"
            raise ValueError(f"{where}: there is no image {file}{hint}")
        return cls(name or path, _digest(str(file.resolve()).encode()), file.resolve())

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, read from the head of the file."""
        with Image.open(self._source) as image:
            return image.size

    def load(self) -> Image.Image:
        """The image, as RGB."""
        with Image.open(self._source) as image:
            return image.convert("RGB")

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

    @property
    def _source(self) -> Any:
        return self.file if self.read is None else io.BytesIO(self.read())


def _digest(what: bytes) -> str:
    return hashlib.sha256(what).hexdigest()[:20]
