"""The audit of people as part of a run: reference, near pairs kept, flip twins, and what tune and the commands make of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from libmtl_fair.cli import app
from libmtl_fair.data import load_dataset, load_table
from libmtl_fair.data.twins import flipped
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import ConsistencyAudit, NearPairs
from libmtl_fair.metrics.consistency import audit_people
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.build import loaders, make_dataset, make_trainer
from libmtl_fair.recipe.people import people_of
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import read_run, tables, write_report
from libmtl_fair.report.compare import compare
from libmtl_fair.report.page import write_comparison
from libmtl_fair.report.people import people_again
from libmtl_fair.report.summary import summary_values
from libmtl_fair.tune import tune

TEXT = """\
name: people
data: {name: adult, tasks: [income, college, hours], sensitive: [sex, race], subset: 1200}
model: {hidden: [16]}
train: {epochs: 1, batch_size: 128}
seeds: [0]
methods:
  plain: {weighting: EW}
  unaware: {weighting: EW, unaware: true}
  offsets: {post: offsets, of: plain, attribute: sex}
output: {report: false}
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "people.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def folder(recipe_file, tmp_path_factory) -> Path:
    return run_recipe(load_recipe(recipe_file), tmp_path_factory.mktemp("run") / "people", device="cpu")


def values(folder: Path, method: str) -> dict[str, float]:
    frame = read_run(folder).frame("consistency")
    frame = frame[(frame["method"] == method) & (frame["task"] == "macro")]
    return dict(zip(frame["metric"], frame["value"]))


def test_sensitive_columns_and_tell_tales_are_left_out_and_named(folder):
    for item in read_run(folder).runs:
        said = item.people("test")["reference"]
        for column in ("sex (shows sex)", "race (shows race)", "relationship (tells sex"):
            assert column in said.split("left out:")[1]
        assert "age" in said.split("left out:")[0]


def test_the_numbers_of_a_run_are_those_of_the_class(folder, recipe_file):
    recipe = load_recipe(recipe_file)
    data = make_dataset(recipe, 0)
    audit = ConsistencyAudit(data.reference.features(data.test.x.double()).numpy())
    held = {part: Predictions.load(folder / f"plain/seed0/predictions_{part}.parquet") for part in ("val", "test")}
    found = audit_people(audit, held["test"], held["val"])
    assert values(folder, "plain")["inconsistency"] == pytest.approx(found.inconsistency, abs=1e-12)
    rows = read_run(folder).of("plain")[0].people("test")["rows"]
    macro = next(row for row in rows if row["task"] == "macro" and row["metric"] == "inconsistency")
    assert (macro["low"], macro["high"]) == pytest.approx(found.interval, abs=1e-12)
    assert {row["task"] for row in rows} == {"macro", "income", "college", "hours"}


