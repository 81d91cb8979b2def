"""Numbers as callers have them: Python's own, numpy's, and tensors without dimensions."""

from __future__ import annotations

from typing import Any


def plain_number(value: Any) -> Any:
    """A number of numpy, or of a tensor without dimensions, as Python's; anything else as it is."""
    lone = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if lone else value


def is_whole(value: Any) -> bool:
    """Whether this is an integer of Python's, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
