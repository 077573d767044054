"""A Hugging Face model card: front matter with ``model-index``, how to use the model, and the run's fairness card."""

from __future__ import annotations

from collections.abc import Iterator

from libmtl_fair.deploy.predictor import Predictor
from libmtl_fair.files import Json
from libmtl_fair.recipe.yaml_source import emit_yaml
from libmtl_fair.report import judged
from libmtl_fair.report.card import card_markdown
from libmtl_fair.report.run_folder import Row, RunFolder, number, read_run, rows

_KINDS = {"regression": "tabular-regression"}
_ON_IMAGES = {
    "segmentation": "image-segmentation",
    "depth": "depth-estimation",
    "normals": "image-to-image",
    "regression": "other",
}
_METRICS = {
    "accuracy": "accuracy",
    "auc": "roc_auc",
    "f1": "f1",
    "mae": "mae",
    "rmse": "rmse",
    "r2": "r_squared",
    "brier": "brier_score",
    "mIoU": "mean_iou",
    "pixAcc": "pixel_accuracy",
    "RMSE": "rmse",
    "abs_err": "mae",
    "mean": "mean_angle",
    "kappa": "linearly_weighted_kappa",
}
_LONGEST = 60
"""Tables of more rows stay in the run: a page about a model is read."""
_LOADED = {
    "onnx": """import json, numpy as np, onnxruntime, pandas as pd

about = json.load(open("preprocessing.json"))
session = onnxruntime.InferenceSession("model.onnx")
x = np.zeros((N, *about["input_shape"]), dtype=np.float32)  # see below
outputs = dict(zip(about["tasks"], session.run(list(about["tasks"]), {"x": x})))""",
    "torch-export": """import torch

model = torch.export.load("model.pt2").module()
outputs = model(x)  # task -> tensor; x as below""",
    "safetensors": """from safetensors import safe_open

with safe_open("model.safetensors", "pt") as file:  # weights; the metadata describe the model
    weights = {name: file.get_tensor(name) for name in file.keys()}""",
}


_FROM_COLUMNS = (
    "`x` is float32, one row a person, one column for each entry of `columns` in `preprocessing.json`, in that order: a number is "
    "(value - `minus`) / `divided_by`, with `if_missing` in place of a missing value; the others are 1 or 0: whether the input is "
    "missing, is the `value` (null: missing), or is among the `values`. A category that is in no column is 0 in all of them."
)
_FROM_FILES = (
    "`x` is float32, an example a row, of the shape `input_shape` in `preprocessing.json`: what `libmtl_fair.load_dataset({!r}, ...)` "
    "reads with the `root` and `args` of the run's recipe."
)


def _tag(kind: str, dims: int) -> str:
    """Return Hugging Face's name of a task, by its kind and the dimensions of an input that is read from a file (0: columns)."""
    if dims == 3:
        return _ON_IMAGES.get(kind, "image-classification")
    return "other" if dims else _KINDS.get(kind, "tabular-classification")


def model_card(predictor: Predictor, format: str) -> str:
    """Return the card of an exported model as Markdown with YAML front matter."""
    run = read_run(predictor.run_dir)
    shape = predictor.rows.read_shape
    tags = {task.name: _tag(task.kind, len(shape)) for task in predictor.tasks}
    kinds = set(tags.values())
    data = {
        "type": str(run.data_card.get("name") or run.name),
        "name": str(run.data_card.get("title") or run.name),
        "split": run.split,
    }
    front: Json = {
        "library_name": "libmtl_fair",
        "pipeline_tag": min(kinds),
        "tags": ["fairness", "multi-task-learning", "LibMTL", *sorted(kinds), format],
        "metrics": sorted(
            {entry["type"] for _, entry in _measured(predictor, run) if entry["type"] in _METRICS.values()}
        ),
        "model-index": [
            {
                "name": f"{run.name}: {predictor.method}",
                "results": [
                    {
                        "task": {"type": tags[task.name], "name": task.name},
                        "dataset": data,
                        "metrics": [entry for of, entry in _measured(predictor, run) if of == task.name],
                    }
                    for task in predictor.tasks
                ],
            }
        ],
    }
    cut = ", ".join(f"{task} above {bar}" for task, bar in predictor.thresholds.items())
    text = (
        f"# {run.name}: {predictor.method}\n\nMethod `{predictor.method}`, seed {predictor.seed}, of a run of libmtl_fair. It predicts "
        f"{', '.join(f'{task.name} ({task.kind})' for task in predictor.tasks)} from "
        f"{f'inputs that are read from files, {list(shape)}' if shape else ', '.join(predictor.inputs)}.\n\n"
        f"## How to use it\n\n```python\n{_LOADED[format]}\n```\n\n{_FROM_FILES.format(data['type']) if shape else _FROM_COLUMNS} "
        "Outputs are named as the tasks; `output` of each in `preprocessing.json` says what it is: the probability of a binary task, of "
        f"each class or label, a regression's value in native units{', one at every step or place' * bool(shape)}. "
        f"Decisions: {cut or 'the likeliest class'}.\n\n"
    )
    card = card_markdown(run, _LONGEST).replace("# Fairness card", "## Fairness card", 1)
    head, _, rest = card.partition("\n")
    return f"---\n{emit_yaml(front)}---\n\n{text}{head}\n" + rest.replace("\n## ", "\n### ").replace(
        "\n### ### ", "\n#### "
    )


def _measured(predictor: Predictor, run: RunFolder) -> Iterator[tuple[str, Json]]:
    """Yield (task, entry of the index) of what was measured of this method and seed: utility, then gaps of groups with enough people."""
    utility, gaps = (
        frame[(frame["method"] == predictor.method) & (frame["seed"] == predictor.seed) & frame["value"].notna()]
        for frame in (run.frame("utility"), judged.gaps(run))
    )
    for row in rows(utility[utility["metric"].isin(_METRICS)]):
        yield str(row.task), {"type": _METRICS[row.metric], "value": _number(row), "name": str(row.metric)}
    for row in rows(gaps[gaps["metric"].isin(judged.METRICS)]):
        name = f"{row.metric} difference by {row.attribute}, between groups of enough people"
        yield str(row.task), {"type": f"{row.metric}_difference", "value": _number(row), "name": name}


def _number(row: Row) -> float:
    return round(number(row.value), 6)
