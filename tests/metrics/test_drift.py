from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.errors import DataError
from libmtl_fair.functional import huber, huberized_hinge
from libmtl_fair.metrics import FixedDeltaAudit, drift, induced_thresholds, robust_pairs


def symmetric(rng, size, scale):
    upper = np.triu(rng.random((size, size)) * scale, 1)
    return upper + upper.T


def case(seed, methods=3, tasks=3, exact=True):
    rng = np.random.default_rng(seed)
    reference = symmetric(rng, tasks, 0.5)
    names = [f"t{t}" for t in range(tasks)]
    audit = FixedDeltaAudit(reference, n_pairs=200, exact=exact)
    reports, induced = {}, {}
    for m in range(methods):
        scale = rng.random()
        reports[f"m{m}"] = audit.run({t: 0.5 + scale * (rng.random(50) - 0.5) for t in names})
        induced[f"m{m}"] = symmetric(rng, tasks, 0.5)
    return reports, induced, reference


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_theorems_b1_to_b4(seed, exact):
    reports, induced, reference = case(seed, exact=exact)
    table = drift(reports, induced, reference).set_index("method")
    # The raw Bias lies within the method's drift budget of the fixed one.
    assert ((table.raw_bias - table.fixed_bias).abs() <= table.budget + 1e-12).all()
    pairs = robust_pairs(table.reset_index())
    for a in table.index:
        for b in table.index:
            raw, fixed = (table[c][a] - table[c][b] for c in ("raw_bias", "fixed_bias"))
            if raw * fixed < 0:  # a reversal is possible only within both budgets
                assert abs(fixed) <= table.budget[a] + table.budget[b] + 1e-12
                assert not pairs.loc[a, b]


@settings(max_examples=100, deadline=None)
@given(st.floats(-5, 5), st.floats(0.01, 1))
def test_smoothed_hinge_lies_within_half_mu(z, mu):
    import torch

    value = torch.tensor(z, dtype=torch.float64)
    gap = max(z, 0) - huberized_hinge(value, mu).item()
    assert -1e-12 <= gap <= mu / 2 + 1e-12
    assert huber(value, mu).item() <= abs(z) + 1e-12


def test_table_by_hand():
    scores = {"a": [0.0, 0.0], "b": [0.5, 0.5]}
    audit = FixedDeltaAudit(0.2, exact=True)
    reports = {"plain": audit.run(scores), "fair": audit.run({"a": [0.0, 0.0], "b": [0.4, 0.4]})}
    own = {"plain": np.array([[0, 0.2], [0.2, 0]]), "fair": np.array([[0, 0.05], [0.05, 0]])}
    table = drift(reports, own, 0.2).set_index("method")
    assert table.fixed_bias.tolist() == pytest.approx([0.3, 0.2])
    assert table.raw_bias.tolist() == pytest.approx([0.3, 0.35])
    assert table.rank_fixed.tolist() == [2, 1]
    assert table.rank_raw.tolist() == [1, 2]
    assert table.rank_shift.tolist() == [-1, 1]
    assert table.budget.tolist() == pytest.approx([0, 0.15])
    assert table.ratio_to_reference.tolist() == pytest.approx([1, 0.25])
    assert not table.robust.any()


def test_fixed_numbers_are_those_at_the_reference():
    reports = {"m": FixedDeltaAudit(0.4, exact=True).run({"a": [0.0], "b": [0.5]})}
    assert drift(reports, {"m": np.zeros((2, 2))}, 0.1).fixed_bias.item() == pytest.approx(0.4)


def test_induced_thresholds_by_hand():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(100, 4))
    scores = {"a": rng.random(100), "b": rng.random(100)}
    scores["b"][:5] = np.nan
    found = induced_thresholds(h, scores, k=8)
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    p, q = (unit[np.argsort(-np.nan_to_num(s, nan=-1), kind="stable")[:8]].mean(0) for s in scores.values())
    cosine = p @ q / np.linalg.norm(p) / np.linalg.norm(q)
    assert found[0, 1] == pytest.approx((1 - cosine) / 2)
    assert (found == found.T).all()
    assert (np.diag(found) == 0).all()


def test_a_task_without_examples_has_no_threshold():
    h = np.eye(4)
    scores = {"a": np.full(4, 0.5), "b": np.full(4, 0.5), "c": np.full(4, np.nan)}
    found = induced_thresholds({t: h for t in scores}, scores)
    assert np.isnan(found[0, 2])
    report = FixedDeltaAudit(0.1, exact=True).run(scores)
    table = drift({"m": report}, {"m": found}, 0.1)
    assert np.isfinite(table.drop(columns="method").to_numpy(dtype=float)).all()


def test_bad_input():
    reports, induced, reference = case(0)
    with pytest.raises(DataError, match="m1"):
        drift(reports, {"m0": induced["m0"], "m2": induced["m2"]}, reference)
    with pytest.raises(DataError, match="k must be at least 1"):
        induced_thresholds(np.eye(3), {"a": [0.1] * 3}, k=0)
