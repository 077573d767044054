"""Exported models give our numbers, named as the tasks, from what is shipped beside them alone; the card is a model card."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.data.sources import write_example
from libmtl_fair.deploy import export
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.methods.heads.auxiliary import drop_fairness_heads
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.build import make_dataset
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.recipe.schema import load_recipe

TASKS = ("rich", "colour", "pay", "hobbies")


@pytest.fixture
def rows(frame):
    """Rows with gaps and with a category that training did not have."""
    return frame.assign(job=np.where(frame.index % 9 == 0, "astronaut", frame["job"])).head(90)


def encoded(about: dict, rows: pd.DataFrame) -> np.ndarray:
    """What preprocessing.json says, by pandas alone."""
    made = []
    for column in about["columns"]:
        values = rows[column["input"]]
        match column["is"]:
            case "number":
                made.append((values.fillna(column["if_missing"]) - column["minus"]) / column["divided_by"])
            case "missing":
                made.append(values.isna())
            case "value":
                made.append(values.isna() if column["value"] is None else values == column["value"])
            case _:
                made.append(values.isin(column["values"]))
    return np.column_stack(made).astype(np.float32)


def assert_ours(predictor, rows, outputs) -> None:
    with warnings.catch_warnings(action="ignore"):
        proba, found = predictor.predict_proba(rows), predictor.predict(rows)
    assert outputs["rich"] == pytest.approx(proba["rich"][1].to_numpy(), abs=1e-5)
    assert outputs["colour"] == pytest.approx(proba["colour"].to_numpy(), abs=1e-5)
    assert outputs["hobbies"] == pytest.approx(proba["hobbies"].to_numpy(), abs=1e-5)
    assert outputs["pay"] == pytest.approx(found["pay"].to_numpy(), rel=1e-5)


@pytest.mark.parametrize("method", ["plain", "branched"])
def test_onnxruntime_gives_our_numbers(run, rows, tmp_path, method):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, beside, card = export(run, "onnx", tmp_path, method=method)
    assert [path.name for path in (model, beside, card)] == ["model.onnx", "preprocessing.json", "README.md"]
    about, predictor = json.loads(beside.read_text()), lf.load(run, method)
    session = onnxruntime.InferenceSession(model)
    assert [each.name for each in session.get_inputs()] == ["x"]
    assert tuple(each.name for each in session.get_outputs()) == TASKS
    assert json.loads(session.get_modelmeta().custom_metadata_map["libmtl_fair"]) == about
    x = encoded(about, rows)
    with warnings.catch_warnings(action="ignore"):
        assert x == pytest.approx(predictor.rows.encode(rows).numpy(), abs=1e-6)
    for part in (rows, rows[:1]):
        outputs = dict(zip(TASKS, session.run(list(TASKS), {"x": encoded(about, part)})))
        assert_ours(predictor, part, outputs)
    decided = session.run(["rich"], {"x": x})[0] > about["tasks"]["rich"]["threshold"]
    with warnings.catch_warnings(action="ignore"):
        assert decided.astype(int).tolist() == predictor.predict(rows)["rich"].tolist()
    likeliest = session.run(["colour"], {"x": x})[0].argmax(1)
    assert [about["tasks"]["colour"]["classes"][i] for i in likeliest] == predictor.decide(rows)["colour"].tolist()


def test_torch_export_gives_our_numbers(run, rows, tmp_path):
    model, beside, _ = export(run, "torch-export", tmp_path, method="glf")
    with warnings.catch_warnings(action="ignore"):
        held = {"preprocessing.json": ""}
        program = torch.export.load(model, extra_files=held)
    assert held["preprocessing.json"] == json.dumps(json.loads(beside.read_text()))
    outputs = program.module()(torch.from_numpy(encoded(json.loads(beside.read_text()), rows)))
    assert tuple(outputs) == TASKS
    assert_ours(lf.load(run, "glf"), rows, {name: value.numpy() for name, value in outputs.items()})


def test_safetensors_hold_the_model_in_use(run, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    model, beside, _ = export(run, "safetensors", tmp_path, method="branched")
    ours = drop_fairness_heads(lf.load(run, "branched").source.trainers[0]).state_dict()
    with safetensors.safe_open(model, "pt") as file:
        about = json.loads(file.metadata()["libmtl_fair"])
        held = {name.removeprefix("0."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert held.keys() == ours.keys() and all(torch.equal(value, held[name]) for name, value in ours.items())
    assert about["model"]["hidden"] == [8, 8] and about["preprocessing"] == json.loads(beside.read_text())
    assert about["structure"]["tree"]


LIGHT = [
    "seeds=[0]",
    "train.epochs=1",
    "output.report=false",
    "metrics.n_bootstrap=0",
    "methods={plain: {weighting: EW}}",
]
SOURCES = Path(__file__).resolve().parents[2] / "recipes" / "sources"


def test_maps_come_out_as_large_as_the_image_and_as_people_read_them(tmp_path):
    """Metrics of the exported model's outputs are those that the run measured."""
    small = ["data.args={n: 20, size: [18, 26]}", "model.encoder_args.channels=[4, 4]", "train.batch_size=6"]
    recipe = load_recipe(SOURCES / "scenes.yaml", [*LIGHT, *small])
    run = run_recipe(recipe, tmp_path / "run", device="cpu")
    model, beside, card = export(run, "torch-export", tmp_path / "out", method="plain")
    about, data = json.loads(beside.read_text()), make_dataset(recipe, 0)
    (x, labels), *_ = data.test.loader(64, device="cpu")
    found = torch.export.load(model).module()(x)
    measured = json.loads((run / "plain" / "seed0" / "metrics.json").read_text())["utility"]["test"]
    assert about["input_shape"] == [3, 18, 26] and about["columns"] == []
    assert about["tasks"]["segmentation"]["output"].startswith("probability of each class at each place")
    torch.testing.assert_close(found["segmentation"].sum(1), torch.ones(len(x), 18, 26))
    torch.testing.assert_close(found["normal"].norm(dim=1), torch.ones(len(x), 18, 26))
    seen = labels["segmentation"] >= 0
    right = (found["segmentation"].argmax(1) == labels["segmentation"])[seen].float().mean()
    assert right == pytest.approx(measured["segmentation"]["pixAcc"], abs=1e-6)
    error = (found["depth"] - labels["depth"])[labels["depth"] != 0].square().mean().sqrt()
    assert error == pytest.approx(measured["depth"]["RMSE"], rel=1e-5)
    text = card.read_text()
    assert (
        "pipeline_tag: depth-estimation" in text and "type: mean_iou" in text and "read from files, [3, 18, 26]" in text
    )


