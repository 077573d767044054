"""Methods that are made of others after training, and methods that never see the sensitive inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn.reductions import DemographicParity, EqualizedOdds, ExponentiatedGradient
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from libmtl_fair.data import load_table
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import fit_offsets, fit_thresholds
from libmtl_fair.metrics.post_models import STRENGTHS, worst_gap
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe import Recipe, load_recipe
from libmtl_fair.recipe.build import check, data_for, make_dataset
from libmtl_fair.recipe.run import Run, run_recipe
from libmtl_fair.report import read_run
from libmtl_fair.report.compare import compare
from libmtl_fair.tune.plan import Plan

OF_FAIRLEARN = "ignore::DeprecationWarning"
METHODS = {
    "plain": {"weighting": "EW"},
    "mixed": {"post": "blend", "of": ["plain", "blind"], "attribute": "sex"},
    "blind": {"weighting": "EW", "unaware": True},
    "lifted": {"post": "offsets", "attribute": "sex"},
    "some": {"post": "offsets", "attributes": ["sex"], "strength": 0.35},
    "reached": {"post": "offsets", "attribute": "sex", "target": 0.2},
    "cut": {"post": "thresholds", "attribute": "sex", "constraint": "demographic_parity"},
    "reduced": {"post": "exponentiated_gradient", "attribute": "sex", "max_iter": 4, "eps": 0.05},
}
DATA = {"name": "adult", "tasks": ["income", "long_hours"], "sensitive": ["sex"], "subset": 3000}


def recipe(methods=METHODS, **changes):
    return Recipe.from_dict(
        {
            "name": "posts",
            "data": DATA,
            "model": {"hidden": [8]},
            "train": {"epochs": 3, "batch_size": 64, "optimizer": {"optim": "adam", "lr": 0.01}},
            "seeds": [0, 1],
            "methods": methods,
            "metrics": {"n_bootstrap": 20},
            "output": {"report": False},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run_recipe(recipe(), tmp_path_factory.mktemp("runs") / "posts", device="cpu")


@lru_cache
def _loaded(path):
    return Predictions.load(path)


def held(run: Path, method: str, part: str = "val", seed: int = 0) -> Predictions:
    return _loaded(run / method / f"seed{seed}" / f"predictions_{part}.parquet")


def about(run: Path, method: str, seed: int = 0) -> dict:
    return json.loads((run / method / f"seed{seed}" / "metrics.json").read_text())


def assert_same(a: Predictions, b: Predictions, atol: float = 1e-6) -> None:
    for task in a.outputs:
        assert torch.allclose(a.outputs[task].double(), b.outputs[task].double(), atol=atol)
        assert torch.allclose(a.scores[task].double(), b.scores[task].double(), atol=atol)


@pytest.mark.parametrize("part", ["val", "test"])
def test_post_methods_are_what_the_functions_make_of_the_reference(finished, part):
    for seed in (0, 1):
        val, given = held(finished, "plain", "val", seed), held(finished, "plain", part, seed)
        offsets, strength = fit_offsets(val, "sex"), about(finished, "lifted", seed)["post"]["strength"]
        assert_same(held(finished, "lifted", part, seed), offsets.apply(given, strength=strength))
        assert_same(held(finished, "some", part, seed), offsets.apply(given, strength=0.35))
        thresholds = fit_thresholds(val, "sex", "demographic_parity", seed=seed)
        assert_same(held(finished, "cut", part, seed), thresholds.apply(given))
        b = about(finished, "mixed", seed)["post"]["strength"]
        other = held(finished, "blind", part, seed)
        for task, z in held(finished, "mixed", part, seed).outputs.items():
            assert torch.allclose(z, (1 - b) * given.outputs[task] + b * other.outputs[task], atol=1e-6)


def test_strengths_are_chosen_on_validation(finished):
    val = held(finished, "plain")
    offsets = fit_offsets(val, "sex")
    gaps = [worst_gap(offsets.apply(val, strength=s), "sex") for s in STRENGTHS]
    post = about(finished, "lifted")["post"]
    assert [p["disparity"] for p in post["path"]] == pytest.approx(gaps)
    assert post["strength"] == STRENGTHS[int(np.argmin(gaps))]
    reached = about(finished, "reached")["post"]
    assert reached["strength"] == next((s for s, gap in zip(STRENGTHS, gaps) if gap <= 0.2), 1.0)
    assert about(finished, "lifted")["checkpoint"]["chosen_by"] == (
        f"strength {post['strength']:g}: least strength with the lowest equalized_odds difference on validation"
    )
    assert post["offsets"]["income"] == pytest.approx(offsets.offsets["income"])


@pytest.mark.filterwarnings(OF_FAIRLEARN)
def test_the_reduction_gives_fairlearns_own_expected_decisions(finished):
    data = make_dataset(recipe(), 0)
    sex = np.array(data.groups["sex"])
    for task in ("income", "long_hours"):
        theirs = ExponentiatedGradient(
            LogisticRegression(max_iter=1000), EqualizedOdds(difference_bound=0.05), eps=0.05, max_iter=4
        )
        x, y = data.train.x.double().numpy(), data.train.labels[task].numpy().astype(int)
        theirs.fit(x, y, sensitive_features=sex[data.train.groups["sex"].numpy()])
        wanted = theirs._pmf_predict(data.test.x.double().numpy())[:, 1]
        made = held(finished, "reduced", "test")
        found = made.task(task).probabilities(made.outputs[task]).numpy()
        assert found == pytest.approx(np.clip(wanted, 1e-6, 1 - 1e-6), abs=1e-9)
        assert about(finished, "reduced")["post"]["predictors"][task] == (theirs.weights_ > 0).sum()


@pytest.mark.filterwarnings(OF_FAIRLEARN)
def test_the_reduction_with_boosting_on_inputs_without_sex():
    methods = {
        "plain": {"weighting": "EW"},
        "reduced": {
            "post": "exponentiated_gradient", "attribute": "sex", "estimator": "boosting", "max_iter": 2,
            "constraint": "demographic_parity", "unaware": True,
        },
    }  # fmt: skip
    from libmtl_fair.recipe.post import make_post

    chosen = recipe(methods, seeds=[3])
    data = data_for(chosen, "reduced", make_dataset(chosen, 3))
    tasks = tuple(t for t in data.tasks)
    zero = {t.name: torch.zeros(len(data.val), 1) for t in tasks}
    val, test = (
        Predictions(tasks, {t.name: torch.zeros(len(s)) for t in tasks}, {n: z[: len(s)] for n, z in zero.items()},
                    s.labels, s.groups, s.group_names)
        for s in (data.val, data.test)
    )  # fmt: skip
    made, _ = make_post(chosen, "reduced", 3, data, {"plain": {"val": val, "test": test}})
    sex = np.array(data.groups["sex"])
    theirs = ExponentiatedGradient(
        HistGradientBoostingClassifier(random_state=3), DemographicParity(difference_bound=0.01), eps=0.01, max_iter=2
    )
    theirs.fit(
        data.train.x.double().numpy(),
        data.train.labels["income"].numpy().astype(int),
        sensitive_features=sex[data.train.groups["sex"].numpy()],
    )
    wanted = theirs._pmf_predict(data.val.x.double().numpy())[:, 1]
    found = torch.sigmoid(made["val"].outputs["income"][:, 0]).numpy()
    assert found == pytest.approx(np.clip(wanted, 1e-6, 1 - 1e-6), abs=1e-9)
    assert not any(name.startswith("sex=") for name in data.feature_names)


def test_an_unaware_model_does_not_see_the_sensitive_columns(finished, tmp_path):
    rng = np.random.default_rng(0)
    n = 400
    frame = pd.DataFrame(
        {
            "age": rng.normal(40, 10, n),
            "gap": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
            "sex": rng.choice(["f", "m"], n),
            "title": rng.choice(["Mr", "Ms"], n),
            "job": rng.choice(["a", "b", "c"], n),
            "y": rng.integers(0, 2, n),
        }
    )

    def outputs(frame, unaware):
        path = tmp_path / "t.csv"
        frame.to_csv(path, index=False)
        data = {
            "table": str(path), "tasks": {"y": {"kind": "binary"}},
            "sensitive": {"sex": {"column": "sex", "also_in": ["title"]}},
            "features": ["age", "gap", "sex", "title", "job"],
        }  # fmt: skip
        methods = {"plain": {"weighting": "EW"}, "one": {"weighting": "EW", "unaware": unaware}}
        chosen = recipe(methods, data=data, seeds=[0], audit={"delta": [0.2]})
        out = run_recipe(chosen, tmp_path / f"out{len(list(tmp_path.iterdir()))}", device="cpu")
        return held(out, "one", "test").outputs["y"]

    swapped = frame.assign(sex=frame["sex"].map({"f": "m", "m": "f"}), title=rng.permutation(frame["title"]))
    assert torch.equal(outputs(frame, True), outputs(swapped, True))
    assert not torch.equal(outputs(frame, False), outputs(swapped, False))


def test_data_without_sensitive_inputs_are_those_loaded_without_them():
    aware = make_dataset(recipe(), 0)
    whole = aware.unaware()
    assert torch.equal(whole.val.reference.features(whole.val.x), aware.val.reference.features(aware.val.x))
    loaded = make_dataset(recipe(data={**DATA, "sensitive_inputs": False}), 0)
    assert whole.feature_names == loaded.feature_names == whole.train.feature_names
    for part in ("train", "val", "test"):
        assert torch.equal(whole.splits()[part].x, loaded.splits()[part].x)
        assert torch.equal(whole.splits()[part].rows, loaded.splits()[part].rows)
    assert whole.tasks == loaded.tasks
    assert whole.encoder.to_dict() == loaded.encoder.to_dict()


def test_data_of_sensitive_columns_alone_cannot_be_unaware(tmp_path):
    frame = pd.DataFrame({"sex": ["f", "m"] * 50, "y": [0, 1, 1, 0] * 25})
    data = load_table(frame, tasks={"y": {"kind": "binary"}}, sensitive={"sex": {"column": "sex"}})
    with pytest.raises(DataError, match="every input shows a sensitive attribute"):
        data.unaware()


def test_post_methods_are_measured_like_any_other(finished):
    run = read_run(finished)
    assert run.methods == list(METHODS)
    groups = run.frame("groups")
    assert set(groups["method"]) == set(METHODS)
    cut = {r.seed: r.metrics for r in run.of("cut")}
    assert cut[0]["weighting"] == "post: thresholds"
    assert np.isnan(cut[0]["utility"]["test"]["income"]["auc"] or np.nan)
    assert cut[0]["audit"]["test"] == []
    assert not ((groups["method"] == "cut") & (groups["metric"] == "auc")).any()
    made = held(finished, "cut", "test")
    accuracy = ((torch.sigmoid(made.outputs["income"][:, 0]) > 0.5) == (made.labels["income"] > 0.5)).double().mean()
    assert cut[0]["utility"]["test"]["income"]["accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)
    found = compare([finished])
    assert set(found.drift["method"]) == {"plain", "blind"}
    assert set(found.cells["method"]) == set(METHODS)


def test_a_run_resumes_where_a_post_method_was_cut_off(finished, tmp_path):
    chosen = recipe()
    out = tmp_path / "again"
    trained: list[str] = []
    run = Run(chosen, out, device="cpu")
    real = run._one

    def stop(method, seed, folder, protocol):
        if method == "cut" and seed == 1:
            raise KeyboardInterrupt
        return real(method, seed, folder, protocol)

    run._one = stop
    with pytest.raises(KeyboardInterrupt):
        run()
    Run(chosen, out, device="cpu", resume=True, note=trained.append)()
    assert trained == ["cut, seed 1", "reduced, seed 0", "reduced, seed 1"]
    for method in METHODS:
        for seed in (0, 1):
            assert_same(held(out, method, "test", seed), held(finished, method, "test", seed), 0.0)


def test_a_recipe_of_post_methods_survives_writing(tmp_path):
    chosen = recipe()
    (tmp_path / "r.yaml").write_text(chosen.to_yaml())
    again = load_recipe(tmp_path / "r.yaml")
    assert again.to_dict() == chosen.to_dict()
    assert again.fingerprint() == chosen.fingerprint()
    assert "weighting: 'post" not in chosen.to_yaml()
    check(again)


TEXT = """\
name: wrong
data: {name: adult, tasks: [income], sensitive: [sex]}
methods:
  plain: {weighting: EW}
  blind: {weighting: EW, unaware: true}
  other:
    %s
