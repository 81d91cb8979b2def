"""YAML-driven runs: models x policies x budgets x tasks, resumable sample by sample."""

from vlm_prune.eval.runs.folder import RunFolder

__all__ = ["RunFolder"]
