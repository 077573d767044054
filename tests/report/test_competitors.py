"""Methods beside simple competitors, in run folders made so that the answer is known."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair import metrics
from libmtl_fair.metrics import GroupMetrics, thresholds_in_use
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.yaml_source import emit_yaml
from libmtl_fair.report import competitors, read_run
from libmtl_fair.report.compare import compare
from libmtl_fair.report.competitors import Bench, competitor_sheet, dominated, families, verdicts
from libmtl_fair.report.findings import findings
from libmtl_fair.report.page import render, render_comparison

N = 4000
TASKS = (lf.Binary("a"), lf.Binary("b"), lf.Regression("r"))
NAMES = {"sex": ["Female", "Male"]}
Made = dict[str, dict[str, Predictions]]


def people(seed: int) -> dict[str, dict[str, Tensor]]:
    """What is known of the people of both parts: merit, group, labels."""
    found = {}
    for k, part in enumerate(("val", "test")):
        g = torch.Generator().manual_seed(10 * seed + k)
        merit, sex = torch.randn(N, 2, generator=g), torch.randint(0, 2, (N,), generator=g)
        labels = (merit + 0.5 * torch.randn(N, 2, generator=g) > 0.3).float()
        found[part] = {"merit": merit, "sex": sex, "labels": labels, "noise": torch.randn(N, 2, generator=g)}
        found[part]["odd"] = torch.tensor(seed % 2)
    return found


def predicted(known: Mapping[str, Tensor], bias: float, noise: float) -> Predictions:
    z = 3 * (known["merit"] - 0.3 + bias * (known["sex"][:, None] - 0.5) + noise * known["noise"])
    outputs = {"a": z[:, :1], "b": z[:, 1:], "r": known["merit"][:, :1]}
    labels = {"a": known["labels"][:, 0], "b": known["labels"][:, 1], "r": known["merit"][:, 0]}
    scores = {t.name: t.score(outputs[t.name]) for t in TASKS}
    return Predictions(TASKS, scores, outputs, labels, {"sex": known["sex"]}, NAMES)


MODELS: dict[str, Callable[[Mapping[str, Tensor]], Predictions]] = {
    "plain": lambda p: predicted(p, 0.8, 0.5),
    "worse": lambda p: predicted(p, 0.8, 1.0),
    "better": lambda p: predicted(p, 0.0, 0.1),
    "alike": lambda p: predicted(p, 0.4 * int(p["odd"]), 0.2 + 0.5 * int(p["odd"])),  # now better, now worse
}


def write(
    root: Path, seeds: int = 4, threshold: float | str = 0.5, models: Mapping[str, object] = MODELS, **settings: object
) -> Path:
    """Write a run folder of predictions, measured as a run measures them."""
    methods = {name: {"weighting": "EW" if name in ("plain", "blind") else "UW"} for name in models}
    chosen = {"metrics": {"threshold": threshold}, "seeds": list(range(seeds)), "methods": methods}
    root.mkdir(parents=True)
    (root / "recipe.yaml").write_text(emit_yaml({"name": "made", "data": {"name": "adult"}, **chosen}))
    for seed in range(seeds):
        known = people(seed)
        for name, model in models.items():
            folder, parts = root / name / f"seed{seed}", {part: model(known[part]) for part in known}
            folder.mkdir(parents=True)
            cut = thresholds_in_use(parts["val"], threshold)
            found: dict[str, dict[str, object]] = {"utility": {}, "groups": {}}
            for part, p in parts.items():
                p.save(folder / f"predictions_{part}.parquet")
                found["utility"][part] = metrics.utility(p, cut)
                table = GroupMetrics(list(TASKS), {"sex": 2}, threshold=cut, group_names=NAMES, n_bootstrap=0)
                rows = table.update(p.outputs, p.labels, p.groups).compute().to_dict("records")
                found["groups"][part] = rows
            about = {
                "method": name,
                "seed": seed,
                "weighting": methods[name]["weighting"],
                "settings": settings.get(name, {}),
            }
            (folder / "metrics.json").write_text(json.dumps({**about, **found}))
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("competitors") / "run")


def test_a_dominated_a_better_and_an_undecided_method(made: Path) -> None:
    found = dominated(read_run(made)).set_index(["method", "competitor", "at", "utility"]).sort_index()
    for at in ("equal disparity", "equal utility"):
        for utility in ("accuracy", "macro AUC"):
            row = found.loc[("worse", "offsets (sex)", at, utility)]
            assert row["dominated"]
            assert row["verdict"] == "dominated"
            assert row["d_utility_high"] < 0
        assert found.loc[("worse", "thresholds (sex)", at, "accuracy"), "dominated"]
    assert ("worse", "thresholds (sex)", "equal disparity", "macro AUC") not in found.index
    assert set(found.loc["better", "verdict"]) == {"ahead"}
    alike = found.loc[("alike", "thresholds (sex)")]
    assert set(alike["verdict"]) == {"not distinguishable"}
    assert not alike["dominated"].any()
    assert set(found["measure"]) == {"EO sex"}
    assert set(found["seeds"]) == {4}


def test_the_sentences_say_it(made: Path) -> None:
    worse, better, alike = verdicts(read_run(made))
    assert worse.startswith(
        "worse is dominated in equalised odds by sex, by offsets (sex), which needs no training of its own: accuracy +"
    )
    assert better.startswith(
        "better: no simple competitor is shown to dominate it in equalised odds by sex; it is ahead of offsets (sex)"
    )
    assert alike.startswith("alike: no simple competitor is shown to dominate it in equalised odds by sex")
    assert alike.endswith("not distinguishable from offsets (sex), thresholds (sex).")


def test_differences_are_those_of_the_competitors_point_picked_on_validation(made: Path) -> None:
    """Recomputed with loops: the least strength whose validation gap is at most the method's."""
    run = read_run(made)
    row = (
        dominated(run).query("method == 'worse' and competitor == 'offsets (sex)' and at == 'equal disparity'").iloc[0]
    )
    assert row["utility"] == "accuracy"
    changes = []
    for seed in range(4):
        held = {
            (m, p): Predictions.load(made / m / f"seed{seed}" / f"predictions_{p}.parquet")
            for m in MODELS
            for p in ("val", "test")
        }

        def gap(p: Predictions) -> float:
            found = []
            for task in ("a", "b"):
                yes, y = (p.outputs[task][:, 0] > 0).numpy(), p.labels[task].numpy()
                rate = [[yes[(p.groups["sex"].numpy() == g) & (y == c)].mean() for g in (0, 1)] for c in (0, 1)]
                found += [abs(a - b) for a, b in rate]
            return max(found)

        def accuracy(p: Predictions) -> float:
            return float(
                np.mean([((p.outputs[t][:, 0] > 0).float() == p.labels[t]).double().mean() for t in ("a", "b")])
            )

        offsets = metrics.fit_offsets(held["plain", "val"], "sex")
        strengths = [i / 20 for i in range(21)]
        gaps = [gap(offsets.apply(held["plain", "val"], strength=s)) for s in strengths]
        taken = next((s for s, g in zip(strengths, gaps) if g <= gap(held["worse", "val"])), 1.0)
        competitor = offsets.apply(held["plain", "test"], strength=taken)
        changes.append(
            (accuracy(held["worse", "test"]) - accuracy(competitor), gap(held["worse", "test"]) - gap(competitor))
        )
    assert row["d_utility"] == pytest.approx(np.mean(changes, axis=0)[0], abs=1e-9)
    assert row["d_disparity"] == pytest.approx(np.mean(changes, axis=0)[1], abs=1e-9)


