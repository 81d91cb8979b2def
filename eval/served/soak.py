"""A pruned server under good and bad requests for a given time, with its engine killed now and then.

Every answer is compared with that of the pruned Hugging Face model, every refusal with the expected message. A killed
engine stops its server, as vLLM intends; a supervisor here restarts it, as one in production does. Only requests that
are under way then may fail. Memory is that of all processes of the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil
import torch
from PIL import Image

from vlm_prune import pruned
from vlm_prune.eval import load_model
from vlm_prune.eval.models import model_path
from vlm_prune.eval.scenes import make_scene
from vlm_prune.eval.served.server import Server
from vlm_prune.eval.served.traffic import chat, encoded

MODEL = "tiny-llava"
PLAN: dict[str, Any] = {"policy": "flowcut", "tokens": 64, "ceiling": {"ratio": 0.5}}
BUDGETS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"tokens": 1},
    {"tokens": 30},
    {"tokens": 128},
    {"ratio": 0.25},
)
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8")
NEW_TOKENS = 16
GROWTH = 0.1
"""Growth of memory that is allowed from the second quarter of a server's life to the last, as a share."""


@dataclass(frozen=True)
class Case:
    """A request and the expected answer.

    Attributes:
        kind: the kind of request.
        body: its JSON.
        status: of the answer.
        words: the whole answer for status 200, otherwise a part of the error message.
        prompt: tokens of the prompt.
    """

    kind: str
    body: dict[str, Any]
    status: int
    words: str
    prompt: int | None = None


