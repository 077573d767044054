"""What large objects show of themselves: a summary, as text and in notebooks, and nothing that a name could make a reader obey."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from libmtl_fair import Binary, Predictions, Regression, load_dataset, load_table
from libmtl_fair.metrics import FixedDeltaAudit


def predictions(name: str = "sex") -> Predictions:
    outputs = {"a": torch.zeros(8, 1), "b": torch.arange(8.0)[:, None]}
    labels = {"a": torch.tensor([1.0, 0, 1, 0, float("nan"), 1, 0, 1]), "b": torch.zeros(8)}
    tasks = (Binary("a"), Regression("b"))
    scores = {task.name: task.score(outputs[task.name]) for task in tasks}
    groups = {name: torch.tensor([0, 0, 0, 1, 1, 1, -1, 0])}
    return Predictions(tasks, scores, outputs, labels, groups, {name: ["f", "m"]}, torch.zeros(8, 3), ("a",))


def test_a_data_set_shows_rows_tasks_and_groups():
    data = load_dataset("german", sensitive=["age"])
    assert repr(data).splitlines()[0] == "Dataset german: Statlog German Credit"
    assert "  rows: 600 train, 200 val, 200 test" in repr(data)
    assert "  task bad_credit: binary, 30.0% positive" in repr(data)
    assert "  groups of age: 25 and under 19%, over 25 81%" in repr(data)
    assert len(repr(data)) < 1500


def test_a_data_set_of_all_kinds_and_gaps():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=90), "sex": ["f", "m", None] * 30, "y": rng.normal(size=90)})
    frame["c"], frame["l1"], frame["l2"] = list("rst") * 30, [0, 1] * 45, [1, 0] * 45
    frame.loc[:9, "y"] = np.nan
    tasks = {
        "y": {"kind": "regression"},
        "c": {"kind": "multiclass"},
        "l": {"kind": "multilabel", "columns": ["l1", "l2"]},
    }
    text = repr(load_table(frame, tasks=tasks, sensitive=["sex"], features=["x"], stratify=False))
    assert "task y: regression, mean" in text and "10 rows without a label" in text
    assert "task c: multiclass, 3 classes" in text and "task l: multilabel, 2 labels" in text
    assert "groups of sex: f 50%, m 50%; 30 rows unknown" in text


def test_predictions_show_tasks_labels_and_groups():
    assert repr(predictions()).splitlines() == [
        "Predictions of 8 examples, 2 tasks",
        "  a: binary, 7 labelled, mean score 0.500; decisions alone",
        f"  b: regression, 8 labelled, mean score {predictions().scores['b'].mean():.3f}",
        "  groups of sex: f 57%, m 43%",
        "  embeddings: [8, 3]",
    ]


def test_an_audit_shows_its_numbers_and_the_worst_pairs():
    report = FixedDeltaAudit(0.1, exact=True).run(predictions().scores)
    first, *rest = repr(report).splitlines()
    assert first == "Fixed-delta audit, delta 0.1: 2 tasks, 1 pairs"
    assert rest[0] == f"  Bias: {report.bias:.4f}" and rest[2].startswith("  a and b: Bias ")
    each = FixedDeltaAudit(np.full((2, 2), 0.1), exact=True).run(predictions().scores)
    assert repr(each).startswith("Fixed-delta audit, delta of each pair: ")


def test_notebooks_get_a_table_in_which_names_are_text():
    shown = predictions("<script>\x1b[2J")._repr_html_()
    assert shown.startswith("<table>") and "<script>" not in shown and "&lt;script&gt;" in shown and "\x1b" not in shown
    assert "\x1b" not in repr(predictions("\x1b[2J"))
    assert load_dataset("german")._repr_html_().count("<tr>") == len(repr(load_dataset("german")).splitlines()) - 1