@pytest.mark.parametrize("threshold", [0.5, 0.3, "base_rate"])
def test_at_strength_0_a_competitor_is_the_reference(tmp_path: Path, threshold: float | str) -> None:
    run = read_run(write(tmp_path / "run", 1, threshold))
    for part in ("val", "test"):
        own = competitors._measured(run, part)["plain", 0]
        for family in families(run):
            found = Bench(run, 0).values(family, 0.0, part)
            same = set(own) - ({"macro AUC"} if "thresholds" in family.name else set())
            assert {name: found[name] for name in same} == pytest.approx({name: own[name] for name in same}, abs=1e-6)


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", 1))
    assert not dominated(run)["dominated"].any()
    assert verdicts(run) == [
        "With one seed nothing can be said of simple competitors: their differences have no interval."
    ]


def test_runs_without_predictions_say_so(tmp_path: Path) -> None:
    root = write(tmp_path / "run", 2)
    for file in root.glob("plain/*/predictions_val.parquet"):
        file.unlink()
    run = read_run(root)
    assert dominated(run).empty
    assert verdicts(run) == ["Simple competitors were not made: plain has no saved predictions (output.predictions)."]
    assert "not made" in render(run, interactive=False)


def test_an_unaware_method_is_a_competitor_and_is_blended(tmp_path: Path) -> None:
    models = {**MODELS, "blind": lambda p: predicted(p, 0.0, 0.55)}
    run = read_run(write(tmp_path / "run", 3, models=models, blind={"unaware": True}))
    found = dominated(run)
    assert "blind" not in set(found["method"])
    assert set(found["competitor"]) == {"offsets (sex)", "thresholds (sex)", "blend with blind", "blind"}
    as_it_is = found[found["competitor"] == "blind"]
    assert set(as_it_is["at"]) == {"as it is"}
    assert as_it_is.query("method == 'worse'")["dominated"].all()


