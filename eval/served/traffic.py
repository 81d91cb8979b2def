"""Requests to a server at given times, over HTTP, with their latencies."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import aiohttp
from PIL import Image

from vlm_prune.eval.scenes import make_scene

DESCRIBE = "Please describe this image in detail."


@dataclass(frozen=True)
class Took:
    """One answered request, in seconds since the first was due.

    Attributes:
        due: when it was due to be sent.
        first: when its first token arrived.
        end: when its last token arrived.
        prompt: tokens of the prompt.
        tokens: of the answer.
    """

    due: float
    first: float
    end: float
    prompt: int
    tokens: int

    @property
    def to_first(self) -> float:
        """Seconds from when it was due to its first token."""
        return self.first - self.due

    @property
    def per_token(self) -> float:
        """Seconds for each further token."""
        return (self.end - self.first) / max(self.tokens - 1, 1)


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Times at which ``count`` requests arrive, ``rate`` per second on average, the first at 0."""
    draw = random.Random(f"arrivals {seed}")
    return [0.0, *accumulate(draw.expovariate(rate) for _ in range(count - 1))][:count]


def encoded(image: Image.Image) -> str:
    """An image as a data URL."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@cache
def scene_url(seed: int, number: int) -> str:
    """A different scene for each request."""
    return encoded(make_scene((seed, number)).image)


def chat(urls: Sequence[str], question: str = DESCRIBE, **more: Any) -> dict[str, Any]:
    """The body of a request."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question})
    return {"model": "served", "messages": [{"role": "user", "content": content}], "temperature": 0, **more}


async def _one(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], due: float, start: float
) -> Took:
    first = end = 0.0
    usage: dict[str, int] = {}
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise OSError(f"status {answer.status}: {(await answer.text())[:500]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if event["choices"] and event["choices"][0]["delta"].get("content") is not None:
                end = time.perf_counter() - start
                first = first or end
    return Took(due, first, end, usage["prompt_tokens"], usage["completion_tokens"])


async def _all(url: str, bodies: list[dict[str, Any]], dues: list[float]) -> list[Took]:
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start = time.perf_counter()

        async def wait_and_send(body: dict[str, Any], due: float) -> Took:
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
            return await _one(session, url, body, due, start)

        return await asyncio.gather(*map(wait_and_send, bodies, dues))


def send(url: str, dues: list[float], new_tokens: int, seed: int) -> list[Took]:
    """Send requests with an image each when they are due, and wait for ``new_tokens`` of each.

    Raises:
        OSError: the server refuses a request.
    """
    more: dict[str, Any] = {"max_tokens": new_tokens, "ignore_eos": True, "stream": True}
    more["stream_options"] = {"include_usage": True}
    bodies = [chat([scene_url(seed, number)], **more) for number in range(len(dues))]
    return asyncio.run(_all(url, bodies, dues))
