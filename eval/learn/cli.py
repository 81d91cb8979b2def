"""The commands ``train-exit`` (DyVTE's gates) and ``tune`` (VFlowOpt's settings)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.cli import plain_errors

app = typer.Typer(add_completion=False, help="Fit a policy's own parameters to a model.")

ModelName = Annotated[str, typer.Option(help="A shipped test model, or a folder or hub name.")]
DataFile = Annotated[
    Path | None, typer.Option(help="jsonl with image, question, answer; shipped models default to scenes.")
]


@app.command("train-exit")
def train_exit_command(
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    model: ModelName = "tiny-llava",
    data: DataFile = None,
    examples: Annotated[int, typer.Option(help="Turns to train on.")] = 2000,
    steps: Annotated[int, typer.Option(help="Updates.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Turns per update.")] = 16,
    layers_per_step: Annotated[int, typer.Option(help="Exit layers tried per update.")] = 4,
    rank: Annotated[int | None, typer.Option(help="Rank of the gates; full by default.")] = None,
    width: Annotated[int, typer.Option(help="Hidden width of the gates.")] = 2048,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 6e-5,
    seed: Annotated[int, typer.Option(help="Of data, gates and drawn layers.")] = 0,
) -> None:
    """Train DyVTE's exit gates for a model, and report how often each layer's label says that it may leave."""
    with plain_errors():
        from vlm_prune.eval.checkpoints import open_model
        from vlm_prune.eval.learn.train_exit import train_exit

        from .data import examples as read
        from .data import training_batches

        loaded, processor = open_model(model, "auto")
        turns = read(data, model, examples, seed)
        gates, log = train_exit(
            loaded,
            training_batches(processor, turns, batch_size, seed),
            steps=steps,
            width=width,
            rank=rank,
            lr=lr,
            layers_per_step=layers_per_step,
            seed=seed,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        gates.save(out, model=model, steps=steps, seed=seed)
        tail = log[-max(1, len(log) // 5) :]
        typer.echo(
            f"{len(log)} updates, mean loss of the last {len(tail)}: {sum(s.loss for s in tail) / len(tail):.3f}"
        )
        typer.echo(f"gates in {out}: prune(model, 'dyvte', gates={str(out)!r})")


@app.command("tune")
def tune_command(
    out: Annotated[Path, typer.Option(help="The JSON config to write; prune(model, config=...) loads it.")],
    model: ModelName = "tiny-llava",
    data: DataFile = None,
    target: Annotated[
        float, typer.Option(help="Visual tokens kept, averaged over the decoder's layers.")
    ] = 0.25,
    calls: Annotated[int, typer.Option(help="Settings to try.")] = 300,
    initial: Annotated[int, typer.Option(help="How many of them by lot.")] = 27,
    samples: Annotated[int, typer.Option(help="Prompts to compare on.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the search and the choice of prompts.")] = 42,
) -> None:
    """Search VFlowOpt's settings for a model and a budget by Bayesian optimisation; resumes from OUT.study."""
    with plain_errors():
        from vlm_prune.eval.checkpoints import open_model
        from vlm_prune.eval.learn.tune import tune

        from ..measure import prompt_text
        from .data import examples as read

        loaded, processor = open_model(model, "auto")
        turns = read(data, model, 7 * samples, seed)[::7]
        prompts = [(turn.image, prompt_text(processor, turn.question)) for turn in turns]
        out.parent.mkdir(parents=True, exist_ok=True)
        found = tune(
            loaded,
            prompts,
            target,
            processor=processor,
            calls=calls,
            initial=initial,
            samples=samples,
            seed=seed,
            study=out.with_suffix(".study"),
            output=out,
        )
        typer.echo(f"similarity {found.similarity:.4f} with {found.settings}")
