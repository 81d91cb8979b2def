"""Commands ``report``, ``compare`` and ``inspect``: pages to look at, of a run or of one image of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from vlm_prune.cli import plain_errors

app = typer.Typer()


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, see docs/runs.md.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the folder.")] = None,
    samples: Annotated[int, typer.Option(help="Samples of each task to browse, spread evenly.")] = 40,
    export: Annotated[
        Path | None,
        typer.Option(help="Also write every chart (PDF, SVG, CSV) and table (CSV, LaTeX, PDF, SVG) here."),
    ] = None,
) -> None:
    """Write the report of a finished or interrupted run: one HTML file that needs no network."""
    with plain_errors():
        from vlm_prune.eval.report import export_report, write_report
        from vlm_prune.eval.runs.folder import RunFolder

        path = write_report(RunFolder(folder), out, samples)
        files = export_report(RunFolder(folder), export) if export is not None else []
    typer.echo(f"wrote {path}")
    if export is not None:
        typer.echo(f"wrote {len(files)} files in {export}")


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="A run folder, see docs/runs.md.")],
    first: Annotated[str, typer.Argument(help="A policy, as the run calls it.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    model: Annotated[str | None, typer.Option(help="On this model only.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: compare.FIRST.SECOND.html in the folder.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Pictures of so many samples of each task and budget.")] = 12,
) -> None:
    """Say where two policies of a run differ: verdicts with p-values, and the samples, with pictures, as a page."""
    with plain_errors():
        if samples < 0:
            raise ValueError(f"--samples {samples}: choose 0 or more")
        from vlm_prune.eval.report.comparison import compare as meet
        from vlm_prune.eval.report.comparison import sentence, write_comparison
        from vlm_prune.eval.report.exhibits import slug
        from vlm_prune.eval.runs.folder import RunFolder

        run = RunFolder(folder)
        meetings = meet(run, first, second, model)
        for meeting in meetings:
            for pair in meeting.pairs:
                typer.echo(f"{meeting.model}, {meeting.task}: {sentence(meeting, pair)}")
        name = f"compare.{slug(first)}.{slug(second)}.html"
        path = write_comparison(run, meetings, out or folder / name, samples)
    typer.echo(f"wrote {path}")


@app.command()
def inspect(
    image: Annotated[Path, typer.Option(help="The image to look at.")],
    prompt: Annotated[
        str, typer.Option(help="What to ask about it.")
    ] = "Please describe this image in detail.",
    policy: Annotated[str, typer.Option(help="A policy, or several joined by +.")] = "flowcut",
    model: Annotated[str, typer.Option(help="A shipped test model, a folder or a hub name.")] = "tiny-llava",
    tokens: Annotated[int | None, typer.Option(help="Visual tokens to keep per image or tile.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of visual tokens to keep, instead.")] = None,
    per: Annotated[str | None, typer.Option(help="What the budget is for: tile, or image.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the policy, as name=value; may be repeated.")
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="An .html or .png file; may be repeated. Default: IMAGE.POLICY.html"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 64,
) -> None:
    """Show layer by layer which patches of an image survive a policy, with the answer before and after."""
    with plain_errors():
        paths = out or [Path(f"{image.stem}.{policy}.html")]
        if bad := [path for path in paths if path.suffix not in (".html", ".png")]:
            raise ValueError(f"--out {bad[0]}: choose a name that ends in .html or .png")
        settings = settings_of(setting or [])

        from transformers.utils import logging

        from vlm_prune.eval.checkpoints import open_model
        from vlm_prune.eval.images import load_image
        from vlm_prune.eval.report.drawing import write_picture
        from vlm_prune.eval.report.inspection import inspect as look
        from vlm_prune.eval.report.inspection import own_settings, write_page
        from vlm_prune.registry import make_policies

        logging.disable_progress_bar()
        picture = load_image(image)
        settings = settings or own_settings(policy, model)
        make_policies(policy, settings)  # a wrong name or setting must not wait for the weights
        budget = {"tokens": tokens, "ratio": ratio, "per": per}
        options = settings | {name: value for name, value in budget.items() if value is not None}
        opened, processor = open_model(model, "auto")
        found = look(
            opened, processor, picture, prompt, policy, options, name=model, max_new_tokens=max_new_tokens
        )
        typer.echo(f"unpruned: {found.before}\n{policy}: {found.after}")
        for remark in found.remarks:
            typer.echo(remark)
        typer.echo(str(found.receipt))
        for path in paths:
            typer.echo(f"wrote {(write_picture if path.suffix == '.png' else write_page)(found, path)}")


def settings_of(given: list[str]) -> dict[str, Any]:
    """``name=value`` pairs, values read as YAML; ``flowcut.compat=official`` names the policy of a composition."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {text!r}: write name=value, such as compat=official")
        *owner, field = name.split(".", 1)
        place = found.setdefault(owner[0], {}) if owner else found
        place[field] = yaml.safe_load(value)
    return found
