"""Reports of a run: console table, plots, HTML page, fairness card."""

from __future__ import annotations

from libmtl_fair.report.card import card_dict, card_markdown, write_card
from libmtl_fair.report.frames import audit_frame, groups_frame, mean_sd, pair_frame, shrinkage_frame, utility_frame
from libmtl_fair.report.gallery import write_plots
from libmtl_fair.report.html import write_report
from libmtl_fair.report.plots import (
    dual_plot,
    group_bars,
    heat_map,
    shrinkage_plot,
    trace_plot,
    utility_bias_plot,
    weight_plot,
)
from libmtl_fair.report.run_folder import RunFolder, SeedRun, read_run
from libmtl_fair.report.shrinkage import shrinkage_verdict
from libmtl_fair.report.tables import summary, summary_table, write_summary

__all__ = [
    "RunFolder",
    "SeedRun",
    "audit_frame",
    "card_dict",
    "card_markdown",
    "dual_plot",
    "group_bars",
    "groups_frame",
    "heat_map",
    "mean_sd",
    "pair_frame",
    "read_run",
    "shrinkage_frame",
    "shrinkage_plot",
    "shrinkage_verdict",
    "summary",
    "summary_table",
    "trace_plot",
    "utility_bias_plot",
    "utility_frame",
    "weight_plot",
    "write_card",
    "write_plots",
    "write_report",
    "write_summary",
]
