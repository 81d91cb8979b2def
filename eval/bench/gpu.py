"""What this machine's GPU says about the package, in seven minutes: ``python -m vlm_prune.eval.bench.gpu``.

Sections follow each other; each row is written to ``docs/gpu/<card>.md`` and ``.json`` as soon as it is measured, so a
run that is ended early leaves what it had. It uses the tests and their small models, so it runs in a clone. Of the
package's dependencies it needs torch, Triton, transformers, pytest and typer alone.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import transformers
import typer

from vlm_prune import PruningError, __version__, pruned
from vlm_prune.eval.bench.bars import draw
from vlm_prune.eval.bench.calls import EVERYDAY, calls
from vlm_prune.eval.bench.clock import interleaved, peak_bytes
from vlm_prune.eval.bench.speed import answering
from vlm_prune.eval.bench.subject import Subject

FOLDER = Path("docs/gpu")
MINUTES = 6.5
"""For all sections; one that has begun a batch ends it."""
SAME = 2e-3
"""How far a logit on the GPU may be from that on the CPU, in fp32 without TF32."""
NEW = 4
"""Tokens generated where answers are compared."""

Row = dict[str, Any]
"""A line of a section's table, by column."""


@dataclass
class Section:
    """A table of the page.

    Attributes:
        title: its heading.
        says: what the figures are, in a paragraph above them.
        rows: its lines, which all have the same columns.
        failed: what is wrong, in words; nothing if all is well.
        left_out: what was not measured, and why.
        seconds: that it took.
    """

    title: str
    says: str
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def markdown(self) -> str:
        """As the page shows it."""
        parts = [f"## {self.title}", self.says]
        if self.rows:
            heads = list(self.rows[0])
            lines = [f"| {' | '.join(heads)} |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
            lines += [f"| {' | '.join(_shown(row.get(head)) for head in heads)} |" for row in self.rows]
            parts.append("\n".join(lines))
        parts += [f"**Failed:** {why}" for why in self.failed]
        parts += [f"**Not measured:** {what}" for what in self.left_out]
        return "\n\n".join([*parts, f"{self.seconds:.0f} s."])


def _shown(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else value
    return (f"{text:.0f}" if isinstance(text, float) else str(text)).replace("|", "\\|").replace("\n", " ")


@dataclass
class Page:
    """All sections so far, and the two files that hold them."""

    path: Path
    title: str
    facts: dict[str, str]
    sections: list[Section] = field(default_factory=list)

    def write(self) -> None:
        """Write both files as they are to be now."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        parts = [f"# {self.title}", facts, *(section.markdown() for section in self.sections)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        stored = {"title": self.title, "facts": self.facts, "sections": [asdict(x) for x in self.sections]}
        self.path.with_suffix(".json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Machine:
    """Where things run, and until when.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        until: of ``time.monotonic``, when a section has to end.
    """

    device: str
    until: float

    @property
    def dry(self) -> bool:
        """Whether sizes are tiny and figures mean nothing."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds, below zero if time is up."""
        return self.until - time.monotonic()


def tests(machine: Machine, section: Section) -> Iterator[Row]:
    """``pytest -m cuda``, in processes of their own."""
    with TemporaryDirectory() as folder:
        found = Path(folder) / "tests.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "cuda",
            f"--junitxml={found}",
            "-p",
            "no:cacheprovider",
        ]
        if not machine.dry and importlib.util.find_spec("xdist"):
            command += ["-n", "8"]
        # the other files may need packages that are not here
        command += [
            str(x) for x in sorted(Path("tests").glob("test_*.py")) if "pytest.mark.cuda" in x.read_text()
        ]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=max(machine.left, 1))
        except subprocess.TimeoutExpired:
            section.failed.append(f"the tests were not done after {machine.left:.0f} s")
            return
        if not found.exists():
            section.failed.append(f"pytest did not start: {(ran.stderr or ran.stdout).strip()[-300:]}")
            return
        suite = ET.parse(found).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = count["failures"] + count["errors"]
    yield {"passed": count["tests"] - bad - count["skipped"], "failed": bad, "skipped": count["skipped"]}
    if bad:
        cases = [case.get("name", "?") for case in suite.iter("testcase") if case.find("failure") is not None]
        section.failed.append(f"{bad} tests, such as {', '.join(cases[:5])}")


