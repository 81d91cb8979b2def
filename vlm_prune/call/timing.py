"""Timing that is correct on every device, without making the host wait while the model runs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Starts on creation. `stop` returns a function that gives the milliseconds, waiting for the device if needed."""

    def __init__(self, device: torch.device):
        self.device = device
        # in a graph that is being recorded an event has no time
        self.timed = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        if self.timed:
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()
        else:
            self.started = time.perf_counter()

    def stop(self) -> Callable[[], float]:
        """Stop now; the returned function may be called at any later time."""
        if self.timed:
            begin, end = self.begin, torch.cuda.Event(enable_timing=True)
            end.record()

            def milliseconds() -> float:
                end.synchronize()
                return float(begin.elapsed_time(end))

            return milliseconds
        elapsed = 1e3 * (time.perf_counter() - self.started)
        return lambda: elapsed
