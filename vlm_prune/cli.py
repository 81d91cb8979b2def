"""The command ``vlm-prune``. Each command imports what it alone needs."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from . import __version__
from .errors import PruningError

ELSEWHERE = {
    **dict.fromkeys(("pope", "pope-questions", "chair"), "scores_cli"),
    **dict.fromkeys(("train-exit", "tune"), "learn.cli"),
    **dict.fromkeys(("report", "compare", "inspect"), "report_cli"),
    "ask": "ask_cli",
    "bench": "bench.cli",
    **dict.fromkeys(("bench-serving", "soak-serving"), "served.cli"),
    "lmms-tasks": "lmms.cli",
}
"""Commands that live in other modules of ``vlm_prune.eval``."""


class Commands(TyperGroup):
    """The commands below and those of `ELSEWHERE`, which are imported when one of them is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return [*super().list_commands(ctx), *ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by its name; ``None`` if there is none."""
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(f"vlm_prune.eval.{ELSEWHERE[cmd_name]}")
        return typer.main.get_group(module.app).get_command(ctx, cmd_name)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


def show_version(asked: bool) -> None:
    """Print the version and stop, if it was asked for."""
    if asked:
        typer.echo(f"vlm-prune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="A module of your own that registers policies or families; may be repeated."),
    ] = None,
) -> None:
    """Prune the visual tokens of stock Hugging Face vision-language models."""
    sys.path.append("")  # plug-ins may be in the current folder, where `python -m` would look too
    if plugin:
        from .registry import load_plugins

        with plain_errors():
            load_plugins(plugin)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Report user errors as one line on stderr, with exit code 2."""
    try:
        yield
    except (PruningError, ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer scenes: under a minute, more noise.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json and kept.png.")] = Path("runs/demo"),
    model: Annotated[list[str] | None, typer.Option(help="A shipped test model; may be repeated.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="A policy; may be repeated.")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Share of tokens to keep; may be repeated.")
    ] = None,
    scenes: Annotated[int | None, typer.Option(help="Scenes per model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the scenes.")] = None,
) -> None:
    """Prune two trained models at several budgets: POPE, CHAIR, times, KV cache, and a picture of what was kept."""
    with plain_errors():
        from transformers.utils import logging

        from .eval.demo import DemoSettings
        from .eval.demo_report import demo as show

        logging.disable_progress_bar()  # of model loading: we show our own
        asked: dict[str, Any] = {
            "models": tuple(model or ()),
            "policies": tuple(policy or ()),
            "ratios": tuple(ratio or ()),
            "scenes": scenes,
            "seed": seed,
        }
        start = DemoSettings().quick() if quick else DemoSettings()
        show(
            start.replaced(**{name: value for name, value in asked.items() if value not in ((), None)}),
            out,
            console,
        )


class PolicyFacts(NamedTuple):
    """A line of the table of policies."""

    name: str
    stages: str
    default_ratio: str
    summary: str
    paper: str
    file: str


def policy_facts() -> list[PolicyFacts]:
    """All policies of the package, read from their classes and the first lines of their files."""
    from .registry import BUILT_IN, policy_class

    return [_facts(name, policy_class(name)) for name in BUILT_IN]


def policies_table() -> str:
    """The README's table of policies, in Markdown."""
    lines = [
        "| policy | stages | keeps by default | what it does | paper |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for fact in policy_facts():
        paper = re.sub(r"arXiv (\S+)", r"[arXiv \1](https://arxiv.org/abs/\1)", fact.paper)
        # the stages have a column, so they are not repeated here
        summary = re.sub(r" \([a-z, ]+ stage\)", "", fact.summary).replace("``", "`")
        lines.append(
            f"| [`{fact.name}`]({fact.file}) | {fact.stages} | {fact.default_ratio} | {summary} | {paper} |"
        )
    return "\n".join(lines)


def outside_facts() -> tuple[list[PolicyFacts], list[str]]:
    """The same for policies from plug-ins, and a sentence about each that cannot be read."""
    from .registry import BUILT_IN, POLICIES, load_plugins, policy_class

    facts, trouble = [], load_plugins()
    for name in sorted(set(POLICIES) - set(BUILT_IN)):
        try:
            facts.append(_facts(name, policy_class(name)))
        except Exception as error:  # a listing must not fail because of someone else's code
            trouble.append(f"{name}: {type(error).__name__}: {error}")
    return facts, trouble


def _facts(name: str, cls: Any) -> PolicyFacts:
    about = " ".join((sys.modules[cls.__module__].__doc__ or "").split())
    paper = re.search(r"\(([^()]*arXiv \d{4}\.\d{5})\)", about)
    summary = (cls.__doc__ or "").strip().split("\n")[0]
    ratio = f"{100 * cls.default_ratio:.3g} %" if cls.default_ratio < 1 else "all"
    inside = cls.__module__.startswith("vlm_prune.policies.")
    file = f"policies/{cls.__module__.rpartition('.')[2]}.py" if inside else cls.__module__
    source = paper[1] if paper else "baseline" if inside else f"from {cls.__module__}"
    return PolicyFacts(name, ", ".join(cls.stages), ratio, summary, source, file)


@app.command()
def policies(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
) -> None:
    """List the policies: stages, default budget, paper."""
    if markdown:
        typer.echo(policies_table())
        return
    facts = policy_facts()
    outside, trouble = outside_facts()
    table = Table("policy", "stages", "keeps", "paper", box=SIMPLE_HEAD)
    for fact in (*facts, *outside):
        table.add_row(fact.name, fact.stages, fact.default_ratio, fact.paper)
    console.print(table)
    for sentence in trouble:
        console.print(sentence, markup=False)
    console.print('prune(model, "name", tokens=64) or ratio=0.25; without either, the share under "keeps".')


@app.command()
def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's matrix.")] = False,
) -> None:
    """List the model families by config.model_type, and which policies work on them."""
    from . import support
    from .registry import ADAPTERS, BUILT_IN, BUILT_IN_FAMILIES, load_plugins

    if markdown:
        typer.echo(support.markdown())
        return
    table = Table("model_type", "models", "policies that work in part", box=SIMPLE_HEAD)
    for name, family in support.families().items():
        part = [policy for policy in sorted(BUILT_IN) if support.support(policy, name).level == support.PART]
        table.add_row(name, family.title, ", ".join(part))
    trouble = load_plugins()
    for name in sorted(set(ADAPTERS) - set(support.families())):
        table.add_row(name, "see docs/families.md" if name in BUILT_IN_FAMILIES else "from a plug-in", "")
    console.print(table)
    for sentence in trouble:
        console.print(sentence, markup=False)
    console.print("All other policies work. vlm-prune families --markdown prints the matrix and its notes.")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The YAML file; see examples/.")],
    output: Annotated[
        Path | None, typer.Option(help="The run folder, instead of the one in the file.")
    ] = None,
    retime: Annotated[
        bool, typer.Option("--retime", help="Measure the times of finished cells again.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(help="A Markdown page to write the tables into as well.")
    ] = None,
) -> None:
    """Run models x policies x budgets x tasks as a YAML file says; resumes where it stopped.

    Start it with torchrun or accelerate launch to spread it over processes: -m vlm_prune run config.yaml.
    Exits with 1 if a cell failed, with 2 if the file is not valid.
    """
    with plain_errors():
        from transformers.utils import logging

        from .eval.runs.run import execute
        from .eval.runs.table import publish, tasks_of
        from .eval.runs.yaml_file import load_config

        logging.disable_progress_bar()
        asked = load_config(config)
        if output is not None:
            asked = asked.model_copy(update={"output": output})
        try:
            done = execute(asked, console, config.read_text(encoding="utf-8"), retime)
        except KeyboardInterrupt:
            typer.echo(
                "stopped; finished answers are on disk, and the same command resumes from there", err=True
            )
            raise typer.Exit(130) from None
        if page is not None and done.processes.first:
            publish(done.lines(), page, tasks_of(done.finished_rows()))
    if done.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
