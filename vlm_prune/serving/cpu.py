"""vLLM's CPU runner, fixed: it carries positions with embeddings where an engine does, as other runners do.

``CPUModelRunner.load_model`` of vLLM 0.32 does not find out whether an engine does that. Other devices need nothing.
"""

from __future__ import annotations

from typing import Any

ATTRIBUTE = "is_multimodal_pruning_enabled"


class Asked:
    """In place of the runner's attribute: what its config says, whatever was set."""

    def __get__(self, runner: Any, owner: Any = None) -> bool:
        """Whether the engine carries positions with embeddings."""
        from vllm.model_executor.models.interfaces import supports_multimodal_pruning

        config = runner.model_config.multimodal_config
        if config is None or not supports_multimodal_pruning(runner.get_model()):
            return False
        return bool(config.is_multimodal_pruning_enabled())

    def __set__(self, runner: Any, value: bool) -> None:
        """The stock runner sets it to False before the model is loaded, and leaves it there."""


def mend() -> None:
    """Let the CPU runner ask its config."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if not isinstance(vars(CPUModelRunner).get(ATTRIBUTE), Asked):
        setattr(CPUModelRunner, ATTRIBUTE, Asked())
