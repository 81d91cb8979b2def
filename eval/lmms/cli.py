"""Command ``lmms-tasks``: where lmms-eval finds the POPE and CHAIR tasks of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.cli import plain_errors
from vlm_prune.eval.lmms import TASKS

app = typer.Typer(add_completion=False)


@app.command("lmms-tasks")
def lmms_tasks(
    pope: Annotated[
        list[str] | None,
        typer.Option(help="POPE question file, saved data set folder or hub name; may be repeated."),
    ] = None,
    chair: Annotated[
        str | None,
        typer.Option(help="COCO instances_*.json, lines with image and objects, saved folder or hub name."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images that the files name.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="COCO captions_*.json: their objects count as present.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Table of objects and their words; default COCO's.")
    ] = None,
    post_prompt: Annotated[
        str | None, typer.Option(help="After each POPE question; default LLaVA's, '' for none.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For captions, instead of the usual one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write tasks on your data into.")] = None,
) -> None:
    """Print the folder of the lmms-eval tasks vlm_prune_pope and vlm_prune_chair, for --include_path.

    Without options: the tasks on the hub's data. With --pope or --chair: the same on your own, written to --out.
    """
    if not pope and chair is None:
        typer.echo(TASKS)
        return
    with plain_errors():
        if out is None:
            raise ValueError("--out is needed: the folder to write the tasks on your data into.")
        from vlm_prune.eval.lmms.local_tasks import write_tasks

        names = write_tasks(
            out,
            pope or (),
            chair,
            images=images,
            captions=captions,
            vocabulary=vocabulary,
            post_prompt=post_prompt,
            prompt=prompt,
        )
        typer.echo(f"tasks: {', '.join(names)}", err=True)
        typer.echo(out.resolve())
