"""The processes that share a run, as ``torchrun`` and ``accelerate launch`` start them, on one node or several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process and the others.

    Attributes:
        rank: number of this one, from 0.
        count: how many there are.
        local_rank: number among those of this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Processes:
        """From the variables RANK, WORLD_SIZE and LOCAL_RANK; alone without them."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            # only small Python objects are exchanged, so gloo is enough; a cell may take days
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        joined = cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        if joined.device.type == "cuda":
            torch.cuda.set_device(joined.device)
        return joined

    @property
    def first(self) -> bool:
        """Whether this is the process that writes results and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. All processes have to call it."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def leave(self) -> None:
        """Called when the run has ended."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
