"""Any text is the name of a task, an attribute, a group: nothing breaks, no file or screen obeys it."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair.models import Heads

NAMES = [
    "hours.per.week",
    "type",
    "values",
    "forward",
    "to",
    "keys",
    "training",
    "_modules",
    "%2E",
    "a%b.c",
    "%type",
    "Ärzte / Std.",
    "x",
]


def test_heads_of_any_name():
    heads = Heads({name: nn.Linear(1, 1) for name in NAMES})
    assert list(heads) == list(heads.keys()) == NAMES and len(heads) == len(NAMES)
    assert all(heads[name] is head and name in heads for name, head in heads.items())
    assert len({name for name, _ in heads.named_parameters()}) == 2 * len(NAMES)
    again = Heads({name: nn.Linear(1, 1) for name in NAMES})
    again.load_state_dict(heads.state_dict())
    assert all(torch.equal(again[name].weight, heads[name].weight) for name in NAMES)
    taken = heads.pop("type")
    assert "type" not in heads and "absent" not in heads and 3 not in heads and isinstance(taken, nn.Linear)
    with pytest.raises(KeyError, match="absent"):
        heads["absent"]
    del heads["to"]
    assert list(heads) == [name for name in NAMES if name not in ("type", "to")]
    plain = nn.ModuleDict({"income": nn.Linear(1, 1)})
    assert list(Heads({"income": nn.Linear(1, 1)}).state_dict()) == list(
        plain.state_dict()
    )  # checkpoints stay readable


@pytest.mark.parametrize("architecture", ["HPS", "MMoE", "CGC", "DSelect_k", "FairBranch"])
def test_tasks_of_any_name_train_like_tasks_of_plain_names(architecture, tmp_path):
    arch_args = {
        "MMoE": {"num_experts": [2], "img_size": [4]},
        "DSelect_k": {"num_experts": [2], "img_size": [4], "kgamma": 1.0, "num_nonzeros": 2},
        "CGC": {"num_experts": [1] * 4, "img_size": [4]},
    }.get(architecture, {})

    def losses(names, **options):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 4, generator=generator)
        y = (torch.rand(64, 3, generator=generator) < 0.5).float()
        sex = torch.randint(0, 2, (64,), generator=generator)
        loader = lf.ResidentLoader(x, dict(zip(names, y.T)), {"values": sex}, batch_size=16, shuffle=True, seed=0)
        torch.manual_seed(0)
        heads = {name: nn.Linear(4, 1) for name in names}
        encoder = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))  # noqa: E731
        weighting = "FBGrad" if architecture == "FairBranch" else "FairMT"
        trainer = lf.FairTrainer(
            lf.task_dict([lf.Binary(name) for name in names]),
            weighting,
            architecture,
            encoder,
            heads,
            False,
            False,
            {"optim": "adam", "lr": 0.01},
            None,
            seed=0,
            progress=False,
            arch_args=arch_args,
            run_dir=tmp_path / names[0],
            **options,
        )
        trainer.train(loader, epochs=2, val_dataloaders=loader)
        frame = trainer.predict(loader).frame()
        assert {f"{name}/score" for name in names} <= set(frame)
        return trainer.history[[f"loss/{name}" for name in names]].to_numpy()

    odd = ["hours.per.week", "type", "forward"]
    np.testing.assert_allclose(losses(odd), losses(["a", "b", "c"]), rtol=1e-6)
    np.testing.assert_allclose(losses(odd, resume=True), losses(["a", "b", "c"]), rtol=1e-6)


ESC = "\x1b[2J\x1b]0;owned\x07"
ODD = ["hours.per.week", "=HYPERLINK('http://x')", f"clear{ESC}", "<script>alert(1)</script>", "a|b *c* `d`"]


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """A run of a table whose tasks, attribute and groups have the worst of names."""
    from libmtl_fair.recipe import Recipe
    from libmtl_fair.recipe.run import run_recipe

    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"u": rng.normal(size=600), "v": rng.normal(size=600)})
    frame["@sex"] = np.where(rng.random(600) < 0.5, f"=1+1{ESC}", "-woman\u202e")
    for name in ODD:
        frame[name] = (frame.u + rng.normal(size=600) > 0).astype(int)
    frame.to_csv(folder / "t.csv", index=False)
    recipe = {
        "name": "odd",
        "description": f"=odd{ESC}",
        "data": {
            "table": str(folder / "t.csv"),
            "tasks": {name: {"kind": "binary"} for name in ODD},
            "sensitive": {f"@sex{ESC}": {"column": "@sex"}},
        },
        "model": {"hidden": [4]},
        "train": {"epochs": 1, "batch_size": 128},
        "seeds": [0],
        "metrics": {"n_bootstrap": 20},
        "methods": {
            "plain": {"weighting": "EW"},
            "fair": {"weighting": "FairMT"},
            "branch": {"weighting": "FBGrad", "architecture": "FairBranch", "arch_args": {"keep_first": False}},
        },
    }
    run = run_recipe(Recipe.from_dict(recipe), folder / "run", note=lambda text: None)
    from libmtl_fair.report import write_card, write_report

    write_report(run)
    write_card(run)
    return run


def test_no_file_for_people_has_control_characters_or_markup_of_a_name(odd_run):
    read = [
        p
        for p in odd_run.rglob("*")
        if p.suffix in (".md", ".html", ".csv", ".svg", ".yaml", ".json", ".jsonl", ".txt")
    ]
    assert {"report.html", "fairness_card.md"} <= {p.name for p in read}
    for path in read:
        text = path.read_text()
        assert not {"\x1b", "\x07", "\u202e"} & set(text), path
        if path.suffix in (".md", ".html"):
            assert "<script>alert(1)" not in text, path
    assert r"clear\x1b[2J" in (odd_run / "fairness_card.md").read_text().replace("\\\\", "\\")


def test_no_cell_of_a_csv_file_is_a_formula(odd_run, tmp_path):
    import csv

    from typer.testing import CliRunner

    from libmtl_fair.cli import app

    rows = pd.read_csv(odd_run.parent / "t.csv").head(20)
    rows.to_parquet(tmp_path / "t.parquet")
    rows.to_csv(tmp_path / "t.csv", index=False)
    made = tmp_path / "made"
    made.mkdir()
    for source in ("t.csv", "t.parquet"):
        target = made / f"{source}.csv"
        done = CliRunner().invoke(
            app, ["predict", str(odd_run), str(tmp_path / source), "--out", str(target), "--method", "plain"]
        )
        assert done.exit_code == 0, done.output
        assert len(pd.read_csv(target)) == 20 and "\x1b" not in target.read_text()
    tables = [*odd_run.rglob("*.csv"), *made.iterdir()]
    assert len(tables) > 2
    for path in tables:
        for row in csv.reader(path.read_text().splitlines()):
            for cell in row:
                number = cell.lstrip("+-").replace(".", "", 1).replace("e-", "").isdigit()
                assert number or not cell.startswith(("=", "+", "-", "@")), (path, cell)


def test_a_run_with_odd_names_is_loaded_and_reported_on_screen(odd_run, capsys):
    import sys
    from unittest import mock

    from libmtl_fair.cli import main

    with mock.patch.object(sys, "argv", ["libmtl-fair", "report", str(odd_run)]), pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code in (0, None), said.err
    assert not {"\x1b", "\x07", "\u202e"} & set(said.out + said.err)
    predictor = lf.load(odd_run, method="plain")
    rows = pd.read_csv(odd_run.parent / "t.csv").head(5)
    assert set(ODD) <= set(predictor.predict(rows).columns)
