"""``vlm-prune bench``."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console

from vlm_prune import __version__
from vlm_prune.cli import plain_errors
from vlm_prune.eval.bench.bounds import Bound, bounds, gpu_bounds, host_bounds, import_time
from vlm_prune.eval.bench.calls import EVERYDAY, Call, calls
from vlm_prune.eval.bench.presets import PRESETS, TEXT_TOKENS
from vlm_prune.eval.bench.report import bounds_table, calls_table, plot, regressions, table
from vlm_prune.eval.bench.speed import ANSWER, Row, speed
from vlm_prune.eval.bench.subject import Subject
from vlm_prune.eval.records import read_json
from vlm_prune.registry import did_you_mean, make_policies

app = typer.Typer()


@app.command()
def bench(
    preset: Annotated[str, typer.Option(help=f"Layer shapes: {', '.join(PRESETS)}.")] = "llava-1.5-7b",
    policy: Annotated[
        list[str] | None, typer.Option(help="Policies; uniform and flowcut by default, more with --calls.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Visual tokens kept per tile.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Decoder layers to build, instead of the preset's.")
    ] = None,
    tower: Annotated[
        int | None, typer.Option(help="Vision layers to build, instead of the preset's.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Prompts in a batch; several as 1,16,128.")] = "1",
    answer: Annotated[int, typer.Option(help="New tokens of an end-to-end run.")] = ANSWER,
    attn: Annotated[
        str | None, typer.Option(help="Attention implementation: eager, sdpa, flash_attention_2.")
    ] = None,
    whole: Annotated[
        bool | None,
        typer.Option(
            "--calls/--parts", help="Whole calls alone, or their parts too; --calls with the preset host."
        ),
    ] = None,
    capture: Annotated[
        bool, typer.Option("--capture", help="Capture the calls, those of the stock model too; with --calls.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
    require: Annotated[
        bool, typer.Option("--require", help="Measure the bounds; exit 1 if one is missed.")
    ] = False,
    check: Annotated[
        Path | None, typer.Option(help="An earlier bench.json; exit 1 if a ratio got worse.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl, bench.json and bench.svg.")] = Path(
        "runs/bench"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print bench.json instead of tables.")] = False,
) -> None:
    """Measure speed, memory and operations of pruning, against no pruning and against an oracle."""
    console = Console(stderr=as_json)
    console.width = max(console.width, 132)  # a table that wraps cannot be read
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r}. {did_you_mean(preset, PRESETS)}", param_hint="--preset")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r}: choose float32, bfloat16 or float16", param_hint="--dtype")
    counted = {
        "--rounds": rounds,
        "--layers": layers,
        "--tower": tower,
        "--threads": threads,
        "--answer": answer,
    }
    for name, number in counted.items():
        if number is not None and number < 1:
            raise typer.BadParameter(f"{number}: 1 or more is needed", param_hint=name)
    _check_device(device)
    batches = _batches(batch)
    only_calls = preset == "host" if whole is None else whole
    on_gpu = torch.device(device).type == "cuda"
    if require and only_calls and preset != "host" and not on_gpu:
        raise typer.BadParameter(
            "the bounds of a CPU are on the parts: leave out --calls", param_hint="--require"
        )
    if capture and not only_calls:
        raise typer.BadParameter("whole calls are captured: add --calls", param_hint="--capture")
    if capture and (require or not on_gpu):
        why = (
            "there are no bounds on captured calls: leave out --require"
            if on_gpu
            else "this needs --device cuda"
        )
        raise typer.BadParameter(why, param_hint="--capture")
    asked = policy or (EVERYDAY if only_calls else ["uniform", "flowcut"])
    with plain_errors():
        for name in asked:
            make_policies(name, {})
        before = None if check is None else read_json(check)
    if threads is not None:
        torch.set_num_threads(threads)
    with plain_errors():  # an attention implementation that is not known or not installed
        subject = Subject.of(preset, layers, getattr(torch, dtype), device, tower, attn)
    shapes = subject.preset
    count = torch.get_num_threads()
    cores = f"{count} thread" if count == 1 else f"{count} threads"
    title = (
        f"{preset}: {shapes.model}, {subject.layers} of {shapes.depth} decoder layers and "
        f"{tower or shapes.tower_layers} vision layers, random weights, {dtype} on {device}, {cores}; "
        f"{subject.visual} visual and {TEXT_TOKENS} text tokens"
    )
    console.print(title)
    budgets = tokens or [shapes.tokens]

    def measured() -> Iterator[Row | Call]:
        for prompts in batches:
            some = subject.batched(prompts)
            if not only_calls:
                yield from speed(some, asked, budgets, rounds, device, answer)
                continue
            for kept in budgets:
                yield from calls(some, asked, kept, rounds, device, capture)

    found: list[Row | Call] = []
    with plain_errors():  # such as a budget that the model cannot have
        for row in measured():
            _keep(row, out, first=not found)
            found.append(row)
    rows = [row for row in found if isinstance(row, Row)]
    whole_calls = [row.call if isinstance(row, Row) else row for row in found]
    held: list[Bound] = []
    if require:
        if on_gpu:
            held = [*gpu_bounds(rows, whole_calls), import_time()]
        else:
            held = list(host_bounds(whole_calls) if preset == "host" else bounds(subject, rows, rounds))
    result = {
        "title": title,
        "versions": {
            "vlm_prune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
        },
        "rows": [row.json() for row in found],
        "bounds": [{**vars(bound), "kept": bound.kept} for bound in held],
    }
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if rows:
        plot(rows, title.split(";")[0], out / "bench.svg")
    if as_json:
        typer.echo(json.dumps(result))
    else:
        if rows:
            console.print(table(rows))
            console.print("in brackets: share of the dense model's")
        console.print(calls_table(whole_calls))
        if held:
            console.print(bounds_table(held))
        console.print(
            f"{out / 'rows.jsonl'}, {out / 'bench.json'}" + (f", {out / 'bench.svg'}" if rows else "")
        )
    problems = [f"missed: {b.name} {b.value:.3f}, limit {b.limit}" for b in held if not b.kept]
    if before is not None:
        problems += regressions(rows, before)
    for problem in problems:
        console.print(f"[red]{problem}")
    if problems:
        raise typer.Exit(1)


def _keep(row: Row | Call, out: Path, first: bool) -> None:
    """Write a row as soon as it is measured, so that a run that is ended early leaves its rows."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "rows.jsonl").open("w" if first else "a", encoding="utf-8") as lines:
        lines.write(json.dumps(row.json()) + "\n")


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(
            f"{text!r}: whole numbers from 1 on, separated by commas, such as 1,16,128", param_hint="--batch"
        )
    return [int(part) for part in parts]


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # no driver, no such number, no such kind, a build without it
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        allowed = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        why = str(error).splitlines()[0].split(". ")[0]
        raise typer.BadParameter(
            f"{name!r} cannot be used on this machine ({why}). Available: {allowed}", param_hint="--device"
        ) from error
