"""Plug-in for lmms-eval: ``lmms-eval --model vlm_prune --model_args pretrained=...,policy=flowcut,tokens=64``.

lmms-eval finds it by the entry point ``lmms_eval.models`` and is imported by nobody else. Read in this order:
``arguments`` (what stands after ``--model_args``), ``prompts`` (from a request to a model's input), ``generate`` and
``likelihood`` (answers and scores of a batch), ``model`` (the classes lmms-eval calls), ``scoring`` (our POPE and CHAIR
as tasks of it), ``local_tasks`` (those tasks on data of one's own).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
"""Folder of the task files, for ``--include_path``."""


def manifests() -> list[Any]:
    """The entry point: model ``vlm_prune`` for chat messages and, with ``--force_simple``, for plain text."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="vlm_prune",
            simple_class_path="vlm_prune.eval.lmms.model.VlmPruneSimple",
            chat_class_path="vlm_prune.eval.lmms.model.VlmPruneChat",
        )
    ]
