"""The one way in which images are read: turned as a camera says, to eight bits and RGB, named in every error."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

T = TypeVar("T")

RANGES = (255.0, 65535.0)
"""Largest values of the usual whole-number formats."""
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)


def load_image(source: Path | str | bytes, name: str = "") -> Image.Image:
    """An image file, or the bytes of one, as `upright_rgb` makes it.

    Args:
        source: path or content.
        name: what to call it in errors; default its path.

    Raises:
        ValueError: it does not exist, is not whole or is no image; says which one and why.
    """
    return _read(source, name, upright_rgb)


def image_size(source: Path | str | bytes, name: str = "") -> tuple[int, int]:
    """Width and height in pixels of what `load_image` gives, read from the head of the file."""
    return _read(source, name, _upright_size)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says, in RGB with eight bits.

    Pillow cuts off whatever is above 255 where an image has more than eight bits. Here 16-bit values are scaled from
    0..65535; 32-bit whole numbers and floats from the smallest of 0..1 (floats), 0..255 and 0..65535 that holds
    them, or else from their least to their greatest.

    Raises:
        ValueError: a pixel is not finite.
    """
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(turned), RANGES[1])).convert("RGB")
    if turned.mode in ("I", "F"):
        values = np.asarray(turned)
        return Image.fromarray(_eight_bits(values, _largest(values))).convert("RGB")
    return turned.convert("RGB")


def _largest(values: npt.NDArray[Any]) -> float | None:
    """The end of the smallest usual range from 0 that holds all ``values``."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("a pixel is not finite")
    ranges = RANGES if values.dtype.kind in "iu" else (1.0, *RANGES)
    return next((end for end in ranges if low >= 0 and high <= end), None)


def _eight_bits(values: npt.NDArray[Any], end: float | None) -> npt.NDArray[np.uint8]:
    """Scaled from 0..``end`` to 0..255; from their least to their greatest without an ``end``."""
    low = 0.0 if end is not None else float(values.min())
    width = (end if end is not None else float(values.max())) - low
    scaled = 255.0 * (values.astype(np.float64) - low) / (width or 1.0)
    return scaled.round().astype(np.uint8)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    lies = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return (height, width) if lies else (width, height)


def _read(source: Path | str | bytes, name: str, what: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return what(image)
    except (
        Exception
    ) as error:  # whatever Pillow's readers raise, by format, about a file that is broken or no image
        named = name or ("of given bytes" if isinstance(source, bytes) else str(source))
        raise ValueError(f"image {named} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image that Pillow knows, or its first bytes are broken"
    return str(error) or type(error).__name__
