"""A source's published numbers beside those of a run, as the recipe's section ``published`` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from libmtl_fair.report.frames import number, rows
from libmtl_fair.report.run_folder import RunFolder


def _section(run: RunFolder) -> Mapping[str, Any]:
    found = run.recipe.get("published")
    return found if isinstance(found, Mapping) else {}


def beside_published(run: RunFolder, cells: pd.DataFrame, overview: pd.DataFrame) -> pd.DataFrame:
    """Return method, measure, published, ours (mean over seeds): one row for each published number of a method of the run.

    Parameters
    ----------
    cells, overview : of the comparison; a measure is a column of the one or of the other. ``ours`` is NaN where it is neither.
    """
    ours = {(row.method, str(row.column)): float(row.mean) for row in rows(cells)}
    for row in overview.to_dict("records"):
        ours |= {(str(row["method"]), str(k)): float(v) for k, v in row.items() if k != "method"}
    values = _section(run).get("values") or {}
    found = [
        (method, measure, number(value), ours.get((method, measure), float("nan")))
        for method in run.methods
        for measure, value in (values.get(method) or {}).items()
    ]
    return pd.DataFrame(found, columns=["method", "measure", "published", "ours"])


def publication(run: RunFolder) -> list[str]:
    """Say where the published numbers come from, where the protocols differ, and which methods the run lacks."""
    section = _section(run)
    if not section:
        return []
    lacking = [method for method in section.get("values") or {} if method not in run.methods]
    texts = [f"Published numbers: {section.get('source')}.", str(section.get("note") or "")]
    if lacking:
        texts.append(f"Not in this run: {', '.join(lacking)}.")
    return [" ".join(text for text in texts if text)]
