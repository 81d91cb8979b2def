"""Pruning settings as JSON: what ``model.pruning.config`` is, and what ``prune(model, config=...)`` reads.

::

    {"version": 1, "policy": "flowcut+vhr", "ratio": 0.25,
     "settings": {"flowcut": {"positions": "compact", "compat": null}, "vhr": {"alpha": 2.0}}}

``settings`` are the fields of a single policy, or each policy's name with its fields; ``tokens`` or ``ratio`` is the
budget, ``per`` what it applies to; ``capture`` is true if calls are captured. Only ``policy`` is required.
``vlm-prune tune`` adds ``similarity`` and ``about`` for people to read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .composition import Composition
from .errors import PolicyError
from .registry import did_you_mean, registered_name

FILE = "vlm_prune.json"
"""Name of the file next to a pruned model's weights."""

VERSION = 1
KEYS = ("version", "policy", "tokens", "ratio", "per", "capture", "settings", "similarity", "about")


def to_config(composition: Composition, capture: bool = False) -> dict[str, Any]:
    """Policies and budget as a JSON-compatible dict, with every field.

    Raises:
        PolicyError: a policy is not registered, so that its name would mean nothing to a reader, or has a setting
            that is no plain value.
    """
    policies, budget = composition.written, composition.budget
    names = [registered_name(policy) for policy in policies]
    fields = {
        name: {
            f.name: _plain(getattr(policy, f.name), f"{name}: {f.name}") for f in dataclasses.fields(policy)
        }
        for name, policy in zip(names, policies, strict=True)
    }
    kept: dict[str, Any] = {}
    if composition.owner is not None:
        kept = {"ratio": budget.ratio} if budget.tokens is None else {"tokens": budget.tokens}
        kept |= {"per": "image"} if budget.joint else {}
    kept |= {"capture": True} if capture else {}
    settings = fields if len(fields) > 1 else fields[names[0]]
    return {"version": VERSION, "policy": "+".join(names), **kept, "settings": settings}


def load_config(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Arguments for `prune` from a config: a dict, a JSON file, or a folder with a ``vlm_prune.json``.

    Raises:
        PolicyError: it is not a config, is of another version, or has an unknown key.
    """
    where = "config" if isinstance(source, Mapping) else str(source)
    config = source if isinstance(source, Mapping) else _read(Path(source))
    if not isinstance(config, Mapping) or not isinstance(config.get("policy"), str):
        raise PolicyError(
            f"{where} is not a pruning config: a JSON object with policy, and with tokens or ratio and settings if "
            "wanted, is needed."
        )
    version = config.get("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise PolicyError(
            f"{where} is a pruning config of version {version!r}, this vlm_prune reads version {VERSION}: install the "
            "vlm_prune that wrote it, or write it again."
        )
    for key in config:
        if key not in KEYS:
            raise PolicyError(
                f"{where} has the key {key!r}, which is not known. {did_you_mean(str(key), KEYS)}"
            )
    settings = config.get("settings", {})
    if not isinstance(settings, Mapping):
        raise PolicyError(
            f"{where} is not a pruning config: settings={settings!r}, where an object with the policy's fields is "
            "needed."
        )
    for name in settings:
        if name in ("model", "policy", "tokens", "ratio", "per", "capture", "config"):
            raise PolicyError(f"{where}: {name} belongs next to settings, not in them.")
    budget = {
        name: config[name] for name in ("tokens", "ratio", "per", "capture") if config.get(name) is not None
    }
    return {
        "policy": config["policy"],
        **budget,
        **{name: _frozen(value) for name, value in settings.items()},
    }


def write_config(config: Mapping[str, Any], folder: str | Path) -> None:
    """Write a config to the ``vlm_prune.json`` of a folder."""
    (Path(folder) / FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    try:
        return json.loads((path / FILE if path.is_dir() else path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"{path} is not a pruning config ({type(error).__name__}: {error}): give a JSON file, or a folder with a "
            f"{FILE}, as save_pretrained of a pruned model makes it."
        ) from error


def _plain(value: Any, name: str) -> Any:
    """A setting as JSON can hold it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, name) for key, item in value.items()}
    raise PolicyError(
        f"{name} is a {type(value).__name__}, which a JSON config cannot hold: save it to a file, and give the policy "
        "the file's path."
    )


def _frozen(value: Any) -> Any:
    """A setting as policies hold it: their sequences are tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, Mapping) else value
