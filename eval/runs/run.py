"""Run a config: finished work is on disk at once, and a later start continues where this one stopped."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vlm_prune import pruned
from vlm_prune.eval.records import read_json
from vlm_prune.eval.runs.asking import ask, batches
from vlm_prune.eval.runs.cells import Cell, build_cells
from vlm_prune.eval.runs.config import RunConfig
from vlm_prune.eval.runs.folder import Record, RunFolder, write_json, write_lines, write_whole
from vlm_prune.eval.runs.images import Picture
from vlm_prune.eval.runs.models import Loaded, load
from vlm_prune.eval.runs.parts import add_part, read_parts, read_remains, remove_parts
from vlm_prune.eval.runs.processes import Processes
from vlm_prune.eval.runs.scoring import Scorer
from vlm_prune.eval.runs.speed import time_prompts
from vlm_prune.eval.runs.standings import standings
from vlm_prune.eval.runs.table import joined, markdown, tasks_of
from vlm_prune.eval.runs.tasks import SpeedTask

Advance = Callable[[int], None]


class Failure(Exception):
    """A cell could not be finished, in this process or another one; says why, with the traceback."""

    def __init__(self, error: str, trace: str):
        super().__init__(error)
        self.trace = trace


class Run:
    """One start of a config.

    Attributes:
        rows: of the finished cells, by name.
        broken: what is damaged on disk of cells that were finished once, by name; they are done again.
        failed: what went wrong in other cells.
    """

    def __init__(self, config: RunConfig, processes: Processes, retime: bool = False):
        self.config, self.processes = config, processes
        self.folder = RunFolder(config.output)
        self.cells = build_cells(config)
        if config.on_bad_image == "skip":
            self.cells = self._readable()
        # the first process decides, in case others do not see its disk
        self.rows, self.broken = processes.gather(self._look())[0]
        self.missing = [
            cell
            for cell in self.cells
            if cell.name not in self.rows or (retime and isinstance(cell.task, SpeedTask))
        ]
        self.failed: dict[str, Record] = {}

    def _readable(self) -> list[Cell]:
        """The cells without samples whose image some process cannot read: batches have to be the same in all."""
        pictures: dict[str, Picture] = {}
        for sample in (sample for cell in self.cells for sample in cell.samples):
            pictures.setdefault(sample.picture.digest, sample.picture)
        mine = {digest: picture.problem for digest, picture in pictures.items() if picture.problem}
        bad = {digest: why for found in self.processes.gather(mine) for digest, why in found.items()}
        return [cell.without(bad) for cell in self.cells] if bad else self.cells

    def _look(self) -> tuple[dict[str, Record], dict[str, str]]:
        """The rows on disk, and for cells that were finished, why a row is missing."""
        rows: dict[str, Record] = {}
        broken: dict[str, str] = {}
        for cell in self.cells:
            try:
                if (row := self.folder.row(cell.name)) is None:
                    continue
                if (before := row.get("skipped", 0)) != len(cell.skipped):
                    raise ValueError(f"{before} samples were skipped, {len(cell.skipped)} are now")
                rows[cell.name] = row
            except ValueError as error:
                broken[cell.name] = str(error)
        return rows, broken

    def work(
        self, show: Callable[[Cell], None] = lambda cell: None, advance: Advance = lambda n: None
    ) -> None:
        """Finish what is missing. ``show`` is called for each cell that begins, ``advance`` for answers given here."""
        self._write()
        for model, group in groupby(self.missing, key=lambda cell: cell.model):
            cells = list(group)
            loaded: Loaded | None = None
            try:
                loaded = self._together(lambda model=model: load(model, self.config.dtype, self.processes))  # type: ignore[misc]
            except Failure as failure:
                self._note(cells, failure)
            for cell in cells if loaded is not None else ():
                show(cell)
                try:
                    self._finish(loaded, cell, advance)  # type: ignore[arg-type]
                except Failure as failure:
                    self._note([cell], failure)
                self._write()
            del loaded
        self._write(judge=True)

    def _together(self, job: Callable[[], Any]) -> Any:
        """Do a job in every process. Raises in all of them if it failed in one."""
        result, problem = None, None
        try:
            result = job()
        except Exception as error:  # of any kind: it is reported, and the other cells continue
            problem = (f"{type(error).__name__}: {error}", traceback.format_exc())
        for found in self.processes.gather(problem):
            if found is not None:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                raise Failure(*found)
        return result

    def _finish(self, loaded: Loaded, cell: Cell, advance: Advance) -> None:
        folder = self.folder.cell(cell.name)
        task = cell.task
        if isinstance(task, SpeedTask):
            timed = self._together(lambda: self._time(loaded, cell, task, advance))
            records, times = self.processes.gather(timed)[0]  # the only process that has any
        else:
            mine, times = self._together(lambda: self._answer(loaded, cell, advance)), None
            known = {name: record for part in self.processes.gather(mine) for name, record in part.items()}
            records = [known[sample.id] for sample in cell.samples]
        row = self._together(lambda: cell.about() | Scorer(cell.task).row(records))
        row["warnings"] = [*cell.remarks(), *row["warnings"]]
        if self.processes.first:
            write_lines(folder / "samples.jsonl", records)
            if times is not None:
                write_json(folder / "times.json", times)
            write_json(folder / "row.json", row)
        self.processes.gather(None)  # no process deletes its part before the row is on disk
        remove_parts(folder)
        self.rows[cell.name] = row

    def _answer(self, loaded: Loaded, cell: Cell, advance: Advance) -> dict[str, Record]:
        """This process's share of a cell: all records that it has, by sample."""
        folder, task, scorer = self.folder.cell(cell.name), cell.task, Scorer(cell.task)
        known = read_remains(folder) | read_parts(folder)
        done = set().union(*self.processes.gather(set(known)))
        turns = list(batches(cell.samples, task.batch_size or self.config.batch_size))
        with pruned(loaded.model, cell.entry.policy, **cell.options):
            for number in range(self.processes.rank, len(turns), self.processes.count):
                if left := [sample for sample in turns[number] if sample.id not in done]:
                    answers = ask(loaded, left, task.max_new_tokens, self.folder.path)
                    found = [scorer.judge(record) for record in answers]
                    add_part(folder, self.processes.rank, found)
                    known |= {record["id"]: record for record in found}
                advance(sum(map(len, turns[number : number + self.processes.count])))
        return known

    def _time(
        self, loaded: Loaded, cell: Cell, task: SpeedTask, advance: Advance
    ) -> tuple[list[Record], dict[str, float]]:
        """Records and times of a speed cell, by the first process alone: the others would disturb it."""
        if not self.processes.first:
            return [], {}
        return time_prompts(
            loaded, cell.entry.policy, cell.options, cell.samples, task.rounds, task.max_new_tokens,
            self.folder.path, advance,
        )  # fmt: skip

    def _note(self, cells: list[Cell], failure: Failure) -> None:
        for cell in cells:
            self.failed[cell.name] = {**cell.about(), "error": str(failure), "traceback": failure.trace}

    def finished_rows(self) -> list[Record]:
        """The rows that there are, in the order of the config."""
        return [self.rows[cell.name] for cell in self.cells if cell.name in self.rows]

    def times(self) -> dict[str, Record]:
        """The times of finished speed cells, by cell."""
        paths = {row["cell"]: self.folder.cell(row["cell"]) / "times.json" for row in self.finished_rows()}
        return {name: read_json(path) for name, path in paths.items() if path.exists()}

    def lines(self) -> list[Record]:
        """Rows and times side by side, and who beats whom, see `table.joined`."""
        rows = self.finished_rows()
        return joined(rows, self.times(), self.config.seed, standings(self.folder, rows))

    def _write(self, judge: bool = False) -> None:
        """Write everything that is assembled from the cells; ``judge`` compares policies, which reads all samples."""
        if not self.processes.first:
            return
        path, rows, times = self.folder.path, self.finished_rows(), self.times()
        write_json(path / "results.json", rows)
        write_json(path / "times.json", times)
        judged = standings(self.folder, rows) if judge else None
        if judged is not None:
            write_json(path / "paired.json", judged.records())
        write_whole(
            path / "results.md", markdown(joined(rows, times, self.config.seed, judged), tasks_of(rows))
        )
        skipped = {
            f"{cell.model.name}, {cell.task.name}": cell.skipped for cell in self.cells if cell.skipped
        }
        for name, found in {"failed.json": list(self.failed.values()), "skipped.json": skipped}.items():
            if found:
                write_json(path / name, found)
            else:
                (path / name).unlink(missing_ok=True)


