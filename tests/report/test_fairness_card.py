from __future__ import annotations

import itertools
import json

import pytest

from libmtl_fair.errors import CheckpointError
from libmtl_fair.report import read_run, summary, write_card


def test_card_says_everything_twice(run_dir):
    markdown, data = write_card(run_dir)
    assert (markdown.name, data.name) == ("fairness_card.md", "fairness_card.json")
    card = json.loads(data.read_text(), parse_constant=pytest.fail)
    assert card["format"] == 1
    assert card["methods"][1]["settings"] == {"target": 0.1, "eta": 0.02}
    assert card["methods"][1]["checkpoints"]["2"]["epoch"] == 7
    assert card["data"]["groups"]["race"]["groups"]["Black"]["rows"] == 500
    assert len(card["checklist"]) == 11
    expected = summary(read_run(run_dir))
    assert len(card["results"]["summary"]) == len(expected)
    first = card["results"]["summary"][0]
    assert first["mean"] == pytest.approx(expected.iloc[0]["mean"], abs=1e-15)
    assert first["difference"] is None
    interval = card["results"]["groups"][0]
    assert interval["low"] < interval["value"] < interval["high"]
    assert card["limits"]
    text = markdown.read_text()
    for part in ("# Fairness card: demo run", "## Data", "## Methods", "## Audit protocol", "## Results", "## Limits"):
        assert part in text
    assert "| Black | 500 | 25.0% | 200 | 20.0% |" in text


def test_card_escapes_names(run_dir):
    text = write_card(run_dir)[0].read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_every_table_row_of_the_card_has_all_its_cells(builder):
    text = write_card(builder(tasks={"a|b": "binary", "c\nd": "binary"}, groups={"s": ["x|y", "*z*"]}).write())[
        0
    ].read_text()
    rows = [line.replace("\\|", "") for line in text.splitlines()]
    for above, line in itertools.pairwise(rows):
        if above.startswith("|") and line.startswith("|"):
            assert above.count("|") == line.count("|")


def test_card_of_a_sparse_run(builder):
    sparse = builder(cards=False, history=False, groups={}, shrinkage=False, seeds=[0], tasks={"hours": "regression"})
    markdown, data = write_card(sparse.write())
    assert json.loads(data.read_text())["data"] == {}
    assert "nan" not in markdown.read_text()
    assert "## Data" not in markdown.read_text()


def test_card_of_a_damaged_run(run_dir):
    (run_dir / "plain" / "seed0" / "metrics.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"plain.seed0.metrics\.json is damaged"):
        write_card(run_dir)
