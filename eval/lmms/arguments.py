"""What stands after ``--model_args``: where the model is, how it is pruned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_prune.config import load_config
from vlm_prune.errors import PolicyError
from vlm_prune.eval.models import MODELS, model_path
from vlm_prune.registry import make_policies

LOADING = ("revision", "dtype", "attn_implementation", "device_map", "trust_remote_code")
"""Arguments handed on to ``from_pretrained``."""

OWN = (
    *("pretrained", "policy", "tokens", "ratio", "per", "config", "max_new_tokens", "system_prompt"),
    *("batch_size", "device"),
    *LOADING,
)
"""All arguments but the settings of policies."""


def nested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with dotted names as dicts, and JSON values read.

    >>> nested({"flowcut.compat": "official", "vhr": '{"alpha": 2}'})
    {'flowcut': {'compat': 'official'}, 'vhr': {'alpha': 2}}
    """
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, str) and value[:1] in "{[" and value:
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}={value}: not JSON ({error.msg})") from error
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: {parent} has the value {place!r} already, so it has no parts")
        place[last] = value
    return found


def pruning_options(
    policy: str | None,
    tokens: int | None,
    ratio: float | None,
    per: str | None,
    config: str | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments for `vlm_prune.prune`, checked as far as that is possible without the model.

    Args:
        policy: a name, or names joined by "+"; default FlowCut. "none" keeps every token.
        tokens: budget per tile, or image.
        ratio: budget as a share.
        per: "tile" or "image".
        config: a JSON file that holds all of these.
        settings: whatever else was given: fields of the policy, by policy for a composition (see `nested`).

    Raises:
        PolicyError: no such policy, no such setting, or a file with arguments beside it.
    """
    asked = {"tokens": tokens, "ratio": ratio, "per": per}
    budget = {name: value for name, value in asked.items() if value is not None}
    fields = nested(settings)
    if config is not None:
        if policy is not None or budget or fields:
            beside = ", ".join([*(["policy"] if policy else []), *budget, *fields])
            raise PolicyError(f"config={config} holds policy, budget and settings: leave out {beside}.")
        return load_config(config)
    policy = policy or "flowcut"
    try:
        make_policies(policy, fields)
    except PolicyError as error:
        raise PolicyError(f"{error} Arguments that are no settings of a policy: {', '.join(OWN)}.") from error
    return {"policy": policy, **budget, **fields}


def checkpoint(pretrained: str) -> str:
    """A path or hub name; the name of a shipped test model becomes its path."""
    if pretrained in MODELS and not Path(pretrained).exists():
        return str(model_path(pretrained))
    return pretrained