def test_a_competitor_that_passes_everybody_dominates_nothing(tmp_path: Path) -> None:
    def plain(p: Mapping[str, Tensor]) -> Predictions:
        made = predicted(p, 0.0, 0.0)
        z = torch.where(p["sex"] == 1, 9.0, -1.0)[:, None]
        return dataclasses.replace(made, outputs={**made.outputs, "a": z, "b": z})

    def reverse(p: Mapping[str, Tensor]) -> Predictions:
        made = predicted(p, 0.0, 0.5)
        return dataclasses.replace(made, outputs={**made.outputs, "a": -made.outputs["a"], "b": -made.outputs["b"]})

    run = read_run(write(tmp_path / "run", 3, models={"plain": plain, "reverse": reverse}))
    full = Bench(run, 0).values(families(run)[0], 1.0, "test")
    assert full["degenerate"] == 1.0
    row = (
        dominated(run)
        .query("competitor == 'offsets (sex)' and at == 'equal disparity' and utility == 'accuracy'")
        .iloc[0]
    )
    assert row["strength"] == 1
    assert row["d_utility_high"] < 0 < row["d_disparity_low"]
    assert not row["dominated"]


def test_what_was_computed_is_kept_until_the_predictions_change(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(made, tmp_path / "run")
    first = dominated(read_run(root))
    assert sorted(file.name for file in (root / "competitors").iterdir()) == [f"seed{i}.json" for i in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_computed", lambda *_: pytest.fail("computed again"))
        assert dominated(read_run(root)).equals(first)
    shutil.copy(
        root / "alike" / "seed0" / "predictions_test.parquet", root / "plain" / "seed0" / "predictions_test.parquet"
    )
    assert not dominated(read_run(root)).equals(first)
    (root / "competitors" / "seed1.json").write_text("{")
    (root / "competitors" / "seed2.json").write_text('["x"]')
    assert len(dominated(read_run(root))) == len(first)


def test_compare_and_report_show_it(made: Path) -> None:
    run = read_run(made)
    sheet = competitor_sheet(run)
    assert sheet is not None
    assert sheet.title == "Beside simple competitors"
    assert len(sheet.body) == len(dominated(run))
    assert all(len(line) == len(sheet.heads) for line in sheet.body)
    for page in (render(run, interactive=False), render_comparison(compare([made]))):
        assert "Beside simple competitors" in page
        assert "worse is dominated in equalised odds by sex" in page
    assert dict(findings(run))["How far to trust it"].startswith("worse is beaten by what is simpler (")
    both = compare([made, shutil.copytree(made, made.parent / "copy")])
    assert "copy/worse" in set(dominated(both.run)["method"]) or "copy/worse" in " ".join(verdicts(both.run))


def test_a_run_of_the_reference_alone_has_no_competitors(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", 2, models={"plain": MODELS["plain"]}))
    assert dominated(run).empty
    assert verdicts(run) == []
    assert competitor_sheet(run) is None


def test_a_blend_is_beside_methods_in_inconsistency(tmp_path: Path) -> None:
    from libmtl_fair.recipe import Recipe
    from libmtl_fair.recipe.run import run_recipe

    recipe = {
        "name": "people",
        "data": {"name": "adult", "tasks": ["income", "occupation"], "sensitive": ["sex"], "subset": 900},
        "model": {"hidden": [8]},
        "train": {"epochs": 2, "batch_size": 64},
        "seeds": [0, 1],
        "methods": {
            "plain": {"weighting": "EW"},
            "blind": {"weighting": "EW", "unaware": True},
            "other": {"weighting": "UW"},
        },
        "metrics": {"n_bootstrap": 20},
        "output": {"report": False},
    }
    run = read_run(run_recipe(Recipe.from_dict(recipe), tmp_path / "run", device="cpu"))
    blend = next(family for family in families(run) if "blend" in family.name)
    for part in ("val", "test"):
        own = competitors._measured(run, part)
        for method, strength in (("plain", 0.0), ("blind", 1.0)):
            found = Bench(run, 1).values(blend, strength, part)
            assert found["inconsistency"] == pytest.approx(own[method, 1]["inconsistency"], abs=1e-4)
    beside = dominated(run).query("measure == 'inconsistency'")
    assert set(beside["method"]) == {"other"}
    assert set(beside["competitor"]) == {"blend with blind", "blind"}
