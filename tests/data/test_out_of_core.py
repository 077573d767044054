"""A table read by row group gives what it gives in memory: the data, the training, the predictions; the cache follows its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

import libmtl_fair as lf
from libmtl_fair.data import cache, catalogue, out_of_core, parquet
from libmtl_fair.data.blocks import BlockLoader
from libmtl_fair.data.out_of_core import draws
from libmtl_fair.errors import DataError
from libmtl_fair.libmtl.losses import task_dict
from libmtl_fair.models import MLP, linear_heads

TASKS = {
    "high": {"kind": "binary", "positive": "yes"},
    "kind": {"kind": "multiclass", "column": "job"},
    "pay": {"kind": "regression", "transform": "log1p"},
    "old": {"kind": "binary", "expression": "age >= 50 and sex == 'f'"},
}
SENSITIVE = {
    "sex": "sex",
    "band": {"column": "age", "bins": [30, 50]},
    "both": {"of": ["sex", "band"]},
    "race": {"column": "race", "keep": 2},
}
HOW: dict[str, Any] = {
    "tasks": TASKS,
    "sensitive": SENSITIVE,
    "features": ["x", "gap", "town", "code", "flag", "day"],
    "split": "part",
}


def people(n: int = 3000) -> pd.DataFrame:
    """Return people with gaps, words for missing values, numbers as text, dates, and rare values at the end only."""
    draw = np.random.default_rng(0)
    age, x = draw.integers(18, 80, n), draw.normal(size=n)
    frame = pd.DataFrame(
        {
            "x": x,
            "gap": np.where(draw.random(n) < 0.1, np.nan, draw.gamma(2.0, 3.0, n)),
            "town": draw.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]),
            "code": draw.integers(0, 5, n).astype(str),
            "flag": draw.random(n) < 0.3,
            "day": pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.integers(0, 900, n), "D"),
            "age": age,
            "sex": draw.choice(["f", "m"], n),
            "race": draw.choice(["p", "q", "r"], n, p=[0.6, 0.3, 0.1]),
            "high": np.where(x + draw.normal(size=n) > 0, "yes", "no"),
            "job": draw.choice(["u", "v"], n),
            "pay": draw.gamma(2.0, 100.0, n),
            "part": draw.choice(["train", "val", "test"], n, p=[0.6, 0.2, 0.2]),
        }
    )
    frame.loc[n - 30 :, "town"], frame.loc[n - 30 :, "job"] = "rare", "w"
    frame.loc[::97, "code"], frame.loc[::89, "sex"], frame.loc[::83, "pay"] = "?", None, np.nan
    return frame


def written(path: Path, frame: pd.DataFrame, rows: int = 500) -> Path:
    frame.to_parquet(path, row_group_size=rows, index=False)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("table") / "people.parquet", people())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read 400 rows at a time."""
    monkeypatch.setattr(parquet.Parquet.raw, "__defaults__", (None, 400))
    monkeypatch.setattr(parquet.Parquet.parts, "__defaults__", (400,))


def same(one: lf.data.Dataset, two: lf.data.Dataset, tolerance: float) -> None:
    assert (one.feature_names, one.groups, [t.name for t in one.tasks]) == (
        two.feature_names,
        two.groups,
        [t.name for t in two.tasks],
    )
    for part, split in one.splits().items():
        other = two.splits()[part]
        torch.testing.assert_close(split.x, other.x, rtol=tolerance, atol=tolerance)
        assert torch.equal(split.rows, other.rows)
        for name, labels in split.labels.items():
            torch.testing.assert_close(labels, other.labels[name], rtol=tolerance, atol=tolerance, equal_nan=True)
        for name, ids in split.groups.items():
            assert torch.equal(ids, other.groups[name])
    a, b = one.card, two.card
    assert list(a) == list(b)
    for name in set(a) - {"title", "source", "notes", "tasks"}:
        assert a[name] == b[name], name
    for name, card in a["tasks"].items():
        one_card, two_card = (pd.json_normalize(each).T[0].to_dict() for each in (card, b["tasks"][name]))
        numbers = {key: value for key, value in one_card.items() if isinstance(value, float)}
        assert {key: two_card[key] for key in numbers} == pytest.approx(numbers)
        assert {k: v for k, v in one_card.items() if k not in numbers} == {
            k: v for k, v in two_card.items() if k not in numbers
        }


@pytest.mark.usefixtures("small_parts")
def test_the_data_are_those_of_the_table_in_memory(table: Path, tmp_path: Path) -> None:
    whole = lf.load_table(table, **HOW)
    parts = lf.load_table(table, out_of_core=True, cache=tmp_path, **HOW)
    same(whole, parts, 0)
    assert whole.tasks == parts.tasks
    assert whole.encoder == parts.encoder
    assert whole.reference == parts.reference
    assert parts.train.maps


