"""The report of a run as one self-contained HTML page, and the same kind of page for a single image."""

from vlm_prune.eval.report.page import export_report, write_report

__all__ = ["export_report", "write_report"]
