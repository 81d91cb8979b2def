"""Dividing a grid of visual tokens into parts, as policies and the engine both need."""

from __future__ import annotations


def part(number: int, parts: int, size: int) -> range:
    """Part ``number`` of ``size`` places divided into ``parts`` runs whose lengths differ by one at most."""
    return range(number * size // parts, (number + 1) * size // parts)


def middle_of(places: range) -> int:
    """The place in the middle of a run."""
    return places[len(places) // 2]
