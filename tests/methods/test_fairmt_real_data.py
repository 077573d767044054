"""The dual variable on people's data: positive while the constraint binds, 0 where it has slack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import libmtl_fair as lf
from libmtl_fair.models import MLP
from tests.harness.trainers import quiet

_DATA: dict[str, dict[str, Any]] = {
    "adult": {"tasks": ["income", "never_married", "long_hours"], "sensitive": ("sex",)},
    "compas": {
        "tasks": ["two_year_recid", "is_violent_recid", "decile_score"],
        "sensitive": ("race",),
        "keep_groups": {"race": 2},
    },
}
_EPOCHS = {"adult": 8, "compas": 25}


@pytest.fixture(scope="module", params=list(_DATA))
def data(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, lf.load_dataset(request.param, **_DATA[request.param])


def _train(name: str, data: Any, **settings: Any) -> Any:
    trainer = quiet(lambda: MLP(data.n_features, (32, 16)), 16, data.tasks, "FairMT", lr=3e-3, weight_args=settings)
    trainer.train(data.train.loader(512, shuffle=True, seed=0), None, _EPOCHS[name])
    return trainer.history


def test_eta_is_positive_exactly_while_the_constraint_binds(data: tuple[str, Any]) -> None:
    name, split = data
    epsilon, rho = 0.1, 0.05
    history = _train(name, split, epsilon=epsilon, rho=rho, sharpness=4.0, fpr_weight=0.3)
    phi, eta = history["phi"].to_numpy(), history["eta"].to_numpy()

    # Reflected sum of the excess: eta > 0 where Phi has been above epsilon more than below since eta last was 0.
    excess = np.concatenate([[0.0], np.cumsum(rho * (phi - epsilon))])
    reflected = (excess - np.minimum.accumulate(excess))[1:]
    np.testing.assert_allclose(eta, reflected, atol=2e-5)

    first = int(np.argmax(phi > epsilon))
    assert phi[first] > epsilon, "the plain model violates the constraint, or this test shows nothing"
    assert not eta[:first].any()
    assert eta[first] > 0
    # Complementary slackness: over the second half eta is positive, and so the constraint holds with equality on average.
    last = history["epoch"] > history["epoch"].max() / 2
    assert (eta[last] > 0).all()
    assert abs(phi[last].mean() - epsilon) < 0.2 * epsilon


def test_eta_ends_at_zero_where_the_constraint_has_slack(data: tuple[str, Any]) -> None:
    name, split = data
    history = _train(name, split, epsilon=1.2, eta_0=0.5, rho=0.1, sharpness=4.0, fpr_weight=0.3)
    phi, eta = history["phi"].to_numpy(), history["eta"].to_numpy()
    assert (phi < 1.2).all()
    assert (np.diff(eta) <= 0).all()
    zero = int(np.argmax(eta == 0))
    assert 0 < zero < len(eta) - 1
    assert not eta[zero:].any()
