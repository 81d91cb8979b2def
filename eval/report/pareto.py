"""The Pareto front: what nothing else beats at the same cost or less."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Numbers of the points that have more value than every point of the same cost or less, cheapest first.

    Of points that are equal in both, the first one stands for all.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i], i))
    front: list[int] = []
    for number in order:
        if not front or values[number] > values[front[-1]]:
            front.append(number)
    return front
