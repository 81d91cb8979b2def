"""Commands ``bench-serving`` and ``soak-serving``."""

from __future__ import annotations

import json
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.cli import plain_errors

app = typer.Typer()


def check_vllm() -> None:
    """Raise if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ImportError('vLLM is not installed: pip install "vlm-prune[vllm]", see docs/serving.md')


@app.command("bench-serving")
def bench_serving(
    model: Annotated[
        str | None, typer.Option(help="Folder or name of a checkpoint; default tiny-llava.")
    ] = None,
    wide: Annotated[
        int | None, typer.Option(help="Instead a LLaVA with random weights and a decoder of this width.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Of the encode stage.")] = "flowcut",
    tokens: Annotated[int | None, typer.Option(help="Per tile; default 64, unless --ratio is given.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Or the share to keep.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests per second; may be repeated. Default: 0.5 and 1.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Of each measurement.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 16,
    seed: Annotated[int, typer.Option(help="For images and arrival times.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    server: Annotated[str, typer.Option(help="Further options for both servers, in one string.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.png and logs.")] = Path(
        "runs/bench-serving"
    ),
) -> None:
    """Measure a vLLM server, dense against pruned, over HTTP: at fixed arrival rates and at saturation."""
    with plain_errors():
        check_vllm()
        import torch

        from vlm_prune.eval.models import model_path
        from vlm_prune.eval.served.bench import Load, compare
        from vlm_prune.eval.served.chart import draw
        from vlm_prune.eval.served.wide import wide_model

        if model is not None and wide is not None:
            raise ValueError("give --model or --wide")
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
        load = Load(tuple(rate or (0.5, 1.0)), requests, new_tokens, seed)
        plan: dict[str, Any] = {"policy": policy}
        plan |= {"ratio": ratio} if ratio is not None else {"tokens": 64 if tokens is None else tokens}
        if ratio is not None and tokens is not None:
            plan["tokens"] = tokens
        out.mkdir(parents=True, exist_ok=True)
        options = ["--dtype", dtype, *shlex.split(server)]
        served: str | Path = model if model is not None else model_path("tiny-llava")
        if wide is not None:
            shutil.rmtree(out / "wide", ignore_errors=True)
            served = wide_model(out / "wide", wide)
            options += ["--load-format", "dummy"]
        if model is None:
            options += ["--max-model-len", "1024"]
        found = compare(served, plan, load, out, options, kind.itemsize, typer.echo)
        (out / "bench.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        draw(found, out / "bench.png")
    dense, pruned = found["dense"], found["pruned"]
    typer.echo(f"prompt: {dense['prompt']} tokens dense, {pruned['prompt']} pruned")
    typer.echo(
        f"at saturation: {dense['points'][-1]['per_second']:.2f} requests/s dense, "
        f"{pruned['points'][-1]['per_second']:.2f} pruned, {found['times_the_requests']:.2f} times as many"
    )
    typer.echo(
        f"images per GiB of KV cache: {dense['images_per_gib']:.0f} dense, {pruned['images_per_gib']:.0f} pruned, "
        f"{found['times_the_images']:.2f} times as many"
    )
    typer.echo(f"wrote {out}/bench.json and bench.png")


@app.command("soak-serving")
def soak_serving(
    minutes: Annotated[float, typer.Option(help="How long.")] = 10,
    kill_every: Annotated[float, typer.Option(help="Minutes between kills of the engine; 0: never.")] = 4,
    clients: Annotated[int, typer.Option(help="That send at once.")] = 4,
    seed: Annotated[int, typer.Option(help="For the choice of requests.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for soak.json and the server's log.")] = Path(
        "runs/soak-serving"
    ),
) -> None:
    """Test a pruned vLLM server for a long time: good and bad requests, aborted streams, a killed engine.

    Exits with 1 if an answer was wrong, the server died by itself, or its memory grew.
    """
    with plain_errors():
        check_vllm()
        from vlm_prune.eval.served.soak import Soak

        if minutes <= 0 or kill_every < 0 or clients < 1:
            raise ValueError("choose minutes above 0, --kill-every 0 or more, and one client or more")
        out.mkdir(parents=True, exist_ok=True)
        found = Soak(60 * minutes, 60 * kill_every, clients, out, seed, typer.echo).run()
    for kind, count in found["counts"].items():
        typer.echo(f"{count:7} {kind}")
    typer.echo(
        f"{found['restarts']} restarts, {found['lost_to_restarts']} requests lost to them; memory grew by "
        + (
            ", ".join(f"{share:.1%}" for share in found["memory_growth"])
            or "an unknown amount: the soak was too short to measure it"
        )
    )
    for line in found["wrong"][:20]:
        typer.echo(f"wrong: {line}")
    if found["wrong"]:
        raise typer.Exit(1)
    typer.echo("nothing wrong")
