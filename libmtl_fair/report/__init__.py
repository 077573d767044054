"""Reports of a run: console table, plots, HTML page, fairness card; comparisons of runs."""

from __future__ import annotations

from libmtl_fair.report.branches import conflict_plot, conflict_table
from libmtl_fair.report.card import card_dict, card_markdown, write_card
from libmtl_fair.report.competitors import dominated
from libmtl_fair.report.page import comparison_table, write_comparison, write_report
from libmtl_fair.report.plots import dual_plot, group_bars, plots_of, scatter_plot, trace_plot, weight_plot, write_plots
from libmtl_fair.report.run_folder import RunFolder, SeedRun, read_run
from libmtl_fair.report.summary import shrinkage_verdict, summary, write_summary
from libmtl_fair.report.tables import summary_table

__all__ = [
    "RunFolder",
    "SeedRun",
    "card_dict",
    "card_markdown",
    "comparison_table",
    "conflict_plot",
    "conflict_table",
    "dominated",
    "dual_plot",
    "group_bars",
    "plots_of",
    "read_run",
    "scatter_plot",
    "shrinkage_verdict",
    "summary",
    "summary_table",
    "trace_plot",
    "weight_plot",
    "write_card",
    "write_comparison",
    "write_plots",
    "write_report",
    "write_summary",
]
