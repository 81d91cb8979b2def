"""The commands of examples/serve_vllm.md work as written, and the server answers as the Hugging Face model does."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.engines import Ask, expect, hugging_face, scene

PLAN = {"policy": "flowcut", "tokens": 64}
GUIDE = Path(__file__).parents[2] / "examples" / "serve_vllm.md"
ON_PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def block(name):
    """The code after ``<!-- name -->`` in the guide."""
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[1]


def run(name, **environment):
    """What a Python block of the guide prints."""
    result = subprocess.run(
        [sys.executable, "-c", block(name)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """What the server writes."""
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def server(log):
    """Port of a server that prunes tiny-llava, started as the guide says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **ON_PATH, "PORT": str(port)}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    command = block("server").replace("--port", "--dtype float32 --enforce-eager --max-num-seqs 8 --port")
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", command], stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def post(port, body):
    """The open answer to a chat request."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=120)


def body(*images, question="Please describe this image in detail.", **more):
    content = []
    for image in images:
        data = io.BytesIO()
        image.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question})
    return {
        "model": "tiny-llava",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
        "add_special_tokens": True,  # the template writes no <s>
        **more,
    }


def chat(port, *images, **more):
    with post(port, body(*images, **more)) as answer:
        return json.load(answer)


def said(answer):
    return answer["choices"][0]["message"]["content"].strip()


def text_of(expected):
    return hugging_face("tiny-llava")[1].decode(expected.tokens, skip_special_tokens=True).strip()


def refusal(port, *images, **more):
    """The sentence of a status 400, after which the server has to be well."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        chat(port, *images, **more)
    assert caught.value.code == 400
    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
    return json.loads(caught.value.read())["error"]["message"]


def counters(port):
    """What ``/metrics`` says of pruning, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        text = page.read().decode()
    found = re.findall(r"^vlm_prune_(\w+)_total\{(.*?)\} (\S+)$", text, re.MULTILINE)
    return {(name, *sorted(re.findall(r'"(.*?)"', labels))): float(value) for name, labels, value in found}


PLACES = {"the body": lambda budget: {"vlm_prune": budget}}
PLACES["mm_processor_kwargs"] = lambda budget: {"mm_processor_kwargs": PLACES["the body"](budget)}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("budget", [None, {"tokens": 8}, {"ratio": 0.5}], ids=["engine's", "8", "half"])
def test_chat_answers_as_the_hugging_face_model(server, budget, place):
    asked = Ask((scene(3),), budget=budget)
    expected = expect("tiny-llava", [asked], PLAN)[0]
    answer = chat(server, scene(3), **({} if budget is None else place(budget)))
    assert said(answer) == text_of(expected)
    assert answer["usage"]["prompt_tokens"] == expected.rows


BAD = {
    "more than there are": ({"vlm_prune": {"tokens": 1000}}, "Choose 1 to 256"),
    "more than the ceiling": ({"vlm_prune": {"tokens": 129}}, "keeps 128 of them at most"),
    "more than the ceiling, as a share": ({"vlm_prune": {"ratio": 0.9}}, "keeps 128 of them at most"),
    "no budget": ({"vlm_prune": "all"}, "a request sets its own budget"),
    "a policy": ({"vlm_prune": {"policy": "random"}}, "belong to the engine"),
    "none": ({"vlm_prune": {"tokens": 0}}, "Choose 1 to 256"),
    "two": (
        {"vlm_prune": {"tokens": 8}, "mm_processor_kwargs": {"vlm_prune": {"tokens": 9}}},
        "give one of them",
    ),
    "other options": ({"mm_processor_kwargs": {"do_resize": False}}, "--trust-request-mm-kwargs"),
}


@pytest.mark.parametrize(("more", "words"), BAD.values(), ids=BAD)
def test_a_bad_budget_is_the_clients_error(server, more, words):
    assert words in refusal(server, scene(3), **more)
    assert words in refusal(server, **more)  # no image, the same
    assert chat(server, scene(3))["usage"]["prompt_tokens"] == 76


def test_images_that_are_none_are_the_clients_error(server):
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, {**body(), "messages": [{"role": "user", "content": content}]})
    assert 400 <= caught.value.code < 500
    assert chat(server, scene(3))["usage"]["prompt_tokens"] == 76


def test_requests_of_all_kinds_at_once(server):
    asks = [
        Ask((scene(seed),), budget=budget)
        for seed in (11, 12, 11)
        for budget in (None, {"tokens": 5}, {"tokens": 100})
    ]
    asks += [Ask((scene(11), scene(12))), Ask((), "Is there a star in the image?")]
    expected = expect("tiny-llava", asks, PLAN)
    with ThreadPoolExecutor(len(asks)) as pool:
        answers = list(
            pool.map(
                lambda one: chat(
                    server,
                    *one.images,
                    question=one.question,
                    **({} if one.budget is None else {"vlm_prune": one.budget}),
                ),
                asks,
            )
        )
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [one.rows for one in expected]
    assert [said(answer) for answer in answers] == [text_of(one) for one in expected]


def test_a_stream_says_the_same_and_may_be_cut_off(server):
    budget = {"vlm_prune": {"tokens": 20}}
    whole, pieces = said(chat(server, scene(5), **budget)), []
    with post(server, body(scene(5), stream=True, **budget)) as stream:
        for line in stream:
            if line.startswith(b"data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    assert "".join(pieces).strip() == whole
    assert len(pieces) > 5
    with post(server, body(scene(6), stream=True, max_tokens=200, ignore_eos=True)) as stream:
        stream.readline()
    assert said(chat(server, scene(5), **budget)) == whole


def test_structured_output(server):
    """A choice, as the trained model's words spell no JSON; it would say neither by itself."""
    answer = chat(server, scene(3), structured_outputs={"choice": ["yes", "no"]}, vlm_prune={"tokens": 20})
    assert said(answer) in ("yes", "no")
    assert answer["usage"]["prompt_tokens"] == 32


def test_the_log_and_the_metrics_say_what_is_pruned(server, log):
    line = "flowcut keeps 64 of 256 tokens of each image; requests may ask for 0.5 of the tokens at most"
    assert log.read_text().count(f"vlm_prune: {line}") == 1
    before = counters(server)
    for _ in range(2):  # the second time it comes from the encoder's cache
        chat(server, scene(77), vlm_prune={"tokens": 32})
    chat(server, scene(78), scene(79), vlm_prune={"ratio": 0.125})
    after, labels = counters(server), ("12%", "flowcut")
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown[("visual_tokens_seen", *labels)] == 3 * 256
    assert grown[("visual_tokens_kept", *labels)] == 3 * 32
    assert grown[("images", *labels)] == 3
    assert after[("choosing_seconds", *labels)] > 0


def test_the_guides_client(server):
    lines = run("client", PORT=str(server)).splitlines()
    assert [int(line.split()[0]) for line in lines] == [75, 27, 139]


@pytest.mark.parametrize(("name", "counts"), [("offline", [76, 28, 140, 268]), ("embeds", [32, 102])])
def test_the_guides_scripts(name, counts):
    lines = [line for line in run(name).splitlines() if " the image shows" in line]
    assert [int(line.split()[0]) for line in lines] == counts
