"""Checks of a policy's settings, with errors that say what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..contract.numbers import is_whole


def check_choice(policy: Any, **allowed: Sequence[Any]) -> None:
    """Raise ValueError if a field of ``policy`` is not one of its allowed values."""
    for name, values in allowed.items():
        given = getattr(policy, name)
        if given not in values:
            raise ValueError(f"{name}={given!r}: choose {' or '.join(map(repr, values))}")


def check_whole(policy: Any, *names: str) -> None:
    """Raise ValueError if a field of ``policy`` is not a whole number of up to 63 bits."""
    for name in names:
        given = getattr(policy, name)
        if not is_whole(given) or not -(2**63) <= given < 2**63:
            raise ValueError(f"{name}={given!r}: choose a whole number of up to 63 bits, such as 0")


def check_number(policy: Any, optional: bool = False, **ranges: tuple[float, float]) -> None:
    """Raise ValueError if a field of ``policy`` is not a number between its bounds, which are allowed.

    ``optional`` fields may be ``None``.
    """
    for name, (low, high) in ranges.items():
        given = getattr(policy, name)
        if given is None and optional:
            continue
        if isinstance(given, bool) or not isinstance(given, int | float) or not low <= given <= high:
            rest = ", or None" if optional else ""
            raise ValueError(f"{name}={given!r}: choose a number from {low:g} to {high:g}{rest}")