def test_onnx_of_sequences(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    root = write_example("mimic3", tmp_path / "data", 30)
    tasks = "data.tasks=[in_hospital_mortality, decompensation, length_of_stay]"
    small = [f"data.root={root}", tasks, "data.args={hours: 10, los: classes}", "model.encoder_args={hidden: 4}"]
    recipe = load_recipe(SOURCES / "mimic3.yaml", [*LIGHT, *small])
    run = run_recipe(recipe, tmp_path / "run", device="cpu")
    model, beside, _ = export(run, "onnx", tmp_path / "out", method="plain")
    about, data = json.loads(beside.read_text()), make_dataset(recipe, 0)
    x, _ = next(iter(data.test.loader(64, device="cpu")))
    session = onnxruntime.InferenceSession(str(model))
    found = dict(zip(about["tasks"], map(torch.from_numpy, session.run(list(about["tasks"]), {"x": x.numpy()}))))
    held = Predictions.load(run / "plain" / "seed0" / "predictions_test.parquet")
    died, worse, left = held.tasks
    torch.testing.assert_close(found[died.name], died.probabilities(held.outputs[died.name]), atol=1e-5, rtol=0)
    assert torch.equal(found[worse.name].isnan(), ~F.valid_steps(x))
    torch.testing.assert_close(found[worse.name].nanmean(1), held.scores[worse.name], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[left.name].amax(-1).nanmean(1), held.scores[left.name], atol=1e-5, rtol=0)
    assert "NaN after the last" in about["tasks"][left.name]["output"]


def test_what_is_no_function_of_the_inputs_is_refused(run, tmp_path):
    with pytest.raises(
        HostError, match=r"'by_group' takes the groups of the rows.*export a trained method \(plain, branched"
    ):
        export(run, "onnx", tmp_path, method="by_group")
    with pytest.raises(HostError, match="'lifted' takes the groups"):
        export(run, "onnx", tmp_path, method="lifted")
    with pytest.raises(HostError, match="'mixed' is made after training"):
        export(run, "onnx", tmp_path, method="mixed")
    with pytest.raises(RecipeError, match="unknown format 'onix'; did you mean 'onnx'"):
        export(run, "onix", tmp_path, method="plain")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_error_names_it(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(HostError, match=r"onnx is not installed: pip install 'libmtl_fair\[export\]'"):
        export(run, "onnx", tmp_path, method="plain")


def test_the_card_is_a_model_card(run, tmp_path):
    card = export(run, "torch-export", tmp_path, method="plain")[2].read_text()
    _, front, text = card.split("---\n", 2)
    about = YAML(typ="safe").load(front)
    assert about["library_name"] == "libmtl_fair" and about["pipeline_tag"] == "tabular-classification"
    (model,) = about["model-index"]
    assert [result["task"]["name"] for result in model["results"]] == list(TASKS)
    measured = json.loads((run / "plain" / "seed0" / "metrics.json").read_text())
    rich = {entry["name"]: entry["value"] for entry in model["results"][0]["metrics"]}
    assert rich["auc"] == pytest.approx(measured["utility"]["test"]["rich"]["auc"], abs=1e-6)
    rows = [row for row in measured["groups"]["test"] if (row["task"], row["attribute"]) == ("rich", "sex")]
    rates = {(row["metric"], row["group"]): row["value"] for row in rows}
    assert any(row["flag"] for row in rows if row["group"] not in ("f", "m"))  # a group of a few people is in no gap
    gap = max(
        abs(rates[f"{name}_positive_rate", "f"] - rates[f"{name}_positive_rate", "m"]) for name in ("true", "false")
    )
    name = "equalized_odds difference by sex, between groups of enough people"
    assert rich[name] == pytest.approx(gap, abs=1e-6)
    assert "rows, in the run's report and fairness card." in text
    assert "## Fairness card: people" in text and "### Limits" in text and "\n## Limits" not in text
    hub = pytest.importorskip("huggingface_hub")
    results = hub.ModelCard(card).data.eval_results
    assert {result.task_name for result in results} == set(TASKS)
