"""The sources' protocols, shortened: each recipe that has its data runs, with its source's numbers beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from libmtl_fair.recipe.build import check
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.recipe.schema import load_recipe
from libmtl_fair.report import read_run
from libmtl_fair.report.compare import compare

SOURCES = Path(__file__).resolve().parents[2] / "recipes" / "sources"
SHORT = ["train.epochs=1", "seeds=[0]", "data.subset=600", "metrics.n_bootstrap=0", "output.report=false"]


@pytest.mark.parametrize("name", ["glf_adult", "glf_compas"])
def test_glf_table_1(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(SOURCES / f"{name}.yaml", SHORT)
    check(recipe)
    kept = ["single_task", "aux_gld", "aux_glf"]
    recipe = recipe.model_copy(update={"methods": {k: recipe.methods[k] for k in kept}})
    found = compare([run_recipe(recipe, tmp_path / name, device="cpu")])
    assert (found.published["ours"].notna()).all()
    assert any("is_recid" in note or "-9.08" in note for note in found.notes)
    if name == "glf_compas":  # an outcome among the inputs: what the published AUC needs
        assert "is_recid" in str(read_run(tmp_path / name).data_card)
