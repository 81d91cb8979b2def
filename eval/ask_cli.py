"""The command ``ask``: one question about one image, answered by a pruned model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.cli import plain_errors

app = typer.Typer()


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="A shipped test model, a folder or a hub name.")] = "tiny-llava",
    policy: Annotated[
        str, typer.Option(help="A policy, or several joined by +; none for the stock model.")
    ] = "flowcut",
    tokens: Annotated[int | None, typer.Option(help="Visual tokens to keep per image or tile.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of visual tokens to keep, instead.")] = None,
    per: Annotated[str | None, typer.Option(help="What the budget is for: tile, or image.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the policy, as name=value; may be repeated.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the unpruned model first.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 128,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is a GPU, else cpu.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16. Default: the checkpoint's own, on a CPU bfloat16; "
            "for shipped models float32."
        ),
    ] = None,
) -> None:
    """Ask a pruned model about an image: the answer as it is written, then its tokens, times and memory."""
    with plain_errors():
        from vlm_prune.eval.report_cli import settings_of
        from vlm_prune.registry import make_policies

        settings = settings_of(setting or [])
        if policy != "none":
            make_policies(policy, settings)  # a wrong name or setting must not wait for the weights

        import torch
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from transformers.utils import logging

        from vlm_prune.eval.ask import ask as answer
        from vlm_prune.eval.ask import cost_rows
        from vlm_prune.eval.checkpoints import CHECKPOINTS, open_model
        from vlm_prune.eval.images import load_image
        from vlm_prune.eval.report.inspection import own_settings

        picture = load_image(image)
        if known := CHECKPOINTS.get(model):
            typer.echo(
                f"{model}: {known.parameters:.3g} billion weights; {known.gigabytes():.1f} GB to download the first "
                f"time, and as much memory ({known.gigabytes(4):.1f} GB in float32)",
                err=True,
            )
        else:
            logging.disable_progress_bar()
        opened, processor = open_model(
            model, dtype, device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        budget = {"tokens": tokens, "ratio": ratio, "per": per}
        options = (settings or own_settings(policy, model)) | {
            name: value for name, value in budget.items() if value is not None
        }
        asked: dict[str, tuple[str, dict[str, Any]]] = ({"unpruned": ("none", {})} if compare else {}) | {
            policy: (policy, options)
        }
        if compare:  # what is computed first pays for what all need
            answer(opened, processor, picture, question, "none", max_new_tokens=1)
        answers = {}
        for label, (name, chosen) in asked.items():
            if compare:
                typer.echo(f"{label}: ", nl=False)
            answers[label] = answer(
                opened, processor, picture, question, name, chosen,
                max_new_tokens=max_new_tokens, show=_write,
            )  # fmt: skip
            typer.echo()
        head, *rows = cost_rows(answers)
        table = Table(*head, box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
