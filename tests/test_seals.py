"""Files that carry the digest of their content: every flipped bit and every truncation is refused before anything is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.errors import CheckpointError, DamagedFileError
from libmtl_fair.files import (
    append_text,
    edited_files,
    file_digest,
    is_sealed,
    read_json,
    seal_beside,
    sealed_path,
    write_json,
    write_text,
)
from libmtl_fair.libmtl import checkpoint
from libmtl_fair.metrics.near_pairs import NearPairs
from libmtl_fair.predictions import Predictions
from libmtl_fair.sklearn import FairMTLEstimator

Reader = Callable[[Path], Any]


def a_checkpoint(folder: Path) -> tuple[Path, Reader]:
    path = folder / "checkpoint.pt"
    checkpoint.save(path, {"model": {"w": torch.randn(40, 8)}, "epoch": 3, "name": "x" * 50})
    return path, lambda file: checkpoint.load(file, torch.device("cpu"))


def an_estimator(folder: Path) -> tuple[Path, Reader]:
    rng = np.random.default_rng(0)
    x = pd.DataFrame({"a": rng.normal(size=40), "b": rng.normal(size=40)})
    y = pd.DataFrame({"t": (x["a"] > 0).astype(int), "u": x["b"]})
    made = FairMTLEstimator(hidden=(4,), epochs=1, random_state=0).fit(x, y, sensitive_features=x["a"] > 0.5)
    return made.save(folder / "estimator.pt"), FairMTLEstimator.load


def some_predictions(folder: Path) -> tuple[Path, Reader]:
    task, output = lf.Binary("t"), torch.randn(50, 1)
    labels, groups = torch.randint(0, 2, (50,)).float(), {"sex": torch.randint(0, 2, (50,))}
    made = Predictions((task,), {"t": task.score(output)}, {"t": output}, {"t": labels}, groups)
    return made.save(folder / "predictions_test.parquet"), Predictions.load


@pytest.mark.parametrize("make", [a_checkpoint, an_estimator, some_predictions])
def test_every_flip_and_every_truncation_is_refused(
    tmp_path: Path, make: Callable[[Path], tuple[Path, Reader]]
) -> None:
    path, read = make(tmp_path)
    assert is_sealed(path)
    read(path)
    whole, damaged, draw = path.read_bytes(), tmp_path / f"damaged{path.suffix}", random.Random(0)
    bits = [draw.randrange(len(whole) * 8) for _ in range(250)]
    bits += [bit for at in range(len(whole) - 90, len(whole)) for bit in (8 * at, 8 * at + 5)]  # about the seal
    at = whole.rfind(b"libmtl_fair sha256 ")
    bits += [8 * k + k % 8 for k in range(at, at + 83)]
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged"):
            read(damaged)
    for size in {draw.randrange(len(whole)) for _ in range(60)} | set(range(len(whole) - 90, len(whole))):
        damaged.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"damaged"):
            read(damaged)
    damaged.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=r"damaged"):
        read(damaged)


def test_a_sealed_file_is_read_by_its_usual_readers_and_moves(tmp_path: Path) -> None:
    path, _ = a_checkpoint(tmp_path)
    assert torch.load(path, weights_only=True)["epoch"] == 3
    path, _ = some_predictions(tmp_path)
    assert len(pd.read_parquet(path)) == 50 == len(pq.read_table(path))
    moved = path.rename(tmp_path / "elsewhere.parquet")
    assert len(Predictions.load(moved)) == 50


def test_predictions_that_pandas_wrote_again_are_somebody_elses(tmp_path: Path) -> None:
    path, _ = some_predictions(tmp_path)
    table = pq.read_table(path)
    kept = {k: v for k, v in table.schema.metadata.items() if k != b"libmtl_fair seal"}
    pq.write_table(table.replace_schema_metadata(kept), path)
    with pytest.raises(CheckpointError, match="seal is missing"):
        Predictions.load(path)


def test_a_checkpoint_of_an_earlier_version_is_read_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.pt"
    torch.save({"format": 1, "epoch": 2, "model": {"w": torch.ones(30)}}, path)
    for _ in range(2):
        assert checkpoint.load(path, torch.device("cpu"))["epoch"] == 2
    assert caplog.text.count("old.pt is of an earlier version, without a seal") == 1
    content = bytearray(path.read_bytes())
    content[content.index(np.ones(30, np.float32).tobytes()) + 7] ^= 4
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"old\.pt is damaged or not ours \(the checksum of .* is wrong\)"):
        checkpoint.load(path, torch.device("cpu"))


def test_json_with_a_seal(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"a": 1.25, "b": [1, 2]}, sealed=True)
    assert read_json(path) == read_json(path, sealed=True) == {"a": 1.25, "b": [1, 2]}
    assert list(json.loads(path.read_text())) == ["a", "b", "seal"]
    path.write_text(path.read_text().replace("1.25", "1.35"))
    assert read_json(path)["a"] == 1.35
    with pytest.raises(DamagedFileError, match=r"a\.json is damaged or was changed: it does not fit its seal"):
        read_json(path, sealed=True)
    path.write_text("[" * 100_000)
    with pytest.raises(DamagedFileError, match=r"a\.json is damaged"):
        read_json(path)


def test_json_with_its_digest_beside_it(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"a": 1.25}, sealed="beside")
    assert json.loads(path.read_text()) == {"a": 1.25} == read_json(path, sealed=True)
    assert (tmp_path / "a.json.sha256").read_text() == f"{file_digest(path)}  a.json\n"
    path.write_text(path.read_text().replace("1.25", "1.35"))
    with pytest.raises(DamagedFileError, match=r"a\.json is damaged or was changed: it does not fit a\.json\.sha256"):
        read_json(path, sealed=True)
    (tmp_path / "a.json.sha256").unlink()
    assert read_json(path, sealed=True) == {"a": 1.35}


def test_any_flip_of_near_pairs_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """The archive's own checksums; a flip in a compressed stream raises zlib's own error."""
    held = NearPairs(np.arange(30), np.arange(60).reshape(30, 2) % 31, np.linspace(0, 1, 60).reshape(30, 2), 31, "x")
    path, refused = held.save(tmp_path / "pairs.npz"), 0
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            found = NearPairs.load(path)
        except CheckpointError:
            refused += 1
            continue
        assert all(
            np.array_equal(getattr(found, name), getattr(held, name))
            for name in ("anchors", "neighbours", "distances", "n")
        )
    assert refused > 300


def test_a_seal_of_any_other_file(tmp_path: Path) -> None:
    with sealed_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("text")
    assert is_sealed(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("text")
    assert not is_sealed(tmp_path / "b.txt")
    (tmp_path / "b.txt").write_text("")
    assert not is_sealed(tmp_path / "b.txt")


def test_what_is_appended_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    append_text(path, "1\n")
    append_text(path, "ä\n")
    assert path.read_text(encoding="utf-8") == "1\nä\n"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*a\.csv: No space left on device"):
        append_text(path, "3\n")
    assert path.read_text(encoding="utf-8") == "1\nä\n"


def test_files_that_do_not_fit_their_seals_are_found_wherever_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "recipe.yaml", "lr: 0.001\n", sealed=True)
    history = write_text(tmp_path / "plain" / "seed0" / "history.csv", "step,loss\n0,0.5\n")
    seal_beside(history)
    write_text(tmp_path / "gone.csv", "1\n", sealed=True).unlink()
    assert edited_files(tmp_path) == []
    assert (tmp_path / "recipe.yaml.sha256").read_text() == f"{file_digest(tmp_path / 'recipe.yaml')}  recipe.yaml\n"
    append_text(history, "1,0.4\n")
    assert edited_files(tmp_path) == ["plain/seed0/history.csv"]
    (tmp_path / "recipe.yaml").write_text("lr: 0.002\n")
    assert edited_files(tmp_path) == ["plain/seed0/history.csv", "recipe.yaml"]
