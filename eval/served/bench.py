"""The same requests to a dense and to a pruned server: times, requests per second, and use of the KV cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from vlm_prune.eval.served.server import Server
from vlm_prune.eval.served.traffic import Took, poisson, send

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """The requests to send.

    Attributes:
        rates: requests per second, on average, each in a separate measurement.
        requests: in each measurement.
        new_tokens: in each answer.
        seed: for images and arrival times.
    """

    rates: tuple[float, ...] = (0.5, 1.0)
    requests: int = 32
    new_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1 or self.new_tokens < 2:
            raise ValueError(
                "choose at least one request, and two new tokens, so that the time between them can be measured"
            )
        if any(rate <= 0 for rate in self.rates):
            raise ValueError(f"--rate {min(self.rates)}: choose a number of requests per second above 0")


@dataclass(frozen=True)
class Point:
    """One measurement of one server. ``rate`` is ``None`` for saturation: all requests are sent at once.

    Times are percentiles in seconds.
    """

    rate: float | None
    per_second: float
    to_first: dict[int, float]
    per_token: dict[int, float]
    cached: int


@dataclass
class Side:
    """All measurements of one server."""

    plan: dict[str, Any] | None
    prompt: int = 0
    cache_room: int = 0
    image_bytes: int = 0
    points: list[Point] = field(default_factory=list)

    @property
    def images_per_gib(self) -> float:
        """How many prompts with an image fit into a GiB of KV cache."""
        return 2**30 / self.image_bytes


def kv_bytes(config: Any, dtype_bytes: int) -> int:
    """Bytes of a token in the KV cache, over all layers of a decoder with full attention."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * dtype_bytes)


class CacheWatch:
    """The peak use of the KV cache within its block, polled a few times a second."""

    def __init__(self, server: Server):
        self.server, self.most, self.over = server, 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.over.wait(0.2):
            try:
                self.most = max(self.most, self.server.metrics()["vllm:kv_cache_usage_perc"])
            except OSError:
                return

    def __enter__(self) -> CacheWatch:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


def point(rate: float | None, took: Sequence[Took], cached: int) -> Point:
    """The figures of a measurement."""
    span = max(one.end for one in took) - min(one.due for one in took)

    def spread(of: Callable[[Took], float]) -> dict[int, float]:
        values = np.percentile([of(one) for one in took], PERCENTILES)
        return dict(zip(PERCENTILES, map(float, values), strict=True))

    return Point(
        rate, len(took) / span, spread(lambda one: one.to_first), spread(lambda one: one.per_token), cached
    )


def measure(server: Server, load: Load, token_bytes: int, say: Callable[[str], None]) -> Side:
    """All measurements of a running server, after a warm-up."""
    side = Side(server.plan, cache_room=server.cache_tokens())
    warm = send(server.url, [0.0] * 2, load.new_tokens, seed=load.seed + 1)
    side.prompt = warm[0].prompt
    side.image_bytes = (side.prompt + load.new_tokens) * token_bytes
    for number, rate in enumerate([*load.rates, None]):
        seed = load.seed + 2 + number  # images that are in no cache, the same for both servers
        dues = [0.0] * load.requests if rate is None else poisson(load.requests, rate, seed)
        with CacheWatch(server) as watch:
            took = send(server.url, dues, load.new_tokens, seed)
        side.points.append(point(rate, took, round(watch.most * side.cache_room)))
        say(
            f"  {'saturation' if rate is None else f'{rate:g} requests/s'}: {side.points[-1].per_second:.2f} requests/s"
        )
    return side


def compare(
    model: str | Path,
    plan: dict[str, Any],
    load: Load,
    folder: Path,
    options: Sequence[str],
    dtype_bytes: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a dense server, then a pruned one; returns the content of ``bench.json``."""
    token_bytes = kv_bytes(AutoConfig.from_pretrained(model), dtype_bytes)
    sides = {}
    for name, asked in (("dense", None), ("pruned", plan)):
        say(f"{name}: starting")
        with Server(model, asked, folder / f"{name}.log", options) as server:
            sides[name] = measure(server, load, token_bytes, say)
    dense, pruned = sides["dense"], sides["pruned"]
    if pruned.prompt >= dense.prompt:
        raise OSError(
            f"prompts have {pruned.prompt} tokens on the server that should prune, {dense.prompt} on the dense one: "
            "vLLM did not find the plug-in, or the budget keeps all tokens. Install this package with pip in vLLM's "
            "environment."
        )
    return {
        "model": str(model),
        "load": asdict(load),
        "options": list(options),
        "bytes_per_token": token_bytes,
        **{name: {**asdict(side), "images_per_gib": side.images_per_gib} for name, side in sides.items()},
        "times_the_requests": pruned.points[-1].per_second / dense.points[-1].per_second,
        "times_the_images": pruned.images_per_gib / dense.images_per_gib,
    }
