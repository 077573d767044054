from __future__ import annotations

from pathlib import Path

import pytest

RECIPE = """\
name: small
description: a recipe for tests
data:
  name: adult
  tasks: [income, long_hours]
  sensitive: [sex, race]
  split: [0.6, 0.2, 0.2]
  keep_groups: {race: [White, Black]}
model:
  hidden: [16, 8]
train:
  epochs: 2
  batch_size: 64
  optimizer: {optim: adam, lr: 1e-3, weight_decay: 1.0e-5}
seeds: [0, 1]
methods:
  plain: {weighting: EW}
  relif: {weighting: ReLiF, target: 0.10, eta: 2e-2, base: GradNorm}
audit: {delta: [0.275, p75, "conformal:0.1"]}
metrics: {threshold: base_rate}
"""


@pytest.fixture
def recipe_text() -> str:
    return RECIPE


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str | bytes, name: str = "small.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return make
