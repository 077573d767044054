"""Near pairs: exact neighbours against brute force, ties in one order, the reference distance, the file."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.errors import CheckpointError, DataError
from libmtl_fair.metrics import NearPairs, find_near_pairs, reference_matrix


def brute(squared, k):
    """Of every row the k nearest others; of those at one distance the next by row, counted round."""
    n = len(squared)
    order = [sorted((j for j in range(n) if j != i), key=lambda j: (squared[i, j], (j - i) % n)) for i in range(n)]
    return np.array([each[:k] for each in order])


def indicator_distance(frame, weights):
    """d(x, y)^2 pair by pair, as METHODS.md has it."""
    n = len(frame)
    found = np.zeros((n, n))
    for name in frame:
        column, w2 = frame[name].tolist(), weights.get(name, 1.0) ** 2
        number = pd.api.types.is_numeric_dtype(frame[name]) and frame[name].dtype != bool
        for i in range(n):
            for j in range(n):
                x, y = column[i], column[j]
                found[i, j] += w2 * ((min(5, max(-5, x)) - min(5, max(-5, y))) ** 2 if number else x != y)
    return found


def mixed(seed, n=60):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": np.round(rng.normal(size=n) * 3, 1),
            "work": rng.choice(["a", "b", "c"], n),
            "married": rng.random(n) < 0.4,
            "kind": pd.Categorical(rng.choice(["u", "v"], n)),
        }
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [{}, {"age": 0.5, "work": 2.0}, {"age": 0.0}])
def test_reference_distance_is_the_sum_over_numbers_and_indicators(seed, weights):
    frame = mixed(seed)
    squared = indicator_distance(frame, weights)
    matrix = reference_matrix(frame, weights)
    found = ((matrix[:, None] - matrix) ** 2).sum(-1)
    np.testing.assert_allclose(found, squared, atol=1e-12)
    pairs = find_near_pairs(matrix, k=7)
    assert (pairs.neighbours == brute(squared.round(9), 7)).all()
    np.testing.assert_allclose(pairs.distances**2, np.take_along_axis(squared, pairs.neighbours, 1), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 90),
    columns=st.integers(0, 20),
    values=st.integers(1, 4),
    k=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_ties_are_decided_by_row_whatever_the_search_returns(n, columns, values, k, seed):
    matrix = np.random.default_rng(seed).integers(0, values, (n, columns)).astype(float)
    squared = ((matrix[:, None] - matrix) ** 2).sum(-1)
    pairs = find_near_pairs(matrix, k=k)
    assert (pairs.neighbours == brute(squared, min(k, n - 1))).all()
    given_matrix = find_near_pairs(np.sqrt(squared), k=k, distance="precomputed")
    assert (given_matrix.neighbours == pairs.neighbours).all()


def test_nobody_is_the_neighbour_of_all_where_all_are_alike():
    pairs = find_near_pairs(np.zeros((500, 3)), k=10)
    assert (np.bincount(pairs.neighbours.ravel()) == 10).all()
    assert pairs.describe()["distance_zero"] == 1


def test_above_so_many_people_anchors_are_drawn_and_neighbours_are_among_all():
    matrix = np.random.default_rng(0).normal(size=(400, 4))
    whole, drawn = find_near_pairs(matrix, k=5), find_near_pairs(matrix, k=5, anchors=100, seed=3)
    assert len(set(drawn.anchors)) == 100 and drawn.n == 400
    assert (drawn.neighbours == whole.neighbours[drawn.anchors]).all()
    assert (find_near_pairs(matrix, k=5, anchors=100, seed=3).anchors == drawn.anchors).all()
    assert (find_near_pairs(matrix, k=5, anchors=100, seed=4).anchors != drawn.anchors).any()


def test_a_distance_of_the_users_own():
    matrix = np.random.default_rng(0).normal(size=(40, 3)) * 20
    pairs = find_near_pairs(matrix, k=4, distance=lambda x, y: float(np.abs(x - y).max()))
    assert (pairs.neighbours == brute(np.abs(matrix[:, None] - matrix).max(-1), 4)).all()


def test_numbers_are_standardised_on_training_rows():
    rng = np.random.default_rng(0)
    train, rows = rng.normal(50, 9, (200, 2)), rng.normal(50, 9, (30, 2))
    expected = np.clip((rows - train.mean(0)) / train.std(0), -5, 5)
    np.testing.assert_allclose(reference_matrix(rows, train=train), expected, atol=1e-12)


def test_raw_numbers_are_noticed():
    with pytest.warns(UserWarning, match="standardise"):
        reference_matrix(np.full((9, 2), 50.0))


def test_pairs_are_read_back_and_damage_is_noticed(tmp_path):
    pairs = find_near_pairs(np.random.default_rng(0).normal(size=(50, 3)))
    held = NearPairs.load(pairs.save(tmp_path / "pairs.npz"))
    assert (held.neighbours == pairs.neighbours).all() and (held.distances == pairs.distances).all()
    assert (held.n, held.digest) == (pairs.n, pairs.digest)
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "odd.npz", anchors=[0, 9], neighbours=[[1], [0]], distances=[[0.0], [0.0]], n=2, digest="")
    for name in ("bad", "odd", "absent"):
        with pytest.raises(CheckpointError, match="near pairs"):
            NearPairs.load(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ([[1.0, np.nan]], {}, "missing or infinite"),
        ([1.0, 2.0], {}, r"must be \[N, d\]"),
        ([[1.0], [2.0]], {"weights": [1.0, 2.0]}, "one a column"),
        ([[1.0], [2.0]], {"weights": [-1.0]}, "at least 0"),
        (pd.DataFrame({"age": [1.0]}), {"weights": {"agee": 1.0}}, "did you mean 'age'"),
        (pd.DataFrame({"id": [str(i) for i in range(1500)]}), {}, "identifier"),
    ],
)
def test_features_that_cannot_be_a_reference(features, options, message):
    with pytest.raises(DataError, match=message):
        reference_matrix(features, **options)


def test_too_few_people_or_impossible_distances():
    with pytest.raises(DataError, match="two people"):
        find_near_pairs(np.zeros((1, 2)))
    with pytest.raises(DataError, match=r"\[N, N\]"):
        find_near_pairs(np.zeros((3, 2)), distance="precomputed")
    with pytest.raises(DataError, match="at least 0"):
        find_near_pairs(-np.ones((3, 3)), k=1, distance="precomputed")
