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
def server(tmp_path_factory):
    """Port of a server that prunes tiny-llava, started as the guide says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, **ON_PATH, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PORT": str(port)}
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


def chat(port, image, **more):
    data = io.BytesIO()
    image.save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Please describe this image in detail."},
    ]
    body = {
        "model": "tiny-llava",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
        "add_special_tokens": True,  # the template writes no <s>
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps({**body, **more}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.parametrize("budget", [None, {"tokens": 8}, {"ratio": 1.0}], ids=["engine's", "8", "all"])
def test_chat_answers_as_the_hugging_face_model(server, budget):
    asked = Ask((scene(3),), budget=budget)
    expected = expect("tiny-llava", [asked], PLAN)[0]
    more = {} if budget is None else {"mm_processor_kwargs": {"vlm_prune": budget}}
    answer = chat(server, scene(3), **more)
    text = hugging_face("tiny-llava")[1].decode(expected.tokens, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"].strip() == text.strip()
    assert answer["usage"]["prompt_tokens"] == expected.rows


def test_a_bad_budget_is_the_clients_error(server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        chat(server, scene(3), mm_processor_kwargs={"vlm_prune": {"tokens": 1000}})
    assert caught.value.code == 400
    assert "Choose 1 to 256" in caught.value.read().decode()
    assert chat(server, scene(3))["usage"]["prompt_tokens"] == 76


def test_the_guides_client(server):
    lines = run("client", PORT=str(server)).splitlines()
    assert [int(line.split()[0]) for line in lines] == [75, 27, 267]


@pytest.mark.parametrize(("name", "counts"), [("offline", [76, 28, 140, 268]), ("embeds", [32, 102])])
def test_the_guides_scripts(name, counts):
    lines = [line for line in run(name).splitlines() if " the image shows" in line]
    assert [int(line.split()[0]) for line in lines] == counts
