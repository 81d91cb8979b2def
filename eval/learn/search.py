"""Bayesian optimisation of a handful of numbers, with trials kept in a file."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import StateError

Point = list[float]
Bounds = list[tuple[float, float]]


class Search:
    """Bayesian optimisation by scikit-optimize with the released code's settings. Maximises.

    Attributes:
        space: lower and upper bound of each coordinate.
        initial: points drawn by lot before the Gaussian process takes over.
        best: the best point told so far and its value; the first of equals.
    """

    def __init__(self, space: Bounds, seed: int = 42, initial: int = 27):
        try:
            skopt = importlib.import_module("skopt")
        except ImportError as error:
            raise ImportError('tune needs scikit-optimize: in a clone, pip install ".[tune]"') from error
        self.space, self.initial = space, initial
        self.best: tuple[Point, float] | None = None
        self._optimizer = skopt.Optimizer(space, random_state=seed, n_initial_points=initial)

    def ask(self) -> Point:
        """The next point to try, within bounds."""
        point = self._optimizer.ask()
        return [min(max(float(x), low), high) for x, (low, high) in zip(point, self.space, strict=True)]

    def tell(self, point: Point, value: float) -> None:
        """Learn the value of a point."""
        self._optimizer.tell(point, -value)
        if self.best is None or value > self.best[1]:
            self.best = (point, value)


@dataclass
class Study:
    """The trials of a search, kept in a file of JSON lines so that an interrupted search goes on where it stopped.

    ``header`` says which search it is; ``trials`` are (point, value) pairs. Without a ``path`` nothing is written.
    """

    header: dict[str, Any]
    path: Path | None = None
    trials: list[tuple[Point, float]] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path | None, header: dict[str, Any]) -> Study:
        """Read the study if the file exists. StateError if the file is that of another search.

        A file is begun with the first trial, so a start that fails before that leaves nothing in the way.
        """
        study = cls(json.loads(json.dumps(header)), None if path is None else Path(path))
        if study.path is None:
            return study
        if study.path.exists():
            study._read(study.path)
            study._write(study.path)  # without a line that was cut off
        return study

    def _write(self, path: Path) -> None:
        """The file as a whole, old or new: a start that is killed here loses no trial."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.new")
        lines = [json.dumps(self.header) + "\n", *(_line(point, value) for point, value in self.trials)]
        beside.write_text("".join(lines), encoding="utf-8")
        beside.replace(path)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            found = json.loads(lines[0])
            differ = sorted(
                k for k in found.keys() | self.header.keys() if found.get(k) != self.header.get(k)
            )
        except (IndexError, ValueError, AttributeError) as error:
            raise StateError(f"{path} is not a study of tune(): choose another file for study=.") from error
        if differ:
            given = ", ".join(f"{k}: {found.get(k)!r} there, {self.header.get(k)!r} here" for k in differ)
            raise StateError(
                f"{path} belongs to another search ({given}): choose another file, or delete it."
            )
        for line in lines[1:]:
            try:
                trial = json.loads(line)
            except ValueError:  # cut off in the middle of writing
                break
            self.trials.append((trial["point"], trial["value"]))

    def add(self, point: Point, value: float) -> None:
        """Append a trial, on disk at once."""
        self.trials.append((point, value))
        if self.path is not None and not self.path.exists():
            self._write(self.path)
        elif self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(point, value))


def _line(point: Point, value: float) -> str:
    return json.dumps({"point": point, "value": value}) + "\n"
