"""One encoder for data sets and estimators: plain data, read back exactly, also as version 0.1 wrote it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from libmtl_fair.data.features import FeatureEncoder, feature_kinds, fit_encoder
from libmtl_fair.errors import DataError
from libmtl_fair.sklearn.inputs import encode_inputs, fit_inputs

COLUMNS = ["age", "height", "job", "race"]


def test_plain_data_reads_back_to_the_same_encoding(people) -> None:
    encoder, x = fit_encoder(people, np.arange(len(people)), feature_kinds(people, COLUMNS), min_frequency=70)
    assert any(encoder.rare)
    again = FeatureEncoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert again == encoder
    np.testing.assert_array_equal(again.encode(people), x)


def test_estimators_encode_as_data_sets_do(people) -> None:
    frame = people[COLUMNS]
    encoder, x = fit_inputs(frame)
    np.testing.assert_array_equal(x, fit_encoder(frame, np.arange(len(frame)), feature_kinds(frame, COLUMNS))[1])
    np.testing.assert_array_equal(encode_inputs(encoder, frame.astype(object)), x)
    numbers = frame[["age", "height"]].to_numpy(dtype=float)
    encoder, x = fit_inputs(numbers)
    assert encoder.kinds == {"0": "numeric", "1": "numeric"}
    np.testing.assert_array_equal(encode_inputs(encoder, numbers[:5]), x[:5])


def test_what_version_0_1_saved_is_read(people) -> None:
    encoder, x = fit_inputs(people[["job", "age", "height"]])
    new = encoder.to_dict()
    old = {name: new[name] for name in ("fill", "centre", "scale", "gaps", "categories")}
    old |= {"numeric": [1, 2], "categorical": [0]}
    again = FeatureEncoder.from_dict(json.loads(json.dumps(old)))
    np.testing.assert_array_equal(encode_inputs(again, people[["job", "age", "height"]]), x)


def test_constant_columns_are_not_scaled_up_and_tiny_ones_are_scaled() -> None:
    frame = pd.DataFrame({"same": [0.1] * 40, "tiny": 1e-20 * np.arange(40), "gap": [np.nan] * 40})
    _, x = fit_inputs(frame[["same", "tiny"]])
    assert np.abs(x[:, 0]).max() < 1e-6
    np.testing.assert_allclose(x[:, 1].std(), 1, rtol=1e-6)
    with pytest.raises(DataError, match=r"feature 'gap' has no value in the training part \(40 rows\)"):
        fit_inputs(frame)


def test_loaders_and_specs_come_without_pandas() -> None:
    code = (
        "import sys, libmtl_fair.data.loader, libmtl_fair.data.spec;"
        "assert not {'pandas', 'sklearn', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
