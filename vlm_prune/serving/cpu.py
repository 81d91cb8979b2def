"""A fix of vLLM's CPU runner: it carries positions with embeddings where the engine does, as other runners do.

``CPUModelRunner.load_model`` of vLLM 0.32 does not read that setting. Other devices need no fix.
"""

from __future__ import annotations

from typing import Any

ATTRIBUTE = "is_multimodal_pruning_enabled"


class Asked:
    """Replaces the runner's attribute: returns what its config says, whatever was assigned."""

    def __get__(self, runner: Any, owner: Any = None) -> bool:
        """Whether the engine carries positions with embeddings."""
        from vllm.model_executor.models.interfaces import supports_multimodal_pruning

        config = runner.model_config.multimodal_config
        if config is None or not supports_multimodal_pruning(runner.get_model()):
            return False
        return bool(config.is_multimodal_pruning_enabled())

    def __set__(self, runner: Any, value: bool) -> None:
        """The stock runner sets it to False before the model is loaded, and never changes it."""


def mend() -> None:
    """Make the CPU runner read its config."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if not isinstance(vars(CPUModelRunner).get(ATTRIBUTE), Asked):
        setattr(CPUModelRunner, ATTRIBUTE, Asked())
