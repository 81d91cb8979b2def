"""Bars of whole calls over stock: the picture beside a page of GPU measurements.

``python -m vlm_prune.eval.bench.bars docs/gpu/<card>.json`` draws it from the page's figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STOCK = "dense"
"""What rows of whole calls name the unpruned model."""

EAGER, CAPTURED = "Whole calls", "Captured calls"
"""The tables of a page that bars are drawn of."""

Row = Mapping[str, Any]


def times(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Wall time of each policy over the eager stock call in the same rounds, by batch, eager or captured."""
    return _grouped((row, row["over stock"]) for row in rows)


def memory(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Peak memory above the weights of each policy over that of the eager stock call, by group of bars.

    Batches without a stock row are left out.
    """
    stock = {row["batch"]: row["peak MiB"] for row in rows if row["policy"] == STOCK}
    return _grouped((row, row["peak MiB"] / stock[row["batch"]]) for row in rows if row["batch"] in stock)


def _grouped(ratios: Iterable[tuple[Row, float]]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for row, ratio in ratios:
        if row["policy"] != STOCK:
            group = f"batch {row['batch']}, {'captured' if row['table'] == CAPTURED else 'eager'}"
            groups.setdefault(group, {})[row["policy"]] = ratio
    return groups


def whole_calls(page: Mapping[str, Any]) -> list[Row]:
    """The rows of a page's JSON that are whole calls, with the title of their ``table``.

    Of captured calls those stay of which at least one part was captured.
    """
    return [
        {**row, "table": section["title"]}
        for section in page["sections"]
        if section["title"] in (EAGER, CAPTURED)
        for row in section["rows"]
        if section["title"] == EAGER or row["policy"] == STOCK or row["captured"]
    ]


def draw(page: Mapping[str, Any], path: Path) -> bool:
    """Draw wall time and peak memory over stock to ``path``; False where the page has no whole calls."""
    import matplotlib.pyplot as plt

    from vlm_prune.eval.report.looks import looks

    rows = whole_calls(page)
    found = [
        ("wall time over stock, eager", times(rows)),
        ("peak memory above the weights, over stock, eager", memory(rows)),
    ]
    if not found[0][1]:
        return False
    colours = {name: look.light for name, look in looks({row["policy"] for row in rows} - {STOCK}).items()}
    height = 1 + 0.22 * sum(len(bars) + 1 for bars in found[0][1].values())
    figure, axes = plt.subplots(1, len(found), figsize=(11, height), squeeze=False, layout="constrained")
    for (title, groups), axis in zip(found, axes[0], strict=True):
        _panel(axis, title, groups, colours)
    about = page["facts"]
    figure.suptitle(f"{page['title']}, commit {about['commit']}: {about['calls']}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _panel(
    axis: Any, title: str, groups: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]
) -> None:
    place, ticks = 0.0, []
    for group, bars in groups.items():
        place -= 1
        axis.text(0, place, group, fontsize=8, fontweight="bold", va="center")
        for policy, ratio in sorted(bars.items(), key=lambda item: item[1]):
            place -= 1
            axis.barh(place, ratio, color=colours[policy], height=0.8)
            axis.text(ratio, place, f" {ratio:.2f}", fontsize=8, va="center")
            ticks.append((place, policy))
    axis.axvline(1, color="0.3", linewidth=1, linestyle="--")
    axis.set_yticks([at for at, _ in ticks], [policy for _, policy in ticks], fontsize=8)
    axis.set_xlim(0, 1.12 * max(1.0, *(ratio for bars in groups.values() for ratio in bars.values())))
    axis.set_title(title, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str]) -> None:
    """Draw the picture of each page named, beside it."""
    for name in arguments:
        path = Path(name)
        if not draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png")):
            raise SystemExit(f"{path}: no whole calls were measured")


if __name__ == "__main__":
    main(sys.argv[1:])
