"""Every test runs offline, seeded and on one thread; what transformers will break tomorrow fails today."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# read when these libraries are imported, so before anything else
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


class FailOnDeprecation(logging.Handler):
    """transformers announces most removals in its log, not by warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            raise DeprecationWarning(message)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").addHandler(FailOnDeprecation(logging.WARNING))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers for a test, alone or among others; other global settings come back."""
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