def test_near_pairs_are_kept_with_the_run_and_checked_against_the_data(folder, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    data = make_dataset(recipe, 0)
    for part in ("val", "test"):
        shutil.copy(folder / f"near_pairs_{part}.npz", tmp_path)
    kept = people_of(recipe, data, tmp_path)
    assert kept.audits["test"].pairs.digest == NearPairs.load(folder / "near_pairs_test.npz").digest
    before = (tmp_path / "near_pairs_test.npz").read_bytes()
    people_of(recipe.changed(["audit.people.k=3"]), data, tmp_path)
    assert (tmp_path / "near_pairs_test.npz").read_bytes() != before
    assert NearPairs.load(tmp_path / "near_pairs_test.npz").k == 3
    (tmp_path / "near_pairs_test.npz").write_bytes(b"damaged")
    again = people_of(recipe, data, tmp_path).audits["test"].pairs
    assert (again.neighbours == kept.audits["test"].pairs.neighbours).all()


def test_flips_are_of_models_that_see_the_sensitive_value(folder):
    assert values(folder, "plain")["flip"] > 0
    assert values(folder, "unaware")["flip"] == 0
    assert "flip" in values(folder, "offsets") and math.isnan(values(folder, "offsets")["flip"])


def test_twins_have_the_other_value_and_nothing_else():
    data = load_dataset("adult", ["income"], ["sex", "race"], subset=2000)
    found = list(flipped(data, "test"))
    assert [attribute for attribute, _ in found] == ["sex", *["race"] * 4]
    sources = np.array(data.encoder.sources)
    sex = found[0][1].test.x
    own = torch.from_numpy(sources == "sex")
    assert torch.equal(sex[:, ~own], data.test.x[:, ~own])
    assert torch.equal(sex[:, own], 1 - data.test.x[:, own])
    races = torch.stack([twin.test.x[:, torch.from_numpy(sources == "race")] for _, twin in found[1:]])
    seen = torch.cat([data.test.x[None][:, :, torch.from_numpy(sources == "race")], races])
    assert torch.equal(seen.sum(0), torch.ones_like(seen[0]))  # each person has every race once
    assert not list(flipped(load_dataset("adult", ["income"], ["sex"], subset=2000, sensitive_inputs=False), "test"))


def test_twins_of_numbers_and_of_columns_that_show_the_attribute():
    import pandas as pd

    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"y": rng.integers(0, 2, 300), "age": rng.integers(18, 80, 300), "income": rng.normal(size=300)}
    )
    frame["band"] = np.where(frame["age"] < 30, "young", "old")
    declared = {"band": {"column": "band", "also_in": ["age"]}, "sex": "sex"}
    frame["sex"] = np.where(rng.random(300) < 0.1, None, rng.choice(["f", "m"], 300))
    data = load_table(frame, tasks={"y": {"kind": "binary"}}, sensitive=declared, features=["age", "income", "sex"])
    found = dict(flipped(data, "test"))
    at = data.encoder.sources.index("age")
    ages = data.train.x[:, at]
    medians = [ages[data.train.groups["band"] == g].median() for g in range(2)]
    assert torch.equal(found["band"].test.x[:, at], torch.stack(medians)[1 - data.test.groups["band"]])
    unknown = data.test.groups["sex"] < 0
    assert unknown.any() and torch.equal(found["sex"].test.x[unknown], data.test.x[unknown])
    assert (found["sex"].test.x[~unknown] != data.test.x[~unknown]).any(1).all()


@pytest.mark.parametrize(
    ("change", "inside", "outside"),
    [
        ("audit.people.leave_out=[education]", "age", "education (by the recipe)"),
        ("audit.people.keep=[relationship]", "relationship", "sex (shows sex)"),
        ("audit.people.reference=inputs+sensitive", "sex", "nothing"),
    ],
)
def test_the_recipe_changes_the_reference(recipe_file, change, inside, outside):
    recipe = load_recipe(recipe_file, [change, "data.tasks=[income, hours]"])
    people = people_of(recipe, make_dataset(recipe, 0), parts=("test",))
    used, left = people.sentence.split("; left out:")
    assert inside in used and outside in left


def test_weights_change_who_is_near(recipe_file):
    plain, weighted = (load_recipe(recipe_file, change) for change in ([], ["audit.people.weights={age: 0}"]))
    data = make_dataset(plain, 0)
    pairs = [people_of(recipe, data, parts=("test",)).audits["test"].pairs for recipe in (plain, weighted)]
    assert (pairs[0].neighbours != pairs[1].neighbours).any()


def test_groups_that_no_input_shows_are_part_of_inputs_and_sensitive(recipe_file):
    changes = ["data.sensitive_inputs=false", "audit.people.reference=inputs+sensitive"]
    recipe = load_recipe(recipe_file, changes)
    data = make_dataset(recipe, 0)
    people = people_of(recipe, data, parts=("test",))
    assert "the group of sex" in people.sentence
    pairs = people.audits["test"].pairs
    without = people_of(load_recipe(recipe_file, changes[:1]), data, parts=("test",)).audits["test"].pairs
    sex = data.test.groups["sex"].numpy()

    def same(p: NearPairs) -> float:
        return float(np.mean(sex[p.anchors][:, None] == sex[p.neighbours]))

    assert same(pairs) > same(without)


