"""The page of a comparison, or of one run: one HTML file that holds everything it shows and fetches nothing."""

from pipeoptim.compare.report.write import write_report, write_run_report

__all__ = ["write_report", "write_run_report"]
