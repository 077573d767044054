from __future__ import annotations

import json
import shutil

import pytest

from libmtl_fair.errors import CheckpointError
from libmtl_fair.files import seal_beside
from libmtl_fair.report import read_run
from libmtl_fair.report.compare import merged
from libmtl_fair.report.notes import notes


def test_a_run_is_read_in_the_recipes_order(run_dir):
    run = read_run(run_dir)
    assert run.name == "demo run"
    assert run.methods == ["plain", "relif", "fairmt"]
    assert run.reference == "plain"
    assert run.seeds == [0, 1, 2]
    assert run.split == "test"
    assert [item.seed for item in run.of("relif")] == [0, 1, 2]
    assert len(run.of("plain")[0].history()) == 600


def test_cards_history_and_test_split_are_optional(builder):
    run = read_run(builder(cards=False, history=False, splits=("val",)).write())
    assert (run.data_card, run.protocol, run.environment) == ({}, {}, {})
    assert run.of("plain")[0].history() is None
    assert run.split == "val"


def test_a_broken_folder_says_what_is_wrong(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is no run folder: no such directory.*libmtl-fair run"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"not a readable run folder: .*recipe\.yaml: no such file"):
        read_run(tmp_path / "empty")
    shutil.rmtree(run_dir / "relif" / "seed1")
    with pytest.raises(CheckpointError, match=r"is incomplete: missing relif/seed1/metrics\.json\..*--resume"):
        read_run(run_dir)


def test_a_folder_without_results(builder):
    with pytest.raises(CheckpointError, match="holds no results"):
        read_run(builder(seeds=[]).write())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"method": "relif", "utility": {"test"', r"metrics\.json is damaged \("),
        ("[1]", r"metrics\.json is damaged: expected a mapping, found list"),
        ("{}", r"metrics\.json is damaged: it has no 'utility'"),
        ('{"utility": [1]}', r"damaged: expected a mapping under 'utility', found list"),
        ('{"utility": {"test": {"a": 3}}}', r"damaged: utility\.test is not what a run writes"),
        ('{"utility": {"test": {"a": {}}}, "audit": {"test": {}}}', r"damaged: audit\.test is not what"),
        ('{"utility": {"test": {"a": {}}}, "groups": {"test": [1]}}', r"damaged: groups\.test is not what"),
    ],
)
def test_damaged_metrics(run_dir, content, message):
    (run_dir / "relif" / "seed1" / "metrics.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"relif.seed1.*" + message):
        read_run(run_dir)


def test_damaged_cards_recipe_and_history(run_dir):
    history = run_dir / "plain" / "seed0" / "history.csv"
    history.write_text('a,b\n1,2\n1,2,3,4\n"')
    with pytest.raises(CheckpointError, match=r"history\.csv is damaged"):
        read_run(run_dir).of("plain")[0].history()
    history.write_text("")
    assert read_run(run_dir).of("plain")[0].history() is None
    (run_dir / "data_card.json").write_text('{"title": ')
    with pytest.raises(CheckpointError, match=r"data_card\.json is damaged"):
        read_run(run_dir)
    (run_dir / "recipe.yaml").write_text("- 1\n")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml is damaged: expected a mapping, found list"):
        read_run(run_dir)
    (run_dir / "recipe.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"not a readable run folder: .*recipe\.yaml:\d: not valid YAML"):
        read_run(run_dir)


def test_other_files_in_the_folder_do_not_disturb(run_dir):
    (run_dir / "plots" / "seedx").mkdir(parents=True)
    (run_dir / "plots" / "seedx" / "metrics.json").write_text("{")
    (run_dir / "notes.txt").write_text("x")
    assert read_run(run_dir).methods == ["plain", "relif", "fairmt"]
    metrics = json.loads((run_dir / "plain" / "seed0" / "metrics.json").read_text())
    assert metrics["seed"] == 0


def test_files_that_are_not_as_the_run_wrote_them_are_named(run_dir, caplog):
    files = [run_dir / "recipe.yaml", run_dir / "data_card.json", run_dir / "relif/seed1/history.csv"]
    for file in files:
        seal_beside(file)
    assert read_run(run_dir).edited == () and not caplog.text
    files[0].write_text(files[0].read_text().replace("demo run", "demo ran"))
    files[2].write_text(files[2].read_text().replace("1", "2", 1))
    run = read_run(run_dir)
    assert run.edited == ("recipe.yaml", "relif/seed1/history.csv")
    said = "Not as the run wrote them, edited or damaged: recipe.yaml, relif/seed1/history.csv."
    assert said in caplog.text and notes(run)[0].startswith(said)
    assert merged([run, read_run(run_dir)]).edited[0].endswith("/recipe.yaml")
