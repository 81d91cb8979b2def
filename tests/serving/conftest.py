"""Tests that need vLLM: `make test-vllm` runs them in an environment of their own, `make test` passes them by."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

# read when vLLM is imported: everything in this process, one thread, one GB of KV cache
os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def folder(request, tmp_path_factory):
    """A random Qwen-VL of each generation."""
    from tests.serving.checkpoints import random_qwen

    return random_qwen(request.param, tmp_path_factory.mktemp(request.param))
