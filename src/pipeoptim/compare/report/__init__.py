"""The page of a comparison, of one run, or of a plan: one HTML file that holds everything it shows and fetches nothing."""

from pipeoptim.compare.report.plan_page import write_plan_report
from pipeoptim.compare.report.write import write_report, write_run_report

__all__ = ["write_plan_report", "write_report", "write_run_report"]