def test_off_and_unknown_columns(recipe_file, tmp_path):
    for off in ("off", "false", "{reference: off}"):
        recipe = load_recipe(recipe_file, [f"audit.people={off}"])
        assert not people_of(recipe, make_dataset(recipe, 0)).audits
    recipe = load_recipe(recipe_file, ["audit.people.leave_out=[relationshp]"])
    with pytest.raises(RecipeError, match=r"audit\.people\.leave_out: .*did you mean 'relationship'"):
        people_of(recipe, make_dataset(recipe, 0))
    with pytest.raises(RecipeError, match=r"audit\.people\.reference"):
        load_recipe(recipe_file, ["audit.people.reference=embedding"])


def test_recipes_from_before_keep_their_fingerprints(recipe_file):
    recipe = load_recipe(recipe_file)
    assert "people" not in recipe.to_dict()["audit"]
    changed = recipe.changed(["audit.people.k=5"])
    assert changed.to_dict()["audit"]["people"]["k"] == 5 and changed.fingerprint() != recipe.fingerprint()


def test_summary_page_and_comparison_show_it(folder):
    run = read_run(folder)
    shown = summary_values(run)
    columns = set(shown["column"])
    assert {"inconsistency", "flip gap"} <= columns
    assert not shown[shown["column"].isin(["inconsistency", "flip gap"])]["higher"].any()
    sheet = tables.consistency_sheet(run)
    assert [line[0].text for line in sheet.body] == ["plain", "unaware", "offsets"]
    assert sheet.heads[1] == "inconsistency ↓" and "sex: different" in sheet.heads
    page = write_report(folder, interactive=False).read_text()
    section = page.split('<section id="people">')[1].split("</section>")[0]
    first = section.split("<p>")[1]
    assert first.startswith("People are alike if they have like ") and "relationship (tells sex" in first
    assert "Worst-treated pairs" in section
    pairs = run.of("plain")[0].people("test")["worst_pairs"]
    assert len(pairs) == 10 and all(pair["source_row"] >= 0 for pair in pairs)


def test_audit_of_finished_runs_uses_what_was_kept(folder, tmp_path):
    found = people_again([folder])
    kept = read_run(folder).frame("consistency")
    keys = ["method", "task", "metric"]
    both = found.frame.merge(kept, on=keys, suffixes=("", "_kept"))
    both = both[both["value"].notna()]
    assert len(both) > 60 and (both["value"] - both["value_kept"]).abs().max() < 1e-12
    result = CliRunner().invoke(app, ["audit", str(folder), "--out", str(tmp_path / "audit.json")])
    assert result.exit_code == 0, result.output
    assert "People are alike if they have like" in result.output and "Are like people treated alike?" in result.output
    assert json.loads((tmp_path / "audit.json").read_text())["people"]["rows"]


