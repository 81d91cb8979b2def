"""Pruning settings in a JSON file, such as `vlm_prune.tune.tune` saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import PolicyError


def load_config(path: str | Path) -> dict[str, Any]:
    """Arguments for `prune` from a JSON object with ``policy``, and ``tokens`` or ``ratio`` and ``settings`` if given.

    Raises:
        PolicyError: the file is no such config.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        budget = {name: config[name] for name in ("tokens", "ratio") if config.get(name) is not None}
        return {"policy": config["policy"], **budget, **config.get("settings", {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolicyError(
            f"{path} is not a pruning config ({type(error).__name__}: {error}): a JSON object with policy, and with "
            "tokens or ratio and settings if wanted, is needed."
        ) from error
