"""Reading golden ``.npz`` files."""

import json
from pathlib import Path

import numpy as np
import torch


def npz_cases(folder: Path) -> list[Path]:
    """All ``.npz`` files of a method's folder, in name order."""
    return sorted(folder.glob("*.npz"))


class Golden:
    """One golden file: ``golden["name"]`` is a torch tensor, ``golden.meta`` the recorded settings."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.meta = json.loads(str(self.arrays.pop("meta_json"))) if "meta_json" in self.arrays else {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def prefixed(self, prefix: str) -> dict[str, torch.Tensor]:
        """All arrays whose name starts with ``prefix``, without it."""
        return {n[len(prefix) :]: self[n] for n in self.arrays if n.startswith(prefix)}