"""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("post: offset", r":7: methods.other.post: .*offsets"),
        ("{post: offsets, strenght: 0.5}", r"methods.other.strenght: .*did you mean 'strength'"),
        ("{post: offsets, strength: 2}", r"methods.other.strength: .*strength must be"),
        ("{post: offsets, strength: 0.5, target: 0.1}", r"methods.other.target: .*exclude each other"),
        ("{post: offsets, constraint: equalised}", r"methods.other.constraint: .*equalized_odds"),
        ("{post: offsets, of: blend}", r"methods.other.of: .*trained method 'blend'"),
        ("{post: offsets, of: other}", r"methods.other.of: .*trained method 'other'"),
        ("{post: blend}", r"methods.other.post: post: blend is made of 2 methods, found \['plain'\]"),
        ("{post: offsets, of: [plain, blind]}", r"methods.other.of: post: offsets is made of 1 method, found"),
        ("{post: offsets, weighting: EW}", r"methods.other: expected either 'weighting' or 'post', found both"),
        (
            "{post: offsets, train: {epochs: 3}}",
            r"methods.other: post: offsets trains no network, so it takes no 'train'",
        ),
        ("{post: offsets, unaware: true}", r"takes no 'unaware'"),
        ("{weighting: EW, of: plain}", r"methods.other: 'of' names what a method is made of after training"),
        ("{post: exponentiated_gradient, estimator: tree}", r"methods.other.estimator: .*logistic"),
        ("{post: exponentiated_gradient, eps: 0}", r"methods.other.eps: .*eps must be"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, lines, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(TEXT % lines)
    with pytest.raises(RecipeError, match=message) as caught:
        check(load_recipe(path))
    assert str(caught.value).startswith(f"{path}:")


def test_the_reference_is_trained_and_predictions_are_kept(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "name: wrong\ndata: {name: adult, tasks: [income], sensitive: [sex]}\nmethods:\n"
        "  lifted: {post: offsets, of: plain}\n  plain: {weighting: EW}\n"
    )
    with pytest.raises(RecipeError, match=r":4: methods.lifted.post: the first method is the reference"):
        check(load_recipe(path))
    with pytest.raises(RecipeError, match="output.predictions: .*made of saved predictions"):
        check(recipe(output={"predictions": False}))


def test_attributes_and_tasks_are_checked_before_anything_is_trained(tmp_path):
    wrong = {"plain": {"weighting": "EW"}, "lifted": {"post": "offsets", "attributes": ["race"]}}
    with pytest.raises(RecipeError, match="methods.lifted.attributes: Offsets: unknown sensitive attribute 'race'"):
        Run(recipe(wrong), tmp_path / "a", device="cpu")()
    assert not (tmp_path / "a" / "plain").exists()
    data = {"name": "adult", "tasks": ["hours"], "sensitive": ["sex"], "subset": 400}
    with pytest.raises(RecipeError, match=r"methods.lifted.post: decides binary tasks"):
        Run(recipe({**wrong, "lifted": {"post": "offsets"}}, data=data), tmp_path / "b", device="cpu")()


def test_a_study_refuses_to_tune_what_is_made_of_finished_models():
    with pytest.raises(RecipeError, match=r"methods.lifted: this is made of finished models \(post: offsets\)"):
        Plan.make(recipe(tune={"methods": ["lifted"]}))
    plan = Plan.make(recipe({**METHODS, "relif": {"weighting": "ReLiF"}}, tune={"enqueue": ["blind"]}))
    assert list(plan.space) == ["blind"]
    with pytest.raises(RecipeError, match="lifted is made of finished models"):
        Plan.make(recipe(tune={"methods": ["blind"], "enqueue": ["lifted"]}))


def test_decisions_at_the_base_rate(tmp_path):
    methods = {"plain": {"weighting": "EW"}, "lifted": {"post": "offsets", "attribute": "sex"}}
    out = run_recipe(
        recipe(methods, metrics={"threshold": "base_rate", "n_bootstrap": 20}, seeds=[0]), tmp_path / "o", device="cpu"
    )
    before, after = (held(out, m) for m in ("plain", "lifted"))
    gaps = [worst_gap(p, "sex", thresholds="base_rate") for p in (before, after)]
    assert gaps[1] < gaps[0]
    assert replace(after, outputs={}).labels is after.labels


@pytest.mark.filterwarnings("ignore:FairMT.*was not met")
def test_offsets_take_what_a_constraint_left_over(tmp_path):
    """The least strength at which every constraint of the method holds within one standard error, or all of it."""
    fair = {"weighting": "FairMT", "constraint": "eo <= 0.01", "train": {"epochs": 2}}
    rest = {"post": "offsets", "of": ["fair"], "to_constraint": True}
    made_of = {"plain": METHODS["plain"], "fair": fair, "rest": rest}
    run = run_recipe(recipe(made_of, seeds=[0]), tmp_path / "run", device="cpu")
    for seed in (0,):
        val, post = held(run, "fair", seed=seed), about(run, "rest", seed)["post"]
        rows = [row for row in about(run, "fair", seed)["constraint"] if row["threshold"] == "half"]
        assert {row["task"] for row in rows} == {task.name for task in val.tasks if task.kind == "binary"}
        offsets = fit_offsets(val)
        over = []
        for s in STRENGTHS:
            made = offsets.apply(val, strength=s)
            gaps = [
                worst_gap(replace(made, tasks=(made.task(row["task"]),)), row["attribute"])
                / (row["tolerance"] + row["val_error"])
                for row in rows
            ]
            over.append(max(gaps))
        assert [point["disparity"] for point in post["path"]] == pytest.approx(over)
        assert post["strength"] == next((s for s, x in zip(STRENGTHS, over) if x <= 1), 1.0)
        assert "keeps the method's own constraints" in post["chosen_by"]
    other = recipe({"plain": METHODS["plain"], "rest": {**rest, "of": ["plain"]}}, seeds=[0])
    with pytest.raises(RecipeError, match="to_constraint: the method that it is made of was asked nothing"):
        run_recipe(other, tmp_path / "other", device="cpu")
    with pytest.raises(RecipeError, match="to_constraint chooses the strength"):
        check(recipe({"plain": METHODS["plain"], "rest": {"post": "offsets", "to_constraint": True, "target": 0.1}}))