@torch.no_grad()
def correctness(machine: Machine, section: Section) -> Iterator[Row]:
    """Every family x policy on the small models of the tests: the GPU's logits and answers against the CPU's."""
    from tests.arranged import ARRANGED
    from tests.models import FAMILIES, make, prompt
    from tests.packed import PACKED
    from tests.policy_table import TABLE, options

    torch.set_num_threads(1)  # more are slower at this size
    families = ["llava"] if machine.dry else [*FAMILIES, *ARRANGED, *PACKED]
    policies = ["uniform", "fastv"] if machine.dry else list(TABLE)
    for family in families:
        model: Any = make(family)
        twin: Any = copy.deepcopy(model).to(machine.device)
        inputs = prompt(family, [(2, -1, 4), (1, -1, 2, -1, 3)]).inputs
        moved = {name: x.to(machine.device) for name, x in inputs.items()}
        row: Row = {
            "family": family,
            "cells": 0,
            "same": 0,
            "refused": 0,
            "largest difference of logits": 0.0,
        }
        for policy in policies:
            if machine.left < 0:
                section.left_out.append(f"{policy} on {family} and what follows, for want of time")
                break
            row["cells"] += 1
            try:
                with pruned(model, **options(policy)):
                    logits = model(**inputs).logits
                    words = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            except PruningError:  # what the policy cannot do on this family
                row["refused"] += 1
                continue
            try:
                with pruned(twin, **options(policy)):
                    theirs = twin(**moved).logits.cpu()
                    same = torch.equal(
                        words,
                        twin.generate(**moved, max_new_tokens=NEW, do_sample=False, pad_token_id=0).cpu(),
                    )
            except Exception as error:
                section.failed.append(f"{policy} on {family}: {_first_line(error)}")
                continue
            off = float((logits - theirs).abs().max())
            row["largest difference of logits"] = max(row["largest difference of logits"], off)
            if same and off < SAME:
                row["same"] += 1
            else:
                section.failed.append(f"{policy} on {family}: logits off by {off:.2g}, answers same: {same}")
        yield row
        if machine.left < 0:
            return


def median_ms(run: Callable[[], Any], machine: Machine) -> float:
    """Median milliseconds of the device, with a cold cache each time; of the host in a dry run."""
    if machine.dry:
        return interleaved({"run": lambda: _quietly(run)}, 1)["run"].median
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def _quietly(run: Callable[[], Any]) -> None:
    """Call it for its time: what a run returns would count as its own milliseconds."""
    run()


def kernels(machine: Machine, section: Section) -> Iterator[Row]:
    """Each kernel at the shapes of two models against plain torch, and its bytes a second against a plain copy's."""
    from vlm_prune.kernels import reference
    from vlm_prune.kernels.cases import SHAPES, cases

    block = torch.empty(2**10 if machine.dry else 2**30, dtype=torch.int8, device=machine.device)
    target = torch.empty_like(block)
    copied = 2 * block.nbytes / median_ms(partial(target.copy_, block), machine) / 1e9
    yield {"op": f"copy of {block.nbytes} bytes", "shape": "", **_kernel_columns(None, None, copied, 1.0)}
    del block, target
    for shape in SHAPES[:1] if machine.dry else SHAPES:
        for case in cases(shape, torch.bfloat16, machine.device):
            if machine.left < 0:
                section.left_out.append(f"{case.op} at {shape.name} and what follows, for want of time")
                return
            try:
                plain = median_ms(partial(getattr(reference, case.op), *case.args), machine)
                ours = None if machine.dry else median_ms(case.launch, machine)
            except Exception as error:  # the next kernel may well work
                section.failed.append(f"{case.op} at {shape.name}: {_first_line(error)}")
                continue
            speed = case.least / (plain if ours is None else ours) / 1e9
            yield {"op": case.op, "shape": shape.name, **_kernel_columns(ours, plain, speed, speed / copied)}


def _kernel_columns(ours: float | None, plain: float | None, speed: float, share: float) -> Row:
    return {
        "kernel us": None if ours is None else ours * 1e3,
        "torch us": None if plain is None else plain * 1e3,
        "over torch": None if ours is None or plain is None else ours / plain,
        "TB/s": speed,
        "of a copy": share,
    }


@cache
def built(device: str) -> tuple[Subject, int]:
    """The model of the speed sections and the tokens it keeps: LLaVA-1.5-7B's shapes in bf16, or a toy on a CPU."""
    if device == "cpu":
        return Subject.of("host", 2, torch.float32, device, tower=3), 8
    return Subject.of("llava-1.5-7b", 32, torch.bfloat16, device), 64


Plan = Mapping[int, tuple[int, Sequence[str]]]

PLAN: Plan = {
    1: (7, EVERYDAY),
    16: (5, EVERYDAY),
    128: (2, ("uniform", "flowcut")),
}
"""Batch -> rounds and policies of the whole calls."""


