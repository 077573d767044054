from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from libmtl_fair.recipe import load_recipe

TEXT = """\
name: small
data: {name: adult, tasks: [income, never_married], sensitive: [sex], subset: 1000}
model: {hidden: [8]}
train: {epochs: 1, batch_size: 256, optimizer: {optim: adam, lr: 0.01}}
seeds: [0, 1]
methods:
  plain: {weighting: EW}
  relif: {weighting: ReLiF, beta: 0.3, k: 16}
audit: {delta: [0.275]}
metrics: {n_bootstrap: 20}
tune:
  objectives: [macro_auc, eo_difference]
  space: {target: builtin, lr: builtin, hidden: [[8], [16]]}
  trials: 4
"""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def small(recipe_file: Path):
    """A function that loads the small recipe with changes."""
    return lambda *changes: load_recipe(recipe_file, changes)


@pytest.fixture
def cli():
    """A function that runs the command line in a process of its own."""

    def run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-W", "error", "-c", "from libmtl_fair.cli import main; main()", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)

    return run
