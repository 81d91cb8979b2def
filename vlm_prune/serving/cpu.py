"""vLLM's CPU workers, mended where this module is imported: they carry positions beside embeddings as others do.

``CPUModelRunner.load_model`` of vLLM 0.32 does not find out whether an engine does that. Other devices need nothing.
"""

from __future__ import annotations

from typing import Any


class Mended:
    """Adds nothing to a worker: ``worker_extension_cls="vlm_prune.serving.cpu.Mended"`` has it import this module."""


def mend() -> None:
    """Let the CPU runner ask its config after loading."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if hasattr(CPUModelRunner.load_model, "stock"):
        return
    stock = CPUModelRunner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        """Load the model, and ask."""
        stock(self, *args, **kwargs)
        config = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = config is not None and config.is_multimodal_pruning_enabled()

    load_model.stock = stock  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model


mend()
