"""The consistency audit against an independent implementation, and what must not move it."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from libmtl_fair import metrics
from libmtl_fair.errors import DataError
from libmtl_fair.metrics import ConsistencyAudit, consistency_ratio, consistency_score, consistency_scorer


def oracle(matrix, k, scores, base, labels, bar, sensitive, twins):
    """METHODS.md 1.3, loop by loop: for [N] scores of binary tasks."""
    n = len(matrix)
    clipped = np.clip(matrix, -5, 5)
    edges = []
    for i in range(n):
        distance = [(math.dist(clipped[i], clipped[j]), j) for j in range(n) if j != i]
        edges += [(i, j) for _, j in sorted(distance)[:k]]

    def rank(s, reference):
        return np.array([(np.sum(reference < v) + np.sum(reference <= v)) / (2 * len(reference)) for v in s])

    def spread(v):
        return np.abs(v[:, None] - v).sum() / (n * (n - 1))

    def over(v):
        return np.array([abs(v[i] - v[j]) for i, j in edges])

    def node(u):
        h = np.zeros(n)
        for (i, j), value in zip(edges, u):
            h[i] += value
            h[j] += value
        return ((h**2).sum() - (u**2).sum()) / len(u) ** 2

    found, parts, ranks = {}, [], {}
    for task, s in scores.items():
        r = ranks[task] = rank(s, base[task])
        g = over(r) / spread(r)
        parts.append(g)
        q = np.mean(s > bar)
        fitted = IsotonicRegression(out_of_bounds="clip").fit(rank(base[task], base[task]), labels[task])
        rate = fitted.predict(r)
        flipped = twins[task]
        found[task] = {
            "inconsistency": g.mean(),
            "calibrated": over(rate).mean() / spread(rate),
            "violation_0.1": np.mean(over(r) > 0.1),
            "violation_0.3": np.mean(over(r) > 0.3),
            "decisions": np.mean([(s[i] > bar) != (s[j] > bar) for i, j in edges]) / (2 * q * (1 - q)),
            "selected": q,
            "gini": spread(r),
            "flip": np.mean(np.abs(r - rank(flipped, base[task]))) / spread(r),
            "changed": np.mean((s > bar) != (flipped > bar)),
            "half": 1.959963984540054 * math.sqrt(node(g - g.mean())),
        }
    g = np.mean(parts, axis=0)
    found["macro"] = {"inconsistency": g.mean(), "half": 1.959963984540054 * math.sqrt(node(g - g.mean()))}
    names = list(scores)
    cross = [over(ranks[a] - ranks[b]).mean() / spread(ranks[a] - ranks[b]) for a in names for b in names if a < b]
    found["macro"]["cross"] = np.mean(cross)
    same = np.array([sensitive[i] == sensitive[j] for i, j in edges])
    found["macro"]["split"] = [g[same].mean(), g[~same].mean()]
    return found, g, node


def people(seed, n=150, m=120):
    """Features, scores of three tasks on test and validation, labels of validation, sensitive ids, twins."""
    rng = np.random.default_rng(seed)
    x, v = rng.normal(size=(n, 5)) * [1, 1, 3, 1, 1], rng.normal(size=(m, 5))
    sensitive = rng.integers(0, 2, n)
    slopes = rng.normal(size=(3, 5))
    test, base, labels, twins = {}, {}, {}, {}
    for name, slope in zip("abc", slopes):
        logit, shift = x @ slope + rng.normal(size=n), 1.5 * sensitive
        other = 1.5 * (1 - sensitive)
        test[name], twins[name] = (1 / (1 + np.exp(-(logit + s))) for s in (shift, other))
        base[name] = 1 / (1 + np.exp(-(v @ slope + rng.normal(size=m) * 2)))
        labels[name] = (rng.random(m) < base[name]).astype(float)
    test["b"], base["b"], twins["b"] = (np.round(each["b"], 1) for each in (test, base, twins))  # ties
    return x, test, base, labels, sensitive, twins


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [3, 10])
def test_numbers_and_intervals_equal_an_independent_implementation(seed, k):
    x, test, base, labels, sensitive, twins = people(seed)
    expected, g, _ = oracle(x, k, test, base, labels, 0.4, sensitive, twins)
    audit = ConsistencyAudit(x, k=k, reference_scores=base, sensitive=sensitive, twins=twins)
    found = audit.run(test, labels=labels, thresholds=0.4)
    near = {"rel": 0, "abs": 1e-10}
    for row in found.per_task.to_dict("records"):
        wanted = expected[row["task"]]
        for name in wanted.keys() - {"half", "changed"}:
            assert row[name] == pytest.approx(wanted[name], **near), name
        assert row["high"] == pytest.approx(wanted["inconsistency"] + wanted["half"], **near)
        assert found.decisions[row["task"]] == row["decisions"]
    macro = expected["macro"]
    assert found.inconsistency == pytest.approx(macro["inconsistency"], **near)
    assert found.interval[0] == pytest.approx(macro["inconsistency"] - macro["half"], **near)
    assert found.interval[1] == pytest.approx(macro["inconsistency"] + macro["half"], **near)
    assert found.cross_task == pytest.approx(macro["cross"], **near)
    assert found.split["inconsistency"].tolist() == pytest.approx(macro["split"], **near)
    for row in found.flips.to_dict("records"):
        assert row["changed"] == pytest.approx(expected[row["task"]]["changed"], **near)
    assert found.flip_gap == pytest.approx(np.mean([expected[t]["flip"] for t in test]), **near)
    worst = found.worst_pairs["inconsistency"].to_numpy()
    assert (np.diff(worst) <= 0).all() and worst[0] == pytest.approx(g.max(), **near) and len(worst) == 10


def test_ratio_of_two_models_equals_an_independent_implementation():
    x, test, base, labels, sensitive, twins = people(7)
    _, a, node = oracle(x, 10, test, base, labels, 0.5, sensitive, twins)
    _, b, _ = oracle(x, 10, twins, base, labels, 0.5, sensitive, twins)
    audit = ConsistencyAudit(x, reference_scores=base)
    rho, low, high = consistency_ratio(audit.run(twins), audit.run(test))
    expected = b.mean() / a.mean()
    half = 1.959963984540054 * math.sqrt(node((b - expected * a) / a.mean()))
    assert (rho, low, high) == pytest.approx((expected, expected - half, expected + half), rel=0, abs=1e-10)
    other = ConsistencyAudit(x[:, :3], reference_scores=base).run(test)
    with pytest.raises(DataError, match="same near pairs"):
        consistency_ratio(other, audit.run(test))


INCREASING = {
    "shrunk": lambda s: 0.3 + 0.01 * s,
    "logit": lambda s: np.log(s / (1 - s)),
    "cube": lambda s: s**3,
    "far": lambda s: 1e12 + 1e9 * s,
}


@pytest.mark.parametrize("how", INCREASING)
def test_a_strictly_increasing_map_of_scores_changes_nothing(how):
    x, test, base, labels, sensitive, twins = people(3)
    test, base, twins = ({t: np.clip(np.round(s, 3), 0.001, 0.999) for t, s in e.items()} for e in (test, base, twins))
    audit = ConsistencyAudit(x, sensitive=sensitive)
    mapped = [{t: INCREASING[how](s) for t, s in each.items()} for each in (test, base, twins)]
    decided = {t: s > 0.5 for t, s in test.items()}
    before = audit.run(test, reference_scores=base, twins=twins, labels=labels, decisions=decided)
    after = audit.run(mapped[0], reference_scores=mapped[1], twins=mapped[2], labels=labels, decisions=decided)
    pd.testing.assert_frame_equal(after.per_task, before.per_task, check_exact=True)
    pd.testing.assert_frame_equal(after.split, before.split, check_exact=True)
    assert (after.gaps == before.gaps).all() and after.interval == before.interval
    assert (after.cross_task, after.flip_gap) == (before.cross_task, before.flip_gap)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(3, 40),
    steps=st.lists(st.floats(1e-3, 1e3), min_size=40, max_size=40),
)
def test_any_strictly_increasing_step_function_changes_nothing(seed, levels, steps):
    rng = np.random.default_rng(seed)
    values = np.cumsum(steps)
    audit = ConsistencyAudit(rng.normal(size=(60, 3)))
    codes, base = rng.integers(0, levels, 60), rng.integers(0, levels, 50)
    before = audit.run({"t": codes}, reference_scores={"t": base})
    after = audit.run({"t": values[codes]}, reference_scores={"t": values[base]})
    assert (after.gaps == before.gaps).all() or (np.isnan(after.gaps).all() and np.isnan(before.gaps).all())


def test_people_permuted_at_random_give_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 4))
    audit, score = ConsistencyAudit(x), x @ [1.0, 0.5, 0, 0]
    found = [audit.run({"t": rng.permutation(score)}).inconsistency for _ in range(30)]
    assert abs(np.mean(found) - 1) < 4 * np.std(found) / math.sqrt(30) + 1e-3
    assert audit.run({"t": score}).inconsistency < 0.5


def test_shrinking_to_a_constant_is_no_way_to_be_consistent():
    x, test, *_ = people(1)
    audit = ConsistencyAudit(x)
    shrunk = audit.run({t: 0.5 + 1e-6 * (s - 0.5) for t, s in test.items()})
    assert shrunk.inconsistency == pytest.approx(audit.run(test).inconsistency, abs=1e-9)
    constant = audit.run({"a": np.full(len(x), 0.5), "b": test["b"]})
    assert constant.undefined == {"a": "one distinct score"}
    row = constant.per_task.iloc[0]
    assert all(math.isnan(row[name]) for name in ("inconsistency", "low", "high", "violation_0.1", "decisions"))
    assert constant.inconsistency == audit.run({"b": test["b"]}).inconsistency
    nearly = np.where(np.arange(len(x)) < 2, 0.9, 0.5)
    assert "hardly differ" in audit.run({"a": nearly}).undefined["a"]
    assert math.isnan(audit.run({"a": nearly}).inconsistency)
    assert len(audit.run({"a": nearly}).worst_pairs) == 0


def test_error_is_no_smaller_than_the_spread_over_subsamples():
    rng = np.random.default_rng(5)
    found, errors = [], []
    for _ in range(60):
        x = rng.normal(size=(400, 3))
        logit = x @ [1.0, 0.7, 0] + rng.normal(size=400)
        report = ConsistencyAudit(x).run({"t": logit, "u": logit + x[:, 2]})
        found.append(report.inconsistency)
        errors.append((report.interval[1] - report.interval[0]) / (2 * 1.959964))
    spread = np.std(found, ddof=1)
    assert np.mean(errors) > 0.85 * spread and np.mean(errors) < 2 * spread


def test_classes_are_averaged_with_class_shares():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 3))
    p = rng.dirichlet([2, 3, 5], 200)
    labels = rng.choice([0, 1, 2, -100], 200, p=[0.5, 0.2, 0.2, 0.1])
    audit = ConsistencyAudit(x)
    each = np.array([audit.run({"t": column}).inconsistency for column in p.T])
    found = audit.run({"t": p}, labels={"t": labels})
    shares = np.array([np.mean(labels[labels >= 0] == c) for c in range(3)])
    assert found.inconsistency == pytest.approx(each @ shares, abs=1e-12)
    assert audit.run({"t": p}).inconsistency == pytest.approx(each @ p.mean(0), abs=1e-12)
    likeliest, near = p.argmax(1), audit.pairs
    q = np.bincount(likeliest) / 200
    differ = np.mean(likeliest[near.anchors][:, None] != likeliest[near.neighbours])
    assert found.decisions["t"] == pytest.approx(differ / (1 - q @ q))


def test_twins_of_several_values_are_averaged_and_may_be_missing():
    x, test, base, _, _, twins = people(4)
    gone = {t: np.where(np.arange(len(x)) < 30, np.nan, s) for t, s in twins.items()}
    audit = ConsistencyAudit(x, reference_scores=base)
    one = audit.run(test, twins=twins).flips
    same = audit.run(test, twins={"sex": [twins, twins]}).flips
    assert same["flip"].tolist() == pytest.approx(one["flip"].tolist(), abs=1e-12) and set(same["attribute"]) == {"sex"}
    several = audit.run(test, twins={"sex": twins, "race": [twins, test]}).flips
    assert several["flip"].tolist()[3:] == pytest.approx((one["flip"] / 2).tolist(), abs=1e-12)
    known = {t: np.where(np.arange(len(x)) < 30, s, twins[t]) for t, s in test.items()}
    none = audit.run(test, twins=known)  # the first 30 do not change at all: they are counted, and weigh
    assert audit.run(test, twins=gone).flip_gap * 120 / 150 == pytest.approx(none.flip_gap, abs=1e-12)
    assert math.isnan(audit.run(test).flip_gap)


def test_scores_that_are_not_finite_are_left_out_of_their_task():
    x, test, base, *_ = people(6)
    part = {**test, "a": np.where(np.arange(150) % 3 == 0, np.nan, test["a"])}
    audit = ConsistencyAudit(x, reference_scores=base)
    found, near = audit.run(part), audit.pairs
    known = np.isfinite(part["a"])
    both = known[near.anchors][:, None] & known[near.neighbours]
    r = np.searchsorted(np.sort(base["a"]), part["a"]) / len(base["a"])
    spread = np.abs(r[known][:, None] - r[known]).sum() / (known.sum() * (known.sum() - 1))
    gaps = np.abs(r[near.anchors][:, None] - r[near.neighbours])[both]
    assert found.per_task["inconsistency"][0] == pytest.approx(gaps.mean() / spread, abs=1e-12)
    assert found.inconsistency == pytest.approx(found.per_task["inconsistency"].mean(), abs=1e-12)


def test_report_reads_well_and_gives_plain_values():
    x, test, base, labels, sensitive, twins = people(0)
    audit = ConsistencyAudit(x, reference_scores=base, sensitive={"sex": np.array(["f", "m"])[sensitive]}, twins=twins)
    found = audit.run(test, labels=labels)
    assert "alike are ranked alike" in repr(found) and "sex, different" in repr(found)
    plain = found.to_dict()
    rows = {(row["task"], row["metric"]): row for row in plain["rows"]}
    assert rows["macro", "inconsistency"]["value"] == found.inconsistency
    assert rows["macro", "inconsistency"]["low"] == found.interval[0]
    assert ("a", "flip[sensitive]") in rows and ("macro", "inconsistency[sex: equal]") in rows
    assert plain["protocol"]["n"] == 150 and plain["protocol"]["k"] == 10
    assert {"row", "other", "distance", "inconsistency", "a, row"} <= set(plain["worst_pairs"][0])


@pytest.mark.parametrize(
    ("options", "run", "message"),
    [
        ({}, {}, "at least one task"),
        ({}, np.zeros(20), "as {task"),
        ({}, {"t": np.zeros(9)}, "for 20 people"),
        ({"reference_scores": {"s": np.zeros(5)}}, {"t": np.arange(20.0)}, "no task|unknown task|task"),
        ({"reference_scores": {"t": np.full(5, np.nan)}}, {"t": np.arange(20.0)}, "no finite score"),
        ({"reference_scores": {"t": np.zeros((5, 2))}}, {"t": np.arange(20.0)}, "2 columns"),
        ({"distance": "chebishev"}, {"t": np.arange(20.0)}, "chebishev"),
        ({"sensitive": np.zeros(3)}, {"t": np.arange(20.0)}, "3 values for 20 people"),
        ({"twins": {"t": np.zeros((20, 2))}}, {"t": np.arange(20.0)}, "twins of task 't'"),
    ],
)
def test_bad_input_is_refused_in_words(options, run, message):
    with pytest.raises(DataError, match=message):
        ConsistencyAudit(np.random.default_rng(0).normal(size=(20, 2)), **options).run(run)


def test_a_scorer_for_scikit_learn_pipelines():
    rng = np.random.default_rng(0)
    n = 600
    frame = pd.DataFrame({"age": rng.normal(40, 12, n), "wealth": rng.lognormal(8, 1, n), "sex": rng.integers(0, 2, n)})
    y = (rng.random(n) < 1 / (1 + np.exp(-(frame["age"] - 40) / 5 - 3 * frame["sex"] + 1.5))).astype(int)
    scorers = {"auc": "roc_auc", "alike": consistency_scorer(leave_out=["sex"])}
    smooth = cross_validate(make_pipeline(StandardScaler(), LogisticRegression()), frame, y, scoring=scorers, cv=3)
    blind = make_pipeline(StandardScaler(), LogisticRegression())
    without = cross_validate(blind, frame.drop(columns="sex"), y, scoring={"alike": consistency_scorer()}, cv=3)
    rough = cross_validate(RandomForestClassifier(20, random_state=0), frame, y, scoring=scorers, cv=3)
    assert without["test_alike"].mean() > smooth["test_alike"].mean() > rough["test_alike"].mean()
    assert (smooth["test_auc"] > 0.7).all()
    fitted = blind.fit(frame, y)
    one = consistency_score(fitted.predict_proba(frame), frame, leave_out=["sex"])
    standard = (frame.drop(columns="sex") - frame.drop(columns="sex").mean()) / frame.drop(columns="sex").std(ddof=0)
    audit = metrics.ConsistencyAudit(standard)
    assert one == pytest.approx(1 - audit.run({"y": fitted.predict_proba(frame)[:, 1]}).inconsistency, abs=1e-9)
    with pytest.raises(DataError, match="did you mean 'sex'"):
        consistency_score(y, frame, leave_out=["sexx"])