def whole_calls(machine: Machine, section: Section, plan: Plan) -> Iterator[Row]:
    """Whole calls, tower to logits, over stock in the same rounds."""
    subject, tokens = built(machine.device)
    for batch, (rounds, policies) in plan.items():
        try:
            for call in calls(subject.batched(batch), policies, tokens, rounds, machine.device):
                seen = call.counts
                yield {
                    "policy": call.policy,
                    "batch": batch,
                    "wall ms": call.wall_ms,
                    "over stock": call.wall_over_dense,
                    "over oracle": call.wall_over_oracle,
                    "device ms": seen.device_ms,
                    "operations": seen.operations,
                    "launches": seen.launches,
                    "reads": seen.reads,
                    "waits": seen.waits,
                    "peak MiB": call.peak_bytes / 2**20,
                    "peak over oracle": call.peak_over_oracle,
                }
                if machine.left < 0:
                    section.left_out.append(f"what follows {call.policy} at batch {batch}, for want of time")
                    return
        except torch.OutOfMemoryError:
            section.left_out.append(f"batch {batch}: it does not fit into the memory of this card")


CAPTURED: Plan = {
    1: (5, ("uniform", "divprune", "visionzip", "agilepruner", "flowcut")),
    16: (3, ("uniform", "flowcut")),
}
"""Batch -> rounds and policies of the captured calls; "none", the stock model captured, comes with each batch."""


def captured_calls(machine: Machine, section: Section, plan: Plan) -> Iterator[Row]:
    """Whole calls whose tower and prefill are captured, over eager and over captured stock in the same rounds."""
    subject, tokens = built(machine.device)
    for batch, (rounds, policies) in plan.items():
        try:
            for call in calls(subject.batched(batch), policies, tokens, rounds, machine.device, capture=True):
                parts = call.captured or {}
                yield {
                    "policy": call.policy,
                    "batch": batch,
                    "wall ms": call.wall_ms,
                    "over stock": call.wall_over_dense,
                    "over captured stock": call.wall_over_captured,
                    "peak MiB": call.peak_bytes / 2**20,
                    "captured": ", ".join(part for part, how in parts.items() if how == "captured"),
                    "eager": "; ".join(f"{part} {how}" for part, how in parts.items() if how != "captured"),
                }
                if machine.left < 0:
                    section.left_out.append(f"what follows {call.policy} at batch {batch}, for want of time")
                    return
        except torch.OutOfMemoryError:
            section.left_out.append(f"batch {batch}: it does not fit into the memory of this card")


@torch.no_grad()
def answers(machine: Machine, section: Section, batches: Sequence[int], new: int) -> Iterator[Row]:
    """Requests and tokens a second of ``generate``, interleaved with stock."""
    subject, tokens = built(machine.device)
    for batch in batches:
        if machine.left < 0:
            section.left_out.append(f"batch {batch} and what follows, for want of time")
            return
        some = subject.batched(batch)
        run = answering(some, new)
        runs: dict[str, Callable[[], Any]] = {"dense": run}
        for policy in ("uniform", "flowcut"):
            runs[policy] = some.under(policy, {"tokens": tokens}, run)
        try:
            peaks = {policy: peak_bytes(one, machine.device) for policy, one in runs.items()}
            times = interleaved(runs, 2)
        except torch.OutOfMemoryError:
            section.left_out.append(f"batch {batch}: it does not fit into the memory of this card")
            continue
        for policy, spent in times.items():
            yield {
                "policy": policy,
                "batch": batch,
                "new tokens": new,
                "requests/s": 1e3 * batch / spent.median,
                "tokens/s": 1e3 * batch * new / spent.median,
                "time over stock": spent.over(times["dense"]),
                "peak MiB": peaks[policy] / 2**20,
            }


Measure = Callable[[Machine, Section], Iterator[Row]]


def sections(dry: bool) -> list[tuple[str, Measure, float]]:
    """Title, what measures it, and its share of the time; what an earlier one does not use falls to the next."""
    plan: Plan = {1: (1, ("uniform", "flowcut")), 2: (1, ("uniform",))} if dry else PLAN
    graphs: Plan = {1: (1, ("uniform",))} if dry else CAPTURED
    batches, new = ((1, 2), 2) if dry else (tuple(PLAN), 34)
    return [
        ("CUDA tests", tests, 0.25),
        ("Against the CPU", correctness, 0.15),
        ("Kernels", kernels, 0.03),
        ("Whole calls", partial(whole_calls, plan=plan), 0.3),
        ("Captured calls", partial(captured_calls, plan=graphs), 0.17),
        ("Answers", partial(answers, batches=batches, new=new), 0.1),
    ]


