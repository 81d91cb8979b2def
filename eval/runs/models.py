"""The models of a run: shipped ones by name, any other by folder or hub name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from vlm_prune.eval.models import MODELS, model_path
from vlm_prune.eval.runs.config import ModelEntry
from vlm_prune.eval.runs.processes import Processes
from vlm_prune.eval.runs.tiles import Tiles


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, and the tiles that this makes of images."""

    model: PreTrainedModel
    processor: ProcessorMixin
    tiles: Tiles


def load(entry: ModelEntry, dtype: str, processes: Processes) -> Loaded:
    """Load a model in evaluation mode, on the process's own device unless ``device_map`` says otherwise."""
    if entry.device_map is not None and processes.count > 1:
        raise ValueError(
            f"model {entry.name}: device_map={entry.device_map!r} in {processes.count} processes: each process takes "
            "the GPU of its own rank. Leave device_map out, or start one process."
        )
    shipped = entry.model in MODELS
    source: Any = model_path(entry.model) if shipped else entry.model
    options: dict[str, Any] = {"trust_remote_code": entry.trust_remote_code}
    options |= {"local_files_only": True} if shipped else {}
    options |= {"revision": entry.revision} if entry.revision else {}
    model = AutoModelForImageTextToText.from_pretrained(
        source,
        dtype=getattr(torch, entry.dtype or dtype),
        **options,
        **({"device_map": entry.device_map} if entry.device_map is not None else {}),
        **({"attn_implementation": entry.attn_implementation} if entry.attn_implementation else {}),
    )
    if entry.device_map is None:
        model = model.to(processes.device)
    processor = AutoProcessor.from_pretrained(source, **options, **entry.processor)
    return Loaded(model.eval(), processor, Tiles(processor))
