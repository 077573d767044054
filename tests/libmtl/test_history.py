"""The log of steps and the history: rows, gaps, exact round trips."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

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


def test_a_history_comes_back_exactly_and_goes_on() -> None:
    history = History()
    assert len(history.frame) == 0
    history.add_epoch(0, {"loss/a": np.array([0.1, 0.2])}, {"val/a/AUC": 0.75})
    again = History.from_state(history.state_dict())
    for one in (history, again):
        one.add_epoch(1, {"loss/a": np.array([0.3]), "w": np.array([1.0])}, {})
    pd.testing.assert_frame_equal(history.frame, again.frame, check_exact=True)
    assert history.frame["step"].tolist() == [0, 1, 2]
    assert history.frame["val/a/AUC"].isna().tolist() == [True, False, True]
    assert history.epochs["loss/a"].tolist() == [0.15000000000000002, 0.3]
