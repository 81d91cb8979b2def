"""The report of a run as one self-contained HTML page, and the same kind of page for a single image."""

from vlm_prune.eval.report.page import write_report

__all__ = ["write_report"]