def test_an_older_run_is_audited_from_the_recipes_data_or_says_why_not(folder, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    for part in ("val", "test"):
        (old / f"near_pairs_{part}.npz").unlink()
    for file in old.glob("*/seed0/metrics.json"):
        content = json.loads(file.read_text())
        del content["consistency"]
        file.write_text(json.dumps(content))
    run = read_run(old)
    assert run.frame("consistency").empty and tables.consistency_sheet(run) is None
    assert "No audit of people was recorded" in write_report(old, interactive=False).read_text()
    found, before = people_again([old]), people_again([folder])
    assert list(found.said.values()) == list(before.said.values())
    pick = {"task": "macro", "metric": "inconsistency"}
    for again, first in ((found.frame, before.frame),):
        values = [f[(f[list(pick)] == list(pick.values())).all(axis=1)]["value"].tolist() for f in (again, first)]
        assert values[0] == pytest.approx(values[1], abs=1e-12)
    text = (old / "recipe.yaml").read_text().replace("subset: 1200", "subset: 1000")
    (old / "recipe.yaml").write_text(text)
    assert "the data have changed since" in next(iter(people_again([old]).said.values()))


def tampered(folder: Path, to: Path, change) -> Path:
    """Copy a run and change the outputs of its plain model on both parts."""
    shutil.copytree(folder, to)
    for part in ("val", "test"):
        path = to / f"plain/seed0/predictions_{part}.parquet"
        held = Predictions.load(path)
        outputs = {name: change(output) for name, output in held.outputs.items()}
        scores = {task.name: task.score(outputs[task.name]) for task in held.tasks}
        Predictions(held.tasks, scores, outputs, held.labels, held.groups, held.group_names).save(path)
    return to


def test_constant_predictions_put_in_place_later_are_undefined(folder, tmp_path):
    made = tampered(folder, tmp_path / "constant", torch.zeros_like)
    run = read_run(made)
    assert set(run.of("plain")[0].people("test")["undefined"]) == {"income", "college", "hours"}
    assert "income of plain, seed 0 (one distinct score)" in tables.consistency_sheet(run).note
    shown = summary_values(run)
    assert not ((shown["method"] == "plain") & shown["column"].isin(["inconsistency", "flip gap"])).any()
    assert write_report(made, interactive=False).exists()


def test_shrunk_predictions_are_no_more_consistent(folder, tmp_path):
    made = tampered(folder, tmp_path / "shrunk", lambda output: output / 8)
    before, after = values(folder, "plain"), values(made, "plain")
    assert after["inconsistency"] == pytest.approx(before["inconsistency"], abs=1e-3)
    assert "flip" in after and math.isnan(after["flip"])  # it needs the model
    assert write_report(made, interactive=False).exists()


def test_damaged_content_is_an_error_of_ours(folder, tmp_path):
    from libmtl_fair.errors import CheckpointError

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "plain/seed0/metrics.json"
    content = json.loads(file.read_text())
    content["consistency"]["test"] = {"rows": [1, 2]}
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"consistency\.test"):
        read_run(broken).frame("consistency")


def test_a_trainer_audits_people(recipe_file):
    recipe = load_recipe(recipe_file)
    data = make_dataset(recipe, 0)
    trainer = make_trainer(recipe, "plain", data, data.tasks, 0, device="cpu")
    sources = loaders(data, 128, 0, torch.device("cpu"))
    features = data.reference.features(data.test.x.double()).numpy()
    found = trainer.audit(sources["test"], people=features, validation=sources["val"])
    assert set(found.split["attribute"]) == {"sex", "race"} and 0 < found.inconsistency < 1.5
    assert set(found.per_task["task"]) == {"income", "college", "hours"}
    report = trainer.audit(sources["test"], 0.275, people=ConsistencyAudit(features))
    assert report.bias >= 0 and report.people.inconsistency > 0
    assert trainer.audit(sources["test"], 0.275).people is None
    with pytest.raises(DataError, match="delta, a tolerance, or people"):
        trainer.audit(sources["test"])


@pytest.mark.parametrize("stacked", [0, 2])
def test_tune_knows_both_objectives(recipe_file, stacked):
    recipe = load_recipe(recipe_file, ["methods={plain: {weighting: EW}, relif: {weighting: ReLiF}}"])
    study = tune(recipe, 3, objectives=("macro_auc", "inconsistency", "flip_gap"), stacked=stacked)
    for trial in study.trials:
        auc, inconsistency, flip = trial.values
        assert 0 < inconsistency < 1.5 and 0 < flip < 2 and 0 < auc < 1


def test_flip_gap_needs_a_sensitive_attribute():
    from libmtl_fair.tune.objectives import parse_measure

    with pytest.raises(RecipeError, match="no sensitive attribute"):
        parse_measure("flip_gap", {"income": "binary"}, [], ["0.275"])
    measure = parse_measure("inconsistency", {"income": "binary"}, [], ["0.275"])
    assert measure.fair and measure.direction == "minimize"


def test_a_comparison_has_both_columns_and_its_page_the_reference(folder, tmp_path):
    found = compare([folder])
    cells = found.cells.set_index(["column", "method"])["mean"]
    assert cells["inconsistency", "plain"] == pytest.approx(values(folder, "plain")["inconsistency"])
    assert cells["flip gap", "unaware"] == 0 and ("flip gap", "offsets") not in cells
    assert "relationship (tells sex" in write_comparison(found, tmp_path)[0].read_text()
