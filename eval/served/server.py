"""An OpenAI-compatible vLLM server in separate processes: start, requests, stop."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

START = 900
"""Seconds after which a server that is not up has failed."""


class Server:
    """Serves ``model`` under the name ``served`` within its block.

    Args:
        model: folder or name of a checkpoint.
        plan: the entry for pruning in ``hf_overrides``; ``None`` for a stock server.
        log: file for its output.
        options: further options for the server's command line.
    """

    def __init__(
        self, model: str | Path, plan: dict[str, Any] | None, log: Path, options: Sequence[str] = ()
    ):
        self.model, self.plan, self.log, self.options = str(model), plan, log, list(options)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> None:
        """Start it, and wait until it is healthy."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--served-model-name", "served", "--port", str(self.port), *self.options]
        if self.plan is not None:
            command += ["--hf-overrides", json.dumps({"vlm_prune": self.plan})]
        environment = {
            # on a CPU the default is nine tenths of all memory, which is seldom free
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **environment}, start_new_session=True
            )
        for _ in range(START):
            if self.process.poll() is not None:
                tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise OSError(f"the server stopped while starting; its log, {self.log}, ends:\n{tail}")
            if self.well():
                return
            time.sleep(1)
        raise OSError(f"the server was not up after {START} seconds: see {self.log}")

    def stop(self) -> None:
        """Stop it and all its processes."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        self.process = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def read(self, path: str) -> str:
        """The answer to a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def well(self) -> bool:
        """Whether it reports that it is healthy."""
        try:
            self.read("/health")
        except OSError:
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """The metrics of ``/metrics``, summed over labels."""
        found: dict[str, float] = {}
        for name, value in re.findall(
            r"^([a-zA-Z_:]+)(?:\{.*\})? (\S+)$", self.read("/metrics"), re.MULTILINE
        ):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def cache_tokens(self) -> int:
        """Tokens for which the KV cache has room."""
        line = next(
            line for line in self.read("/metrics").splitlines() if line.startswith("vllm:cache_config_info")
        )
        labels = dict(re.findall(r'(\w+)="(.*?)"', line))
        return int(labels["num_gpu_blocks"]) * int(labels["block_size"])