def execute(config: RunConfig, console: Console, source: str | None = None, retime: bool = False) -> Run:
    """Run a config with progress bars and a summary.

    Args:
        config: what to run.
        console: where progress is shown.
        source: text of the file the config was read from, to be kept in the run folder.
        retime: measure the times of finished cells again, for example because the machine was busy.
    """
    processes = Processes.join()
    try:
        run = Run(config, processes, retime)
        if processes.first:
            text = source or yaml.safe_dump(
                config.model_dump(mode="json", exclude_defaults=True), sort_keys=False
            )
            write_whole(config.output / "config.yaml", text)
            done = len(run.cells) - len(run.missing)
            _say(console, f"{len(run.cells)} cells, {done} of them finished already: {config.output}")
            if run.broken:
                first = next(iter(run.broken.values()))
                _say(
                    console,
                    f"{len(run.broken)} finished cells are not whole and are done again; first {first}",
                )
        watch(run, console)
    finally:
        processes.leave()
    if processes.first:
        _summary(run, console)
    return run


def _summary(run: Run, console: Console) -> None:
    """What failed, what has warnings and where all of it is."""
    for problem in run.failed.values():
        _say(console, ("failed", "red"), f" {problem['cell']}: {problem['error']}")
    rows = run.finished_rows()
    skipped = {why: None for cell in run.cells for why in cell.skipped}
    if skipped:
        first = next(iter(skipped))
        _say(
            console,
            ("skipped", "yellow"),
            f" samples of {len(skipped)} images, see skipped.json; first {first}",
        )
    if warned := [row for row in rows if row["warnings"]]:
        first = f"{warned[0]['cell']}: {warned[0]['warnings'][0]}"
        _say(console, f"{len(warned)} cells have warnings, see results.json; first {first}")
    kept = f"{len(rows)} of {len(run.cells)} cells in {run.folder.path / 'results.json'} and results.md"
    _say(console, f"{kept}, {len(run.failed)} failed" + (", see failed.json" if run.failed else ""))
    if (written := report_of(run)) is not None:
        _say(console, f"look at {written}")


def _say(console: Console, *parts: str | tuple[str, str]) -> None:
    """A line on the screen, or ``(text, style)`` parts of one.

    Labels, errors and answers may contain brackets, such as ``[/INST]``, which are not markup.
    """
    console.print(Text.assemble(*parts), soft_wrap=True)


def report_of(run: Run) -> Path | None:
    """Write the report again; ``None`` while no cell is finished."""
    from vlm_prune.eval.report import write_report

    return write_report(run.folder) if run.finished_rows() else None


def watch(run: Run, console: Console) -> None:
    """Do the work under a progress bar with the time that is left."""
    names = TextColumn("{task.description}", markup=False)  # a label may have brackets
    columns = (names, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not run.processes.first) as progress:
        task = progress.add_task("prompts", total=sum(map(_prompts, run.missing)))
        run.work(
            lambda cell: progress.update(task, description=str(cell)),
            lambda count: progress.advance(task, count),
        )


def _prompts(cell: Cell) -> int:
    """How far a cell moves the progress bar."""
    task = cell.task
    return len(cell.samples) * (2 * (task.rounds + 1) if isinstance(task, SpeedTask) else 1)