@dataclass
class Report:
    """The result of a soak.

    Attributes:
        counts: requests of each kind.
        wrong: descriptions of what went wrong.
        restarts: times that the engine was killed and the server restarted.
        lost: requests that were under way then.
        memory: MiB every few seconds, a list for each life of the server.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    restarts: int = 0
    lost: int = 0
    memory: list[list[float]] = field(default_factory=list)

    def growth(self) -> list[float]:
        """The share by which memory grew in each life of the server that was long enough to measure it."""
        found = []
        for life in self.memory:
            quarter = len(life) // 4
            if quarter >= 5:
                found.append(median(life[-quarter:]) / median(life[quarter : 2 * quarter]) - 1)
        return found

    def as_json(self) -> dict[str, Any]:
        """For ``soak.json``."""
        growth = self.growth()
        grown = [f"memory grew by {share:.1%}" for share in growth if share > GROWTH]
        return {
            "requests": sum(self.counts.values()),
            "counts": dict(sorted(self.counts.items())),
            "wrong": self.wrong + grown,
            "restarts": self.restarts,
            "lost_to_restarts": self.lost,
            "memory_growth": growth,
            "memory_mib": self.memory,
        }


@torch.no_grad()
def good_cases(scenes: int) -> list[Case]:
    """Requests with one image, two or none, with the answers of the pruned Hugging Face model."""
    model, processor = load_model(MODEL)
    cases = []
    for number in range(scenes):
        images = [make_scene((number, part)).image for part in range(number % 2 + 1)]
        for budget in BUDGETS:
            given = budget or {"tokens": PLAN["tokens"]}
            asked: dict[str, Any] = {} if budget is None else {"vlm_prune": budget}
            asked["add_special_tokens"] = True  # the test model's template writes no <s>
            body = chat([encoded(image) for image in images], max_tokens=NEW_TOKENS, **asked)
            with pruned(model, PLAN["policy"], **given):
                words, prompt = _answer(model, processor, body, images)
            cases.append(Case("good", body, 200, words, prompt))
    body = chat([], "Is there a star in the image?", max_tokens=NEW_TOKENS, add_special_tokens=True)
    cases.append(Case("text alone", body, 200, *_answer(model, processor, body, [])))
    return cases


def _answer(model: Any, processor: Any, body: dict[str, Any], images: list[Any]) -> tuple[str, int]:
    parts = body["messages"][0]["content"]
    content = [part if part["type"] == "text" else {"type": "image"} for part in parts]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    rows = model.pruning.receipt.decoder_tokens[0] if images else prompt
    return processor.decode(output[0, prompt:], skip_special_tokens=True).strip(), rows


def bad_cases() -> list[Case]:
    """Requests that have to be refused, and one with an image that is merely large."""
    scene = encoded(make_scene((0, 0)).image)
    bomb = encoded(Image.new("1", (16000, 16000)))
    url = "data:image/png;base64,"
    budgets: list[tuple[Any, str]] = [
        ({"tokens": 0}, "Choose 1 to 256"),
        ({"tokens": 5000}, "Choose 1 to 256"),
        ({"ratio": 0.9}, "at most"),
        ({"ratio": -1}, "a share above 0"),
        ({"policy": "random"}, "belong to the engine"),
        ("many", "sets its own budget"),
        ([], "sets its own budget"),
    ]
    short: dict[str, Any] = {"max_tokens": NEW_TOKENS}
    cases = [
        Case("wrong budget", chat([scene], vlm_prune=budget, **short), 400, words)
        for budget, words in budgets
    ]
    truncated = encoded(make_scene((0, 1)).image)[:400]
    return [
        *cases,
        Case("malformed image", chat([url + "bm90IGFuIGltYWdl"], **short), 400, ""),
        Case("malformed image", chat([truncated], **short), 400, ""),
        # vLLM reports Pillow's refusal as an internal error, 500, and keeps running
        Case("oversize image", chat([bomb], **short), 500, ""),
        Case("too many images", chat([scene] * 20, vlm_prune={"tokens": 128}, **short), 400, ""),
    ]


class Soak:
    """The clients of one server, its supervisor, and a watch on its memory.

    Args:
        seconds: how long to run.
        kill_every: seconds between kills of the engine; 0 for none.
        clients: number of clients that send at the same time.
        folder: for logs and the report.
        seed: for the choice of requests.
        say: called with progress messages.
    """

    def __init__(
        self,
        seconds: float,
        kill_every: float,
        clients: int,
        folder: Path,
        seed: int,
        say: Callable[[str], None],
    ):
        self.seconds, self.kill_every, self.clients, self.folder, self.say = (
            seconds,
            kill_every,
            clients,
            folder,
            say,
        )
        self.draw, self.report = random.Random(seed), Report()
        self.server = Server(model_path(MODEL), PLAN, folder / "server.log", OPTIONS)
        self.life, self.up = 0, asyncio.Event()
        self.end = 0.0

    def run(self) -> dict[str, Any]:
        """Soak, and write ``soak.json``."""
        self.say("computing expected answers with the Hugging Face model")
        self.good, self.bad = good_cases(6), bad_cases()
        self.say("starting the server")
        try:
            with self.server:
                asyncio.run(self._soak())
        finally:
            found = self.report.as_json()
            (self.folder / "soak.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        return found

    async def _soak(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.up.set()
        self.report.memory.append([])
        others = [asyncio.create_task(task) for task in (self._weigh(), self._kill())]
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
                await asyncio.gather(*(self._client(session) for _ in range(self.clients)))
        finally:
            for task in others:
                task.cancel()
        if not self.server.well():
            self.report.wrong.append("the server was not healthy at the end")

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while time.monotonic() < self.end:
            await self.up.wait()
            case, life = self.draw.choice(self.bad if self.draw.random() < 0.3 else self.good), self.life
            cut = case.status == 200 and self.draw.random() < 0.25
            kind = "cut off" if cut else case.kind
            self.report.counts[kind] += 1
            try:
                trouble = await (self._cut_off(session, case) if cut else self._ask(session, case))
            except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                trouble = f"{type(error).__name__}: {error}"
            if trouble and (life != self.life or not self.up.is_set()):
                self.report.lost += 1
            elif trouble:
                # clients notice a dead engine before the supervisor does
                await asyncio.sleep(3)
                if life == self.life and self.up.is_set():
                    self.report.wrong.append(f"{kind}: {trouble}")
                else:
                    self.report.lost += 1

    async def _ask(self, session: aiohttp.ClientSession, case: Case) -> str:
        """What is wrong with the answer, or an empty string."""
        async with session.post(f"{self.server.url}/v1/chat/completions", json=case.body) as answer:
            text = await answer.text()
            if answer.status != case.status:
                return f"status {answer.status}, not {case.status}: {text[:300]}"
            if case.status != 200:
                sentence = json.loads(text)["error"]["message"]
                return "" if case.words in sentence else f"refused with {sentence!r}, without {case.words!r}"
            found = json.loads(text)
            said = found["choices"][0]["message"]["content"].strip()
            prompt = found["usage"]["prompt_tokens"]
            right = (said, prompt) == (case.words, case.prompt)
            return "" if right else f"{said!r} for a prompt of {prompt}, not {case.words!r} for {case.prompt}"

    async def _cut_off(self, session: aiohttp.ClientSession, case: Case) -> str:
        """Open a stream, read a little of it, and close the connection."""
        body = {**case.body, "stream": True, "max_tokens": 200, "ignore_eos": True}
        async with session.post(f"{self.server.url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                return f"status {answer.status}: {(await answer.text())[:300]}"
            await answer.content.readline()
        return ""

    async def _weigh(self) -> None:
        while True:
            await asyncio.sleep(2)
            if self.up.is_set() and self.server.process is not None:
                try:
                    whole = psutil.Process(self.server.process.pid)
                    family = [whole, *whole.children(recursive=True)]
                    self.report.memory[-1].append(sum(one.memory_info().rss for one in family) / 2**20)
                except psutil.NoSuchProcess:
                    continue

    async def _kill(self) -> None:
        """Kill the engine now and then; restart the server whenever it has stopped."""
        due = time.monotonic() + (self.kill_every or float("inf"))
        while True:
            await asyncio.sleep(0.5)
            process = self.server.process
            if process is not None and process.poll() is not None:
                self.report.wrong.append(f"the server stopped by itself, with exit code {process.returncode}")
                await self._restart()
            elif process is not None and time.monotonic() > due and time.monotonic() < self.end - 30:
                due = time.monotonic() + self.kill_every
                self.up.clear()
                for one in psutil.Process(process.pid).children():
                    if "EngineCore" in one.name() or "EngineCore" in " ".join(one.cmdline()):
                        one.kill()
                try:
                    await asyncio.to_thread(process.wait, 60)
                except Exception:
                    self.report.wrong.append("the server did not stop after its engine was killed")
                self.report.restarts += 1
                await self._restart()
                due = time.monotonic() + self.kill_every

    async def _restart(self) -> None:
        self.up.clear()
        await asyncio.to_thread(self.server.stop)
        await asyncio.to_thread(self.server.start)
        self.life += 1
        self.report.memory.append([])
        self.up.set()
