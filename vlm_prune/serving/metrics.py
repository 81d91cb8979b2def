"""Counters on the server's ``/metrics``, next to vLLM's own.

Images are encoded in vLLM's workers, and its front end answers ``/metrics``. Counts pass from one to the other through
files of `prometheus_client`, whose format is made for that: in the folder that vLLM sets where it runs several front
ends, otherwise in one that we make. Workers and front end have to be on one machine.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

THEIRS = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable with the folder whose files all front ends of a server collect."""

OURS = "VLM_PRUNE_METRICS_DIR"
"""The same for a server with one front end."""

HELP = {
    "vlm_prune_visual_tokens_seen": "Visual tokens of encoded images before pruning.",
    "vlm_prune_visual_tokens_kept": "Visual tokens of encoded images that are passed to the language model.",
    "vlm_prune_images": "Images encoded. Those that came from the encoder cache are not counted again.",
    "vlm_prune_choosing_seconds": "Time that policies took to choose visual tokens.",
}
"""Counters, and what they count; ``/metrics`` adds ``_total`` to their names."""


class Collector:
    """Reads the files of one folder when ``/metrics`` is requested."""

    def __init__(self, folder: str):
        self.folder = folder

    def collect(self) -> Iterable[Any]:
        """The counters, summed over workers."""
        from prometheus_client.multiprocess import MultiProcessCollector

        found: Iterable[Any] = MultiProcessCollector.merge([str(x) for x in Path(self.folder).glob("*.db")])
        return found


def open_folder() -> None:
    """Make a folder for this process and its children, and collect their files, unless vLLM has set one."""
    if multiprocessing.parent_process() is not None or THEIRS in os.environ or OURS in os.environ:
        return
    from prometheus_client import REGISTRY

    folder = os.environ[OURS] = tempfile.mkdtemp(prefix="vlm-prune-metrics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    REGISTRY.register(Collector(folder))


class Counters:
    """Counts of what one worker has encoded, by policy and by the share of tokens kept, in whole percent.

    Args:
        policy: its name.
    """

    def __init__(self, policy: str):
        self.policy, self.late = policy, list[tuple[str, Callable[[], float]]]()
        folder = os.environ.get(THEIRS) or os.environ.get(OURS)
        self.file: Any = None
        if folder is not None and Path(folder).is_dir():
            from prometheus_client.mmap_dict import MmapedDict

            # prometheus_client reads the kind of a metric from the start of a file's name
            self.file = MmapedDict(str(Path(folder) / f"counter_vlm-prune-{os.getpid()}.db"))

    def add(self, seen: int, kept: int, images: int, waits: list[Callable[[], float]]) -> None:
        """Count ``images``; ``waits`` wait for the device and return the milliseconds that choosing took."""
        if self.file is None:
            return
        budget = f"{round(100 * kept / seen)}%"
        for name, value in zip([*HELP][:3], (seen, kept, images), strict=True):
            self._write(name, budget, value)
        # times of the previous batch, so as not to wait for the device now
        for earlier, wait in [*self.late, (budget, float)]:
            self._write("vlm_prune_choosing_seconds", earlier, wait() / 1e3)
        self.late = [(budget, wait) for wait in waits]

    def _write(self, name: str, budget: str, value: float) -> None:
        from prometheus_client.mmap_dict import mmap_key

        key = mmap_key(name, f"{name}_total", ["policy", "budget"], [self.policy, budget], HELP[name])
        before, _ = self.file.read_value(key)
        self.file.write_value(key, before + value, time.time())
