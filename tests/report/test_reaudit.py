from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from libmtl_fair.cli import app
from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.metrics import FixedDeltaAudit
from libmtl_fair.predictions import Predictions
from libmtl_fair.report import read_run
from libmtl_fair.report.reaudit import load_predictions, reaudit, tolerances


@pytest.fixture
def copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copy")


def test_the_protocols_own_tolerances_give_the_runs_own_numbers(finished_run):
    found = reaudit([finished_run])
    for row in found.frame.itertuples():
        metrics = json.loads((finished_run / row.method / f"seed{row.seed}" / "metrics.json").read_text())
        entry = next(e for e in metrics["audit"]["test"] if e["delta_name"] == row.delta_name)
        assert row.bias == pytest.approx(entry["bias"], abs=1e-12)
        assert row.violation_rate == pytest.approx(entry["violation_rate"], abs=1e-12)
        assert row.brier == pytest.approx(metrics["utility"]["test"]["macro"]["brier"], abs=1e-9)
    assert len(found.frame) == 2 * 2 * 3


@pytest.mark.parametrize("name", ["p75", "conformal:0.1"])
def test_quantiles_and_conformal_levels_are_found_again_from_the_embeddings(finished_run, name):
    (found,) = tolerances(read_run(finished_run), [name])
    held = json.loads((finished_run / "audit_protocol.json").read_text())["deltas"]
    assert found.value == held[name]
    assert "plain, seed 0" in found.source


def test_a_new_tolerance_audits_without_training(finished_run):
    found = reaudit([finished_run], ["0.05"], split="val")
    row = found.frame.iloc[-1]
    scores = Predictions.load(finished_run / row["method"] / f"seed{row['seed']}" / "predictions_val.parquet").scores
    expected = FixedDeltaAudit(0.05, exact=True).run(scores)
    assert row["bias"] == pytest.approx(expected.bias, abs=1e-12)
    assert len(found.per_pair) == len(found.frame)


def test_several_runs_share_one_tolerance_and_one_score_mapping(finished_run, copy):
    protocol = json.loads((copy / "audit_protocol.json").read_text())
    protocol["deltas"] = {"0.5": 0.5}
    (copy / "audit_protocol.json").write_text(json.dumps(protocol))
    found = reaudit([finished_run, copy], ["p75"])
    assert found.frame["delta"].nunique() == 1
    wide = found.frame.pivot_table(index=["method", "seed"], columns="run", values="bias")
    np.testing.assert_allclose(wide.iloc[:, 0], wide.iloc[:, 1], atol=1e-12)


def test_other_tasks_are_refused(finished_run, copy):
    item = read_run(copy).runs[0]
    held = load_predictions(item, "test")
    fewer = held.tasks[:1]
    keep = {name: getattr(held, name) for name in ("scores", "outputs", "labels")}
    one = {key: {t.name: value[t.name] for t in fewer} for key, value in keep.items()}
    Predictions(fewer, **one, groups=held.groups, group_names=held.group_names).save(
        item.folder / "predictions_test.parquet"
    )
    with pytest.raises(RecipeError, match="same tasks, in the same order"):
        reaudit([finished_run, copy], ["0.1"])


def test_regression_scores_are_squashed_by_the_first_runs_range(finished_run):
    from libmtl_fair.report.reaudit import common_scores
    from libmtl_fair.tasks import Regression

    item = read_run(finished_run).runs[0]
    held = load_predictions(item, "test")
    tasks = tuple(Regression(t.name, score_range=(0.0, 1.0)) for t in held.tasks)
    with pytest.raises(RecipeError, match="binary"):
        common_scores(item, "test", tasks)
    assert torch.equal(common_scores(item, "test", held.tasks).scores["income"], held.scores["income"])


@pytest.mark.parametrize("delta", ["1.5", "p101", "conformal:2", "often", "pp", ""])
def test_tolerances_that_are_none(finished_run, delta):
    with pytest.raises(RecipeError, match="expected a number in"):
        reaudit([finished_run], [delta])


def test_missing_and_damaged_files(copy):
    embeddings = copy / "plain" / "seed0" / "embeddings.npz"
    embeddings.write_bytes(embeddings.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"embeddings\.npz is damaged"):
        reaudit([copy], ["p75"])
    embeddings.unlink()
    with pytest.raises(CheckpointError, match="no reference pairs.*output.embeddings"):
        reaudit([copy], ["p75"])
    predictions = copy / "relif" / "seed1" / "predictions_test.parquet"
    predictions.write_bytes(b"not a table")
    with pytest.raises(CheckpointError, match="holds no predictions"):
        reaudit([copy], ["0.1"])
    predictions.unlink()
    with pytest.raises(CheckpointError, match="cannot be audited again"):
        reaudit([copy], ["0.1"])
    with pytest.raises(CheckpointError, match="no such directory"):
        reaudit([copy / "absent"])
    with pytest.raises(RecipeError, match="at least one run folder"):
        reaudit([])


def test_the_command(finished_run, tmp_path):
    target = tmp_path / "again.json"
    done = CliRunner().invoke(
        app, ["audit", str(finished_run), "--delta", "p90", "--delta", "0.2", "--out", str(target)]
    )
    assert done.exit_code == 0, done.output
    assert "0.9 quantile of" in done.output
    content = json.loads(target.read_text())
    assert [t["name"] for t in content["tolerances"]] == ["p90", "0.2"]
    wrong = CliRunner().invoke(app, ["audit", str(finished_run), "--delta", "often"])
    assert wrong.exit_code == 2
    assert "expected a number" in wrong.output
