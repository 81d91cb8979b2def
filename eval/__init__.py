"""Evaluation: POPE and CHAIR, trained test models and their scenes, the demo and YAML-driven runs."""

from typing import Any

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # the scorers of this package need neither torch nor transformers, so models are imported when asked for
    if name == "load_model":
        from .models import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
