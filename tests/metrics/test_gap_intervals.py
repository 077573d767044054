from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.metrics.intervals import Gap, GroupNoise, effective_sizes, gap_interval, rate_noise
from libmtl_fair.metrics.rates import FPR, RATES, TPR, table_rates
from libmtl_fair.metrics.scores import REGRESSION, group_auc, group_regression

SELECTION = RATES.index("selection_rate")
SIMULATIONS, REPLICATES = 1000, 300

WORLDS = {
    # tpr, fpr, base rate, sizes
    "equal": ([0.7, 0.7], [0.2, 0.2], [0.3, 0.3], [400, 400]),
    "near": ([0.7, 0.78], [0.2, 0.22], [0.3, 0.3], [400, 400]),
    "apart": ([0.7, 0.9], [0.1, 0.2], [0.3, 0.5], [1000, 300]),
    "small groups": ([0.6, 0.7, 0.8], [0.1, 0.2, 0.15], [0.5, 0.4, 0.3], [100, 120, 150]),
    "five equal": ([0.7] * 5, [0.2] * 5, [0.3] * 5, [100, 200, 300, 400, 1000]),
    "five": ([0.65, 0.7, 0.7, 0.75, 0.72], [0.2, 0.2, 0.22, 0.15, 0.2], [0.4] * 5, [200, 300, 500, 400, 800]),
}


def simulate(world, components, rng):
    """Return the noise of many data sets from one known truth, and the true rates [K, G]."""
    tpr, fpr, base, sizes = (np.array(v, dtype=float) for v in WORLDS[world])
    cells = np.stack([(1 - base) * (1 - fpr), (1 - base) * fpr, base * (1 - tpr), base * tpr], -1)
    tables = rng.multinomial(sizes.astype(int), cells, size=(SIMULATIONS, len(sizes))).astype(float)
    parts = []
    for counts in tables:
        same = np.stack([counts] * 3)
        parts.append(rate_noise(same, table_rates(counts), table_rates(counts.sum(0)), np.zeros((1, 1, 1, 1))))
    fields = [np.stack([getattr(p, f)[components, 0] for p in parts]) for f in ("values", "centre", "shares", "sizes")]
    noise = rng.standard_normal((SIMULATIONS, len(components), len(sizes), REPLICATES))
    truth = np.stack(
        [base * tpr + (1 - base) * fpr if c == SELECTION else tpr if c == TPR else fpr for c in components]
    )
    return GroupNoise(fields[0], noise, fields[1], fields[2], fields[3]), truth


def true_gap(gap, rates):
    parts = 1 - rates.min(1) / rates.max(1) if gap.ratio else np.ptp(rates, axis=1)
    value = parts.mean() if gap.mean else parts.max()
    return 1 - value if gap.ratio else value


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("gap", "components"),
    [
        (Gap(), [SELECTION]),
        (Gap(ratio=True), [SELECTION]),
        (Gap(), [TPR, FPR]),
        (Gap(ratio=True), [TPR, FPR]),
        (Gap(mean=True), [TPR, FPR]),
    ],
    ids=["parity difference", "parity ratio", "odds difference", "odds ratio", "odds mean"],
)
def test_nominal_95_covers(world, gap, components):
    rng = np.random.default_rng(7)
    data, rates = simulate(world, components, rng)
    truth = true_gap(gap, rates)
    low, high = gap_interval(data, gap)
    covered = ((low <= truth + 1e-9) & (truth - 1e-9 <= high)).mean()
    # 93 to 97 %, give or take two standard errors of the simulation
    assert 0.93 - 0.014 <= covered <= 0.97 + 0.011


def test_the_percentile_interval_misses_a_true_difference_of_zero():
    """Why the simple bootstrap is not used: every replicate of a difference lies above 0."""
    rng = np.random.default_rng(0)
    data, _ = simulate("equal", [SELECTION], rng)
    replicates = data.values[..., None] + data.noise * np.sqrt(0.35 * 0.65 / 400)
    percentile = np.quantile(np.ptp(replicates, axis=2)[:, 0], 0.025, axis=-1)
    assert (percentile > 0).all()
    assert (gap_interval(data, Gap())[0] == 0).mean() > 0.93


def test_to_overall_covers():
    rng = np.random.default_rng(3)
    data, rates = simulate("apart", [SELECTION], rng)
    sizes = np.array(WORLDS["apart"][3])
    truth = np.abs(rates[0] - (rates[0] * sizes).sum() / sizes.sum()).max()
    low, high = gap_interval(data, Gap(to_overall=True))
    assert 0.92 <= ((low <= truth) & (truth <= high)).mean() <= 0.98


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans(), st.booleans(), st.booleans())
def test_any_table_gives_an_ordered_interval_round_the_estimate(seed, groups, is_ratio, overall, mean):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.choice([0.3, 3, 50], (groups, 1)), (groups, 4)).astype(float)
    rates, together = table_rates(counts), table_rates(counts.sum(0))
    data = rate_noise(np.stack([counts] * 3), rates, together, rng.standard_normal((1, 1, groups, 100)))
    low, high = gap_interval(data, Gap(ratio=is_ratio, to_overall=overall, mean=mean))
    several = (~np.isnan(rates)).sum(0) >= 2
    assert np.isnan(low[~several]).all()
    assert (low[several] <= high[several] + 1e-12).all()
    assert (low[several] >= -1e-12).all()
    assert (high[several] <= 1 + 1e-12).all()


def test_effective_size_of_weighted_rates():
    rows = np.array([[40.0, 10.0, 20.0, 30.0]])
    plain = np.stack([rows, rows, rows])
    assert np.allclose(effective_sizes(plain)[0, [SELECTION, TPR, FPR]], [100, 50, 50])
    doubled = np.stack([rows, 2 * rows, 4 * rows])  # every weight 2: worth no more rows
    assert np.allclose(effective_sizes(doubled), effective_sizes(plain))
    uneven = np.stack([rows, rows, 3 * rows])  # E w = 1, E w^2 = 3
    assert np.allclose(effective_sizes(uneven)[0, SELECTION], 100 / 3)


def test_auc_errors_match_replicated_data():
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(300):
        y = np.repeat([0, 1], [80, 60])
        found = group_auc(rng.normal(y * 1.0, 1), y, np.zeros(140, int), 1)
        values.append(found.value[0])
        errors.append(found.error[0])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_regression_errors_match_replicated_data():
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(400):
        y = rng.normal(size=200)
        p = 0.7 * y + rng.standard_t(6, 200) * 0.5 + 0.1
        found = group_regression(p, y, np.zeros(200, int), 1)
        values.append(found.values[:, 0])
        errors.append(found.errors[:, 0])
    ratio = np.mean(errors, 0) / np.std(values, 0)
    assert dict(zip(REGRESSION, ratio)) == {name: pytest.approx(1, abs=0.15) for name in REGRESSION}
