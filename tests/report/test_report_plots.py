from __future__ import annotations

import json

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from libmtl_fair.errors import CheckpointError
from libmtl_fair.report import dual_plot, read_run, trace_plot, weight_plot, write_plots
from libmtl_fair.report.plots import plots_of, thin
from libmtl_fair.report.theme import conflict_map, label, themed


def test_every_plot_of_a_run_is_written(run_dir):
    names = {path.stem for path in write_plots(run_dir)}
    assert {"utility_bias", "shrinkage", "controller_relif", "dual_fairmt", "w_fairmt", "losses_plain"} <= names
    assert {"groups_income_sex", "groups_income_race", "groups_hours_sex"} <= names
    for path in (run_dir / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "interactive" in mpl.rcParams
    assert mpl.rcParams["axes.grid"] is False


def test_plots_without_optional_parts(builder):
    run_dir = builder(
        tasks={"hours": "regression"}, seeds=[0], methods={"plain": "EW"}, shrinkage=False, history=False, cards=False
    ).write()
    assert {path.stem for path in write_plots(run_dir)} == {"groups_hours_sex", "groups_hours_race"}


@pytest.mark.parametrize("name", ["$x_{$", "_hidden", "日本語 😀", "a" * 300, "a/b:c", "<i>&", "\\frac", "line\nbreak"])
def test_awkward_names_are_drawn_as_text(builder, name):
    run_dir = builder(tasks={name: "binary", "other": "binary"}, groups={name: [name, "B"]}, seeds=[0]).write()
    plots = list(plots_of(read_run(run_dir)))
    assert len({plot.name.lower() for plot in plots}) == len(plots)
    for plot in plots:
        if plot.section in ("groups", "traces"):
            assert plot.svg().startswith("<svg")
    assert plots[2].save(run_dir / "plots") is not None


def test_svg_follows_the_page_and_repeats_exactly(run_dir):
    plot = next(iter(plots_of(read_run(run_dir))))
    svg = plot.svg()
    assert svg == plot.svg()
    assert "var(--ink)" in svg
    assert "#1b1b1f" not in svg
    assert "<metadata" not in svg


def test_a_folder_that_cannot_be_written(run_dir):
    (run_dir / "plots").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match="cannot write .*plots"):
        write_plots(run_dir)


def test_traces_keep_gaps_out_and_means_in():
    history = pd.DataFrame({"step": range(10_000), "x": np.where(np.arange(10_000) % 2, np.arange(10_000.0), np.nan)})
    steps, values = thin(history, "x")
    assert len(values) <= 200
    assert np.isfinite(values).all()
    assert np.average(values) == pytest.approx(5000, rel=1e-2)
    assert np.array_equal(steps, values)
    short_steps, short = thin(history[:9], "x")
    assert short.tolist() == short_steps.tolist() == [1, 3, 5, 7]


def test_trace_plots_of_nothing_are_none():
    empty = pd.DataFrame({"step": [], "lambda": []})
    assert trace_plot({"": empty}, {"lambda": "λ"}) is None
    assert trace_plot({}, {"lambda": "λ"}) is None
    assert dual_plot(pd.DataFrame({"step": [0], "eta": [np.nan], "phi": [1.0]})) is None
    assert weight_plot(empty) is None


def test_dual_plot_draws_the_gap_to_epsilon():
    history = pd.DataFrame({"step": [0, 1], "eta": [0.0, 0.1], "phi": [0.3, 0.2]})
    with themed():
        figure = dual_plot(history, 0.05)
    assert isinstance(figure, Figure)
    assert figure.axes[1].lines[0].get_ydata().tolist() == pytest.approx([0.25, 0.15])
    assert figure.axes[1].get_ylabel() == "Φ − ε"


def test_heat_map_with_missing_cells(tmp_path):
    rows = [("accuracy", "layer $1", 0, 0.1), ("accuracy", "layer $1", 1, np.nan), ("fairness", "_x", 0, 0.9)]
    table = pd.DataFrame(rows, columns=["kind", "layer", "epoch", "share"])
    with themed():
        figure = conflict_map(table, "share", ["layer $1", "_x"], [0, 1])
        figure.savefig(tmp_path / "map.png")
        conflict_map(table.assign(angle=np.nan), "angle", ["layer $1"], [0, 1]).savefig(tmp_path / "empty.png")
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["10%", "90%"]
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_labels_are_short_and_visible():
    assert label("_x") == " _x"
    assert len(label("a" * 100)) == 40


def test_one_group_metric_missing_everywhere(run_dir):
    for file in run_dir.glob("*/seed*/metrics.json"):
        metrics = json.loads(file.read_text())
        for row in metrics["groups"]["test"]:
            row |= {"value": None, "low": None, "high": None}
        file.write_text(json.dumps(metrics))
    assert not [path for path in write_plots(run_dir) if path.stem.startswith("groups")]
