"""The log of steps and the history: rows, gaps, exact round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from libmtl_fair.errors import DamagedFileError
from libmtl_fair.libmtl import history as history_module
from libmtl_fair.libmtl.history import History, StepLog


def test_a_log_takes_numbers_and_tensors_and_knows_gaps() -> None:
    log = StepLog()
    log.add({"a": 0.5, "b": torch.tensor(1.0), "c": 2.0}, 1)
    log.add({"a": torch.tensor(1.5), "b": 2.0, "v": torch.tensor([1.0, 2.0])}, [1])
    columns = log.read(["t", "u"])
    assert columns["a"].tolist() == [0.5, 1.5]
    assert columns["b"].tolist() == [1.0, 2.0]
    assert columns["c"][0] == 2.0
    assert np.isnan([columns["c"][1], columns["v/t"][0], columns["v/u"][0]]).all()
    assert (columns["v/t"][1], columns["v/u"][1]) == (1.0, 2.0)


def test_means_are_over_rows() -> None:
    log = StepLog()
    log.add({}, [3, 1])
    log.add({}, 1)
    assert log.means(np.array([[1.0, 2.0], [5.0, 4.0]])).tolist() == [2.0, 3.0]


def test_a_history_comes_back_exactly_and_goes_on(tmp_path: Path) -> None:
    history = History()
    assert len(history.frame) == 0
    history.add_epoch(0, {"loss/a": np.array([0.1, 0.2])}, {"val/a/AUC": 0.75})
    history.write(tmp_path / "h.csv")
    again = History.read(tmp_path / "h.csv", history.state_dict())
    for one in (history, again):
        one.add_epoch(1, {"loss/a": np.array([0.3]), "w": np.array([1.0])}, {})
    pd.testing.assert_frame_equal(history.frame, again.frame, check_exact=True)
    assert history.frame["step"].tolist() == [0, 1, 2]
    assert history.frame["val/a/AUC"].isna().tolist() == [True, False, True]
    assert history.epochs["loss/a"].tolist() == [0.15000000000000002, 0.3]


def epochs_of(history: History, path: Path, count: int, **new: int) -> None:
    """Add epochs of three steps, written one by one; ``new`` columns begin at an epoch of their own."""
    draw = np.random.default_rng(history._steps)
    for epoch in range(history._steps // 3, history._steps // 3 + count):
        odd = np.array([-0.0, np.inf, draw.normal() * 1e-300])
        columns = {name: odd for name, first in new.items() if epoch >= first}
        history.add_epoch(epoch, {"loss/a": draw.normal(size=3), **columns}, {"val/a,b": draw.normal()})
        history.write(path)


def test_epochs_are_appended_and_the_bytes_written_do_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    for name in ("append_text", "write_text"):
        real = getattr(history_module, name)
        keep = lambda path, text, real=real: (written.append(len(text)), real(path, text))[1]  # noqa: E731
        monkeypatch.setattr(history_module, name, keep)
    history = History()
    epochs_of(history, tmp_path / "h.csv", 60)
    assert max(written[1:]) < 1.3 * min(written[1:])
    assert len(str(history.state_dict())) < 200
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "h.csv"), history.frame)


def test_new_columns_and_rows_of_a_killed_epoch(tmp_path: Path) -> None:
    path, history = tmp_path / "h.csv", History()
    epochs_of(history, path, 2)
    before = history.state_dict()
    epochs_of(history, path, 3, **{"x\ny": 3})
    again = History.read(path, before)  # killed before the checkpoint of a later epoch
    assert again.frame.columns.tolist() == ["epoch", "step", "loss/a", "val/a,b"] and len(again.frame) == 6
    for one in (again, whole := History.read(path, history.state_dict())):
        assert one.state_dict() == (before if one is again else history.state_dict())
    pd.testing.assert_frame_equal(whole.frame, history.frame, check_exact=True)
    epochs_of(again, path, 3, **{"x\ny": 3})
    assert again.state_dict() == history.state_dict()
    pd.testing.assert_frame_equal(pd.read_csv(path), history.frame)


@pytest.mark.parametrize("damage", ["absent", "text", "digit", "bytes", "short", "empty"])
def test_a_damaged_history_is_refused(tmp_path: Path, damage: str) -> None:
    path, history = tmp_path / "h.csv", History()
    epochs_of(history, path, 3)
    content = path.read_bytes()
    cell = content.split(b"\n")[2].split(b",")[2]
    changes: dict[str, Any] = {
        "text": content.replace(cell, b"high"),
        "digit": content.replace(cell, cell[:-1] + bytes([48 + (cell[-1] - 47) % 10])),
        "bytes": content.replace(cell, b"\xff\xfe"),
        "short": content[:-30],
        "empty": b"",
    }
    path.unlink() if damage == "absent" else path.write_bytes(changes[damage])
    with pytest.raises(DamagedFileError, match=r"h\.csv (cannot be read|does not hold the 9 steps)"):
        History.read(path, history.state_dict())


def test_a_file_that_somebody_removed_is_written_anew(tmp_path: Path) -> None:
    path, history = tmp_path / "h.csv", History()
    epochs_of(history, path, 2)
    path.unlink()
    epochs_of(history, path, 1)
    assert len(pd.read_csv(path)) == 9