SAYS = {
    "CUDA tests": "`pytest -m cuda`: every kernel against its reference, and pruned models on top of them.",
    "Against the CPU": "Small models in fp32 without TF32, a batch of two prompts, every policy: logits at most "
    f"{SAME} apart and the same {NEW} tokens generated. *Refused*: a documented error, on the CPU already.",
    "Kernels": "Median time of the launcher against the reference in plain torch, bf16, cold L2 cache. TB/s counts the "
    "least bytes that any implementation has to move; *of a copy* is over the speed of a plain copy.",
    "Whole calls": "Tower to logits at the shapes of LLaVA-1.5-7B (random weights, bf16, 576 of which 64 visual tokens "
    "stay), eager. Wall times are medians of interleaved rounds, ratios are taken round by round. *Oracle*: the stock "
    "tower, and the stock language model on as few rows as `uniform` leaves. *Device ms* is the sum over all kernels "
    "and copies of one run; *launches* and *waits* (for a stream or an event) are the host's. Memory is above the "
    "weights.",
    "Captured calls": "The same calls with `capture=True`: tower and prefill recorded once and replayed. *Over stock* "
    "is over the eager stock call, *over captured stock* over that of `none` captured, in the same rounds. *Eager* "
    "says which parts were not captured, and why.",
    "Answers": "`generate` at the same shapes, greedy, with the dynamic cache.",
}


def measure(page: Page, device: str, minutes: float) -> None:
    """Run all sections, and write the page after each row."""
    begun, share = time.monotonic(), 0.0
    for title, run, part in sections(device == "cpu"):
        share += part
        machine = Machine(device, begun + 60 * minutes * share)
        section, start = Section(title, SAYS[title]), time.monotonic()
        page.sections.append(section)
        try:
            for row in run(machine, section):
                section.rows.append(row)
                section.seconds = time.monotonic() - start
                page.write()
        except Exception as error:  # the next section may well work
            section.failed.append(f"{type(error).__name__}: {_first_line(error)}")
        section.seconds = time.monotonic() - start
        page.write()
        typer.echo(section.markdown() + "\n")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def commit_here() -> str:
    """The commit of the clone, and whether it was changed; "unknown" outside one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            ", changed" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts(card: str, commit: str | None) -> dict[str, str]:
    """What the figures hold for."""
    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    return {
        "card": card,
        "commit": commit or commit_here(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": f"vlm_prune {__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
        "calls": "LLaVA-1.5-7B's shapes, 576 -> 64 visual tokens, bf16",
    }


def picture(page: Page) -> str:
    """Draw the page's bars beside it, if this machine has matplotlib; returns what to add to the list of files."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"; draw the bars elsewhere: python -m vlm_prune.eval.bench.bars {page.path}.json"
    stored = json.loads(page.path.with_suffix(".json").read_text(encoding="utf-8"))
    return f", {page.path}.png" if draw(stored, page.path.with_suffix(".png")) else ""


def main(
    out: Annotated[Path, typer.Option(help="Folder for <card>.md and <card>.json.")] = FOLDER,
    minutes: Annotated[float, typer.Option(help="Time for all sections together.")] = MINUTES,
    commit: Annotated[
        str | None, typer.Option(help="Where git cannot say: the commit that is measured.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Every section on the CPU with tiny sizes: no figure means anything."),
    ] = False,
) -> None:
    """Test, compare and measure on this machine's GPU; exit 1 if something is wrong, 2 without a GPU."""
    if not (dry_run or torch.cuda.is_available()):
        typer.echo(
            f"error: torch {torch.__version__} sees no CUDA device. Run this on a machine with a GPU and a CUDA build "
            "of torch, or pass --dry-run to see every section run on the CPU with tiny sizes.",
            err=True,
        )
        raise typer.Exit(2)
    if not Path("tests/models.py").is_file():
        typer.echo("error: there is no tests/models.py here. Run this from the root of a clone.", err=True)
        raise typer.Exit(2)
    sys.path.insert(0, "")  # for the models of the tests
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    card = "dry run on a CPU" if dry_run else torch.cuda.get_device_name()
    about = facts(card, commit) | ({"figures": "mean nothing", "calls": "tiny sizes"} if dry_run else {})
    page = Page(out / card.lower().replace(" ", "-"), card, about)
    measure(page, "cpu" if dry_run else "cuda", minutes)
    typer.echo(f"{page.path}.md, {page.path}.json{picture(page)}")
    if any(section.failed for section in page.sections):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
