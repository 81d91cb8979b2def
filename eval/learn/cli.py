"""The commands ``train-exit`` (DyVTE's gates) and ``tune`` (VFlowOpt's settings, or a budget)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.cli import plain_errors
from vlm_prune.errors import PolicyError

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
    floor: Annotated[
        float | None,
        typer.Option(help="Find the smallest budget that keeps this share of right answers, instead."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="With --floor: a policy to try, several times for several.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="With --floor: of the claim.")] = 0.95,
    metric: Annotated[str, typer.Option(help="With --floor: exact, vqa, relaxed or anls.")] = "exact",
    max_new_tokens: Annotated[int, typer.Option(help="With --floor: the longest answer.")] = 16,
    batch_size: Annotated[int, typer.Option(help="With --floor: prompts answered together.")] = 8,
    target: Annotated[
        float, typer.Option(help="Visual tokens kept, averaged over the decoder's layers.")
    ] = 0.25,
    calls: Annotated[int, typer.Option(help="Settings to try.")] = 300,
    initial: Annotated[int, typer.Option(help="How many of them by lot.")] = 27,
    samples: Annotated[int | None, typer.Option(help="Prompts to compare on: 30; with --floor 400.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search and the choice of prompts.")] = 42,
) -> None:
    """Search VFlowOpt's settings for a model and a budget by Bayesian optimisation; resumes from OUT.study.

    With --floor find the smallest budget of some policies whose loss stays within it, on samples with answers.
    """
    with plain_errors():
        if policy and floor is None:
            raise PolicyError("--policy belongs to --floor: give --floor 0.99, for instance.")
        from vlm_prune.eval.checkpoints import open_model

        from .data import examples as read
        from .data import questions

        loaded, processor = open_model(model, "auto")
        count = samples or (30 if floor is None else 400)
        if floor is None:
            turns = read(data, model, 7 * count, seed)[::7]
        else:
            turns = questions(model, count, seed) if data is None else read(data, model, count, seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        if floor is not None:
            from .floor import Tried, find_budget

            def show(tried: Tried) -> None:
                verdict = "keeps" if tried.passed else "misses"
                typer.echo(
                    f"{tried.policy} ratio={tried.ratio:.3g}: {tried.kept} of {tried.images} images kept, at least "
                    f"{tried.bound:.3f}: {verdict} {floor:g}; score {tried.score:.3f}, compute {tried.compute:.2f}"
                )

            chosen = find_budget(
                loaded,
                processor,
                turns,
                policy or ["flowcut"],
                floor,
                confidence=confidence,
                metric=metric,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                watch=show,
            )
            chosen.save(out)
            typer.echo(f"config in {out}: prune(model, config={str(out)!r})")
            return
        from vlm_prune.eval.learn.tune import tune

        from ..measure import prompt_text

        prompts = [(turn.image, prompt_text(processor, turn.question)) for turn in turns]
        found = tune(
            loaded,
            prompts,
            target,
            processor=processor,
            calls=calls,
            initial=initial,
            samples=count,
            seed=seed,
            study=out.with_suffix(".study"),
            output=out,
        )
        typer.echo(f"similarity {found.similarity:.4f} with {found.settings}")