@pytest.mark.usefixtures("small_parts")
def test_statistics_are_of_all_rows_where_the_sample_is_not(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lf.load_table(table, **HOW)
    monkeypatch.setattr(catalogue, "load_on_disk", lambda *args: out_of_core.load_on_disk(*args, sample=400))
    parts = lf.load_table(table, out_of_core=True, cache=tmp_path, **HOW)
    fill = dict(zip(["x", "gap", "code", "day"], zip(whole.encoder.fill, parts.encoder.fill)))
    assert fill["gap"][0] != fill["gap"][1]  # the median alone is the sample's
    seen = ~torch.tensor([bool(v) for v in whole.train.x[:, whole.feature_names.index("gap=(missing)")]])
    at = [i for i, name in enumerate(whole.feature_names) if not name.startswith("gap")]
    torch.testing.assert_close(whole.train.x[:, at], parts.train.x[:, at], rtol=1e-5, atol=1e-5)
    assert seen.any()
    for one, two in zip(whole.tasks, parts.tasks):
        if isinstance(one, lf.Regression):
            assert (one.mean, one.std) == pytest.approx((two.mean, two.std), rel=1e-12)
    assert {name: card["groups"] for name, card in whole.card["groups"].items()} == {
        name: card["groups"] for name, card in parts.card["groups"].items()
    }
    assert "are those of" in parts.card["notes"][0]


def trainer_of(data: lf.data.Dataset, weighting: str = "EW", **options: Any) -> lf.FairTrainer:
    torch.manual_seed(0)
    return lf.FairTrainer(
        task_dict(data.tasks), weighting, "HPS", lambda: MLP(data.n_features, (8,)), linear_heads(data.tasks, 8), False, False,
        {"optim": "adam", "lr": 1e-2}, None, device="cpu", progress=False, seed=0, select="last", **options,
    )  # fmt: skip


def test_training_and_predictions_are_those_of_the_table_in_memory(table: Path, tmp_path: Path) -> None:
    found = []
    for options in ({}, {"out_of_core": True, "cache": tmp_path}):
        data = lf.load_table(table, **HOW, **options)
        trainer = trainer_of(data)
        trainer.train(
            data.train.loader(64, shuffle=True, seed=3, device="cpu"), None, 2, data.val.loader(256, device="cpu")
        )
        found.append((trainer, trainer.predict(data.test.loader(256, device="cpu"))))
    (one, seen), (two, also) = found
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    for task, scores in seen.scores.items():
        assert torch.equal(scores, also.scores[task])
    assert one.epochs.drop(columns="train_s").equals(two.epochs.drop(columns="train_s"))
    assert seen.named_groups("both").tolist() == also.named_groups("both").tolist()


@pytest.mark.usefixtures("small_parts")
def test_without_the_sensitive_inputs_it_is_that_of_the_table_in_memory(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_PART", 100)
    how = {
        **HOW,
        "features": ["x", "sex", "town", "age", "code", "race"],
        "tasks": {n: TASKS[n] for n in ("high", "pay")},
    }
    whole, parts = lf.load_table(table, **how), lf.load_table(table, out_of_core=True, cache=tmp_path, **how)
    one, two = whole.unaware(), parts.unaware()
    same(one, two, 0)
    assert two.inputs == ("x", "town", "code") != parts.inputs
    assert all(split.maps and split.twins is None for split in two.splits().values())
    found = []
    for data in (one, two):
        trainer = trainer_of(data, "ReLiF")
        trainer.train(
            data.train.loader(64, shuffle=True, seed=3, device="cpu"), None, 1, data.val.loader(256, device="cpu")
        )
        found.append(trainer.model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name

    made = {path.name: (path / "cache.json").stat().st_ino for path in tmp_path.iterdir()}
    assert len(made) == 4  # the table, and the narrower inputs of three parts
    monkeypatch.setattr(cache, "_sound", set())
    assert torch.equal(parts.unaware().train.x, one.train.x)
    assert made == {path.name: (path / "cache.json").stat().st_ino for path in tmp_path.iterdir()}
    (narrow,) = tmp_path.glob("*.train.*")
    (narrow / "x").write_bytes(bytes(8))
    monkeypatch.setattr(cache, "_sound", set())
    assert torch.equal(parts.unaware().train.x, one.train.x)


class TestBlocks:
    def loader(self, n: int = 1000, **options: Any) -> BlockLoader:
        x = torch.arange(n, dtype=torch.float32)[:, None]
        ids = {"sex": torch.arange(n) % 2}
        settings: dict[str, Any] = {
            "batch_size": 30,
            "shuffle": True,
            "seed": 0,
            "device": "cpu",
            "block": 16,
            "window": 4,
        }
        return BlockLoader(x, {"t": x[:, 0]}, ids, group_names={"sex": ["a", "b"]}, **{**settings, **options})

    @pytest.mark.parametrize("n", [1000, 64, 65, 7])
    def test_an_epoch_has_each_row_once_in_an_order_that_repeats(self, n: int) -> None:
        epochs = [
            [int(v) for x, _ in each for v in x[:, 0]]
            for loader in (self.loader(n), self.loader(n))
            for each in (loader, loader)
        ]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert epochs[0] == epochs[2] != epochs[1] == epochs[3]
        for x, labels in self.loader(n):
            assert torch.equal(labels["t"], x[:, 0])
            assert torch.equal(labels["sensitive"]["sex"], x[:, 0].long() % 2)

    def test_a_window_is_all_that_is_looked_at(self) -> None:
        taken = [x[:, 0] for x, _ in self.loader(1024, batch_size=64)]
        assert all(len(set((rows // 16).int().tolist())) <= 4 for rows in taken)
        plain = torch.cat([x[:, 0] for x, _ in self.loader(1024, shuffle=False)])
        assert torch.equal(plain, torch.arange(1024.0))
        assert len({int(rows[0]) // 16 for rows in taken}) > 8  # blocks come in an order of their own

    def test_it_goes_on_where_it_was(self) -> None:
        one, two = self.loader(), self.loader(seed=9, window=8)
        list(one)
        two.load_state_dict(one.state_dict())
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, two))

    def test_wide_references_keep_the_components_of_all_rows(self) -> None:
        x = torch.randn(300, 80, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 1, 80)
        reference = lf.data.reference.Reference(tuple(range(80)), (1.0,) * 80, (), {})
        settings: dict[str, Any] = {"batch_size": 300, "shuffle": False, "device": "cpu", "reference": reference}
        one = next(iter(BlockLoader(x, {"t": x[:, 0]}, {}, group_names={}, **settings)))[1]["reference"]
        two = next(iter(lf.ResidentLoader(x, {"t": x[:, 0]}, **settings)))[1]["reference"]
        torch.testing.assert_close(torch.pdist(one), torch.pdist(two), rtol=1e-4, atol=1e-4)


def test_reading_by_row_group_holds_a_row_group(tmp_path: Path) -> None:
    path = written(
        tmp_path / "wide.parquet",
        pd.DataFrame(np.random.default_rng(0).normal(size=(40_000, 20))).rename(columns=str),
        1000,
    )
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in parquet.Parquet.open(path).raw(rows=500)]
    assert max(held) < path.stat().st_size / 5


class TestCache:
    def load(self, path: Path, **options: Any) -> lf.data.Dataset:
        return lf.load_table(
            path, tasks={"high": TASKS["high"]}, sensitive=["sex"], features=["x", "town"], out_of_core=True, **options
        )

    def test_it_is_used_again_until_the_source_or_the_choice_changes(self, tmp_path: Path) -> None:
        path, frame = tmp_path / "people.parquet", people(600)
        written(path, frame)
        first = self.load(path)
        (folder,) = (tmp_path / "people.parquet.libmtl_fair").iterdir()
        made = (folder / "cache.json").stat().st_ino
        assert torch.equal(self.load(path).train.x, first.train.x)
        assert (folder / "cache.json").stat().st_ino == made
        self.load(path, seed=1)
        assert len(list(folder.parent.iterdir())) == 2
        frame.loc[0, "x"] = 50.0
        written(path, frame)
        again = torch.cat([split.x[:, 0] for split in self.load(path).splits().values()])
        assert float(again.max()) > 10 > float(torch.cat([split.x[:, 0] for split in first.splits().values()]).max())

    def test_of_two_that_prepare_it_at_a_time_one_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = written(tmp_path / "people.parquet", people(600))
        parts, made = cache.Writer.finish, []

        def finish(writer: cache.Writer, told: Any) -> None:
            monkeypatch.setattr(cache.Writer, "finish", parts)
            made.append(self.load(path))  # what another process does meanwhile
            writer.finish(told)

        monkeypatch.setattr(cache.Writer, "finish", finish)
        second = self.load(path)
        assert torch.equal(made[0].train.x, second.train.x)
        assert len(list((tmp_path / "people.parquet.libmtl_fair").iterdir())) == 1

    @pytest.mark.parametrize("name", ["train.x", "val.label0", "test.group0", "cache.json"])
    def test_a_damaged_one_is_made_anew(self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
        path = written(tmp_path / "people.parquet", people(600))
        whole = self.load(path)
        kept = {part: split.x.clone() for part, split in whole.splits().items()}
        del whole
        (folder,) = (tmp_path / "people.parquet.libmtl_fair").iterdir()
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        for part, split in self.load(path).splits().items():
            assert torch.equal(split.x, kept[part])
        assert name == "cache.json" or "damaged or was changed" in caplog.text

    def test_a_folder_of_files_is_one_table(self, tmp_path: Path) -> None:
        frame, folder = people(900), tmp_path / "many"
        folder.mkdir()
        for i in range(3):
            written(folder / f"{i}.parquet", frame[300 * i : 300 * (i + 1)])
        one, many = self.load(written(tmp_path / "one.parquet", frame)), self.load(folder)
        assert torch.equal(one.train.x, many.train.x)
        written(folder / "3.parquet", frame.rename(columns={"x": "z"}))
        with pytest.raises(DataError, match="differs from '0.parquet'"):
            self.load(folder)

    def test_shares_draw_rows_by_their_places(self, tmp_path: Path) -> None:
        data = self.load(written(tmp_path / "people.parquet", people(3000)), split=(0.5, 0.2, 0.3), subset=0.5)
        sizes = [len(split) for split in data.splits().values()]
        assert sum(sizes) == pytest.approx(1500, abs=120)
        assert sizes[0] == pytest.approx(0.5 * sum(sizes), abs=80)
        rows = torch.cat([split.rows for split in data.splits().values()])
        assert len(set(rows.tolist())) == len(rows)
        drawn = draws(np.arange(10**5), 0, 1)
        assert np.bincount((10 * drawn).astype(int)) == pytest.approx(np.full(10, 10**4), abs=400)

    def test_what_cannot_be_read_so_is_said(self, tmp_path: Path) -> None:
        frame = people(300)
        with pytest.raises(DataError, match="needs the path of a .parquet file"):
            self.load(frame)  # type: ignore[arg-type]
        frame.to_csv(tmp_path / "people.csv", index=False)
        with pytest.raises(DataError, match="expected a .parquet file, or a folder that has some"):
            self.load(tmp_path / "people.csv")
        with pytest.raises(DataError, match="unknown column 'hihg'.*'high'"):
            lf.load_table(
                written(tmp_path / "p.parquet", frame),
                tasks={"hihg": {"kind": "binary"}},
                sensitive=["sex"],
                out_of_core=True,
            )


RECIPE = """
name: people
data:
  table: {table}
  features: [x, gap, town, code, flag, day, sex]
  tasks: {{high: {{kind: binary, positive: "yes"}}, pay: {{kind: regression, transform: log1p}}}}
  sensitive: [sex]
  split: part
  {more}
model: {{hidden: [8]}}
train: {{epochs: 1, batch_size: 256}}
seeds: [0]
audit: {{delta: [0.2]}}
metrics: {{n_bootstrap: 0}}
methods:
  plain: {{weighting: EW}}
  blind: {{weighting: EW, unaware: true}}
  between: {{post: blend, of: [plain, blind]}}
output: {{report: false}}
"""


def test_a_recipe_and_its_predictions_are_those_of_the_table_in_memory(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from libmtl_fair.cli import app
    from libmtl_fair.recipe import load_recipe
    from libmtl_fair.recipe.run import run_recipe

    runs = []
    for name, more in (("memory", ""), ("disk", f"out_of_core: true\n  cache: {tmp_path / 'cache'}")):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(table=table, more=more))
        runs.append(run_recipe(load_recipe(tmp_path / f"{name}.yaml"), tmp_path / name, device="cpu"))
    for method in ("plain", "blind", "between"):
        held = [json.loads((run / method / "seed0/metrics.json").read_text()) for run in runs]
        kept = [{k: v for k, v in each.items() if k not in ("timing", "digest")} for each in held]
        assert kept[0] == kept[1], method

    frame = people(700).drop(columns=["high", "pay"])
    new = written(tmp_path / "new.parquet", frame, 150)
    whole = lf.load(runs[0], method="blind").predict(new)
    monkeypatch.setattr(parquet.Parquet.parts, "__defaults__", (200,))
    for name, read in (("out.parquet", pd.read_parquet), ("out.csv", pd.read_csv), ("out.csv.gz", pd.read_csv)):
        found = CliRunner().invoke(
            app, ["predict", str(runs[1]), str(new), "--method", "blind", "--out", str(tmp_path / name)]
        )
        assert found.exit_code == 0, found.output
        pd.testing.assert_frame_equal(
            read(tmp_path / name), whole, rtol=1e-5, atol=1e-6, check_dtype=name == "out.parquet"
        )
    assert "for 700 rows" in found.output
