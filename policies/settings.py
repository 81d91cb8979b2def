"""Checks of a policy's settings, with errors that say what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_choice(policy: Any, **allowed: Sequence[Any]) -> None:
    """Raise ValueError if a field of ``policy`` is none of the values allowed for it."""
    for name, values in allowed.items():
        given = getattr(policy, name)
        if given not in values:
            raise ValueError(f"{name}={given!r}: choose {' or '.join(map(repr, values))}")


def check_number(policy: Any, optional: bool = False, **ranges: tuple[float, float]) -> None:
    """Raise ValueError if a field of ``policy`` is no number from the lower to the upper bound, both allowed.

    ``optional`` fields may be ``None``.
    """
    for name, (low, high) in ranges.items():
        given = getattr(policy, name)
        if given is None and optional:
            continue
        if isinstance(given, bool) or not isinstance(given, int | float) or not low <= given <= high:
            rest = ", or None" if optional else ""
            raise ValueError(f"{name}={given!r}: choose a number from {low:g} to {high:g}{rest}")
