"""The trained test models that ship with the package; stock transformers classes, loaded offline."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from vlm_prune.saving import SHIPPED

MODELS = SHIPPED
"""Names that `load_model` takes."""

WEIGHTS = Path(__file__).parent / "tiny" / "weights"
"""Folder with one complete `save_pretrained` folder per model, good for transformers and vLLM."""


def model_path(name: str) -> Path:
    """Folder of a shipped model, good for any `from_pretrained`.

    Raises:
        ValueError: when there is no such model.
    """
    if "/" in name:
        raise ValueError(
            f'{name!r} is no test model: vlm_prune.from_pretrained({name!r}, policy="flowcut") loads and prunes models '
            f"of the hub and of folders (docs/checkpoints.md). Test models: {', '.join(MODELS)}."
        )
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown test model {name!r}.{hint} Available: {', '.join(MODELS)}.")
    return WEIGHTS / name


def exit_gates(name: str) -> Path:
    """File of the DyVTE exit gates trained for a shipped model: ``prune(model, "dyvte", gates=exit_gates(name))``."""
    # not in the model's own folder: vLLM loads every safetensors file that it finds there
    return model_path(name).parent / "exit-gates" / f"{name}.safetensors"


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a shipped test model and its processor, without network access.

    Args:
        name: one of `MODELS`.
        dtype: of the weights; they are stored in bfloat16.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        ValueError: when there is no such model.
        FileNotFoundError: when the package was installed without the weights.
    """
    path = model_path(name)
    if not (path / "model.safetensors").exists():
        raise FileNotFoundError(
            f"No weights in {path}. Train them with `python -m vlm_prune.eval.tiny.train --all`."
        )
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(path, local_files_only=True)
